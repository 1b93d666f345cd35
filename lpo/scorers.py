"""What other judges think of pictures: CLIP score, PickScore and an aesthetic head, for filtering imported labels.

    judges = load_judges(clip="models/clip-vit-large-patch14", aesthetic="sac+logos+ava1-l14-linearMSE.safetensors")
    judges.score(["a cat"], [Path("cat.png")])        # {"clip": (1,), "aesthetic": (1,)}

Everything is read from local folders in the layout of transformers; nothing is fetched. CLIP score is the cosine in
[-1, 1] (not times 100), PickScore the cosine times the model's exp(logit_scale), as published. The aesthetic head is
the linear one of LAION (a chain of linear layers without activations) on the normalised picture embedding.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from lpo.backbones import pick_device
from lpo.backbones.source import reason
from lpo.config import ConfigError


class Clip:
    """A CLIP model with its tokenizer and picture preprocessing; embeddings have length 1."""

    def __init__(self, folder: str | Path, device: torch.device):
        folder = Path(folder).expanduser()
        for name in ("config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{folder} has no {name}; give a local folder with a CLIP model, its tokenizer and its "
                    "preprocessor (for PickScore copy the last two from laion/CLIP-ViT-H-14-laion2B-s32B-b79K)."
                )
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            told = f"{folder} cannot be loaded as a CLIP model ({reason(error)}); download it again."
            raise ConfigError(told) from error
        self.model.requires_grad_(False)
        self.device = device
        self.longest = self.model.config.text_config.max_position_embeddings
        self.scale = float(self.model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) of length 1, on the CPU."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return _unit(self.model.text_projection(pooled))

    @torch.no_grad()
    def pictures(self, paths: Sequence[Path]) -> Tensor:
        """(N, D) of length 1, on the CPU; the same path is read and embedded once."""
        unique = list(dict.fromkeys(paths))
        images = []
        for path in unique:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.device)
        embedded = _unit(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return embedded[[unique.index(path) for path in paths]]


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


class AestheticHead:
    """A chain of linear layers from a picture embedding (N, D) to one number a picture, read from .safetensors (or a
    .pth, of which only tensors are read). Its weights are named `<prefix><number>.weight` and `.bias`, as published."""

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(f"{path} cannot be read as an aesthetic head ({str(error)[:120]}).") from error
        if not isinstance(state, dict):
            raise ConfigError(f"{path} holds no named weights; an aesthetic head is a state dict of linear layers.")
        prefixes = sorted((name.removesuffix("weight") for name in state if name.endswith("weight")), key=_number)
        self.layers = [
            (state[f"{each}weight"].float(), state.get(f"{each}bias", torch.zeros(1)).float()) for each in prefixes
        ]
        sizes = [tuple(weight.shape) for weight, _ in self.layers]
        matrices = bool(sizes) and all(len(size) == 2 for size in sizes)
        if not matrices or sizes[-1][0] != 1 or any(a[0] != b[1] for a, b in pairwise(sizes)):
            raise ConfigError(
                f"{path} is no aesthetic head: its layers are {sizes}, wanted is a chain of linear layers that ends in "
                "one number, such as sac+logos+ava1-l14-linearMSE."
            )
        self.width = sizes[0][1]

    def __call__(self, embedded: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        for weight, bias in self.layers:
            embedded = embedded @ weight.T + bias
        return embedded[:, 0]


def _number(prefix: str) -> int:
    """The layer's number in "layers.2." or "2."; 0 for a single layer without one."""
    last = prefix.rstrip(".").rpartition(".")[2]
    return int(last) if last.isdigit() else 0


class Judges:
    """The scorers that were named, each loaded once."""

    def __init__(self, clip: Clip | None, pick: Clip | None, head: AestheticHead | None, head_clip: Clip | None):
        self.clip, self.pick, self.head, self.head_clip = clip, pick, head, head_clip

    @property
    def names(self) -> list[str]:
        """Which scores there are, in the order of the columns: aesthetic, clip, pick."""
        loaded = {"aesthetic": self.head, "clip": self.clip, "pick": self.pick}
        return [name for name, scorer in loaded.items() if scorer is not None]

    def score(self, prompts: Sequence[str], paths: Sequence[Path]) -> dict[str, Tensor]:
        """{score: (N,) fp32} of N pictures, each with its prompt."""
        out, embedded = {}, {}
        for clip in {id(c): c for c in (self.clip, self.pick, self.head_clip) if c is not None}.values():
            embedded[id(clip)] = clip.pictures(paths)
        if self.head is not None:
            out["aesthetic"] = self.head(embedded[id(self.head_clip)])
        if self.clip is not None:
            out["clip"] = (self.clip.texts(prompts) * embedded[id(self.clip)]).sum(-1)
        if self.pick is not None:
            out["pick"] = self.pick.scale * (self.pick.texts(prompts) * embedded[id(self.pick)]).sum(-1)
        return out

    def gaps(self, rows: Sequence[dict]) -> list[dict]:
        """{label, tie, <score>: gap} of rows {label, choice, prompt, first, second (paths)}: score of the chosen
        picture minus score of the other one, of a tie first minus second."""
        prompts = [row["prompt"] for row in rows for _ in (0, 1)]
        scores = self.score(prompts, [row[side] for row in rows for side in ("first", "second")])
        out = []
        for place, row in enumerate(rows):
            sign = -1.0 if row["choice"] == "second" else 1.0
            gaps = {name: sign * float(each[2 * place] - each[2 * place + 1]) for name, each in scores.items()}
            out.append({"label": row["label"], "tie": row["choice"] == "tie", **gaps})
        return out


def load_judges(
    *, clip: str = "", pick: str = "", aesthetic: str = "", aesthetic_clip: str = "", device: str = "auto"
) -> Judges:
    """The judges that are named by local paths; an empty path leaves one out. The head needs `aesthetic_clip`, by
    default the `clip` folder. Raises ConfigError: a sentence that names the file and what is wanted."""
    if not (clip or pick or aesthetic):
        raise ConfigError("No scorer is named; give the folder of a CLIP model, of PickScore, or an aesthetic head.")
    if aesthetic and not (aesthetic_clip or clip):
        raise ConfigError("The aesthetic head needs the CLIP-L model that it was trained on; give its folder.")
    where = pick_device(device)
    loaded = {path: Clip(path, where) for path in dict.fromkeys((clip, pick, aesthetic_clip)) if path}
    head = AestheticHead(aesthetic) if aesthetic else None
    head_clip = loaded[aesthetic_clip or clip] if aesthetic else None
    if head is not None and head.width != head_clip.model.config.projection_dim:
        raise ConfigError(
            f"The aesthetic head takes embeddings of {head.width} numbers, this CLIP model gives "
            f"{head_clip.model.config.projection_dim}; give the CLIP model that it was trained on."
        )
    return Judges(loaded.get(clip), loaded.get(pick), head, head_clip)
