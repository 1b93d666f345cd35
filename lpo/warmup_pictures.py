"""Pictures for the label-free warm-up, as latents: pairs of scenes that one hard mistake tells apart.

Several kinds, since skill learned on clean renderings alone did not carry over to what the model itself draws:
- other      two renderings of one background and layout with altogether other objects: the easy start;
- rendered   both scenes drawn by the renderer and encoded, one hard mistake apart, as all that follow;
- warped     the same, a little bent, blurred and noised, as a small model draws;
- edited     rendered, noised to a middle timestep and denoised again by the model with their own caption (SDEdit);
- generated  both captions drawn by the model from the same noise.
Every other chunk of these sets the two pictures apart as two seeds would: other style, other background details, other
noise. Pictures that a person compares differ in all of that too, and an LRM must not mind.
Two kinds carry one caption twice, the first picture the better: this is how an LRM learns to mark down blobs.
- spoilt     one rendering bent a little, and bent out of shape;
- weak       one caption drawn well by the model, and drawn badly (few steps, hardly any guidance).
No label, judge or held-out caption is involved: what is known is only which caption a picture was made from.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lpo import rng as keyed
from lpo.backbones import Backbone, transitions
from lpo.scenes.world import Attributes, Scene, caption, hard_negative, parse_caption, render, sample_scene, split_of

KINDS = ("other", "rendered", "warped", "spoilt", "edited", "generated", "weak")
ORDERED = ("spoilt", "weak")  # kinds whose two pictures share a caption
CHUNK = 48  # pairs made together and kept in one file
GUIDANCE = (3.0, 5.0, 7.0)  # of the model's drawings, in turn: an LRM will meet policies that it has never seen
STEPS, WEAK_STEPS = 10, 5
BEND, SPOIL = 0.8, 2.6  # pixels


@dataclass
class Pool:
    """Pairs of one kind: latents (N, 2, C, h, w) fp32 and captions, N x 2; picture k was made from caption k."""

    latents: torch.Tensor
    captions: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.captions)


def shows(claims: Attributes, scene: Scene) -> bool:
    """Whether `scene` is what a caption claims, as far as shapes, colours, sizes and places go."""
    def fits(order: tuple[int, ...]) -> bool:
        return all(scene.objects[i].shape == claim.shape and claim.colour in (None, scene.objects[i].colour)
                   and claim.size in (None, scene.objects[i].size)
                   for i, claim in zip(order, claims.objects, strict=True))

    if len(claims.objects) != len(scene.objects):
        return False
    straight = tuple(range(len(scene.objects)))
    return fits(straight) or (claims.relation is None and fits(straight[::-1]))


def contrast(
    *key: int | str, easy: bool = False, apart: bool = False
) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    """Two scenes and their captions in one phrasing, both of the train split, each wrong about the other scene.

    One mistake apart (`hard_negative`), or, if `easy`, other objects in the same places; if `apart`, in another style.
    """
    rng = np.random.default_rng(keyed.key_seed(*key))
    while True:
        scene = sample_scene(rng)
        other, phrasing = hard_negative(scene, rng), int(rng.integers(1 << 62))
        if easy:
            looks = sample_scene(rng, len(scene.objects)).objects
            other = replace(scene, objects=tuple(replace(look, x=thing.x, y=thing.y)
                                                 for look, thing in zip(looks, scene.objects, strict=True)))
        if apart:
            other = replace(other, style=float(rng.random()), seed=int(rng.integers(1 << 30)))
        # the same draws choose the same words, so only the attributes differ
        texts = tuple(caption(one, np.random.default_rng(phrasing)) for one in (scene, other))
        wrong = not shows(parse_caption(texts[0]), other) and not shows(parse_caption(texts[1]), scene)
        if wrong and all(split_of(text) == "train" for text in texts):
            return (scene, other), texts


def make(backbone: Backbone, kind: str, seed: int, index: int, size: int = CHUNK) -> Pool:
    """Chunk `index` of a kind: `size` pairs, the same for the same seed, whatever was made before."""
    key = (seed, "warmup", kind, index)
    apart = index % 2 == 1
    drawn = [contrast(*key, i, easy=kind == "other", apart=apart) for i in range(size)]
    texts = [text for _, pair in drawn for text in pair]
    guidance = GUIDANCE[index % len(GUIDANCE)]
    if kind in ("other", "rendered", "warped", "spoilt", "edited"):
        if kind == "spoilt":
            drawn = [((scenes[0], scenes[0]), (pair[0], pair[0])) for scenes, pair in drawn]
            texts = [text for _, pair in drawn for text in pair]
        pixels = np.stack([np.asarray(render(scene)) for scenes, _ in drawn for scene in scenes])
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        if kind in ("warped", "spoilt"):
            bends = torch.tensor([[BEND, BEND if kind == "warped" else SPOIL]] * size).flatten()
            pictures = spoil(pictures, bends, *key)
        latents = torch.cat([backbone.encode(part)[0].float().cpu() for part in pictures.split(64)])
        if kind == "edited":
            start = (250, 400, 550, 700)[index % 4]
            latents = denoise(backbone, latents, texts, 2 * STEPS, guidance, start, (*key, "noise"))
    elif kind == "generated":
        noise = keyed.normal(((2 if apart else 1) * size, *backbone.latent_shape()), *key, "noise")
        noise = noise if apart else noise.repeat_interleave(2, dim=0)
        latents = denoise(backbone, noise, texts, STEPS, guidance, None, (*key, "noise"))
    else:
        texts = [pair[0] for _, pair in drawn]
        noise = keyed.normal((2 * size, *backbone.latent_shape()), *key, "noise")
        good = denoise(backbone, noise[:size], texts, STEPS, 5.0, None, key)
        bad = denoise(backbone, noise[size:], texts, WEAK_STEPS, (1.0, 2.0)[index % 2], None, key)
        latents = torch.stack([good, bad], dim=1).flatten(0, 1)
        texts = [text for text in texts for _ in range(2)]
    return Pool(latents.unflatten(0, (size, 2)), list(zip(texts[::2], texts[1::2], strict=True)))


def spoil(pictures: torch.Tensor, bends: torch.Tensor, *key: int | str) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] bent by smooth random fields of about `bends` (B,) pixels, then up to half of
    them blurred, all noised by up to 5/255."""
    n, _, height, width = pictures.shape
    field = F.interpolate(keyed.normal((n, 2, 7, 7), *key, "bend"), (height, width), mode="bicubic", align_corners=True)
    shift = (field * bends.view(-1, 1, 1, 1) * 2 / width).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(pictures.shape), align_corners=False)
    bent = F.grid_sample(pictures, straight + shift, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(F.pad(bent, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    lots = keyed.uniform((n, 2, 1, 1, 1), *key, "lots")
    share = (2 * lots[:, 0] - 1).clamp(0, 1)
    noise = keyed.normal(tuple(pictures.shape), *key, "grain") * lots[:, 1] * 5 / 127.5
    return (bent + share * (blurred - bent) + noise).clamp(-1, 1)


@torch.no_grad()
def denoise(backbone: Backbone, latents: torch.Tensor, texts: list[str], steps: int, guidance_scale: float,
            start: int | None, key: tuple[int | str, ...]) -> torch.Tensor:
    """DDIM (eta 0) from pure noise, or from `latents` noised to the last timestep <= `start`; (B, C, h, w) fp32."""
    timesteps = backbone.timesteps(steps)
    done = []
    for low in range(0, len(texts), 64):
        x, conditioning = latents[low:low + 64].to(backbone.device), backbone.encode_prompts(texts[low:low + 64])
        left = [t for t in timesteps if start is None or t <= start]
        if start is not None:
            noise = keyed.normal(tuple(x.shape), *key, low).to(x.device)
            x = backbone.process.add_noise(x, noise, left[0])
        for t, previous in transitions(left):
            prediction = backbone.predict(x, t, conditioning, guidance_scale)
            x = backbone.transition(x, prediction, t, previous, 0.0)[1]
        done.append(x.float().cpu())
    return torch.cat(done)


def pool(backbone: Backbone, folder: Path, kind: str, seed: int, chunks: int) -> Pool:
    """The first `chunks` chunks of a kind; each is made once and kept in `folder`, so a stopped run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(chunks):
        path = folder / f"{kind}-{seed}-{index:03d}.safetensors"
        if not path.exists():
            made = make(backbone, kind, seed, index)
            part = path.with_suffix(".part")
            save_file({"latents": made.latents.half().contiguous()}, part)
            path.with_suffix(".json").write_text(json.dumps(made.captions))
            part.rename(path)
        captions = [tuple(pair) for pair in json.loads(path.with_suffix(".json").read_text())]
        parts.append(Pool(load_file(path)["latents"].float(), captions))
    return Pool(torch.cat([part.latents for part in parts]), [pair for part in parts for pair in part.captions])
