"""What the interactive lane keeps loaded, and how it draws pictures. Importing this imports torch.

One base and a few LRMs stay in memory between requests, so that the next one starts at once. On an accelerator they are
let go when it is another job's turn, and on the CPU they use the cores that a training leaves.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from app.weights import base_identity, content_hash, folder_hash, lrm_hash
from app.worker_device import interactive_threads, is_training
from app.worker_task import Task
from lpo.backbones import Backbone, load_policy, use_adapters
from lpo.config import Policy, from_dict
from lpo.places import adapter_file
from lpo.reward_model import LatentRewardModel
from lpo.sampling import sample_latents, to_pil
from lpo.search import costs, require_fit, search_latents
from lpo.search_costs import Costs
from storage import Storage

MOST_LRMS = 4
SMALL = 32 * 32  # latents up to this size are drawn eight at a time, larger ones two at a time

SAMPLER = {"steps": 20, "guidance_scale": 5.0, "eta": 0.0}


class Models:
    """Loaded models by what they were loaded from. A base is loaded once; its adapters are switched."""

    def __init__(self) -> None:
        self._backbone: tuple[tuple, Backbone] | None = None
        self._lrms: OrderedDict[tuple, LatentRewardModel] = OrderedDict()

    def breathe(self, store: Storage) -> None:
        """Takes the cores that are free now; called before every piece of work."""
        torch.set_num_threads(interactive_threads(is_training(store)))

    def policy(self, policy: Policy, device: str, dtype: str = "auto", allow_mismatch: bool = False) -> Backbone:
        """The policy, ready to draw. Ask again after any other use of the models: its adapters may have changed."""
        networks = [(name, base_identity(name)) for name in (policy.base, policy.unet) if name]
        key = (*networks, device, dtype)
        if self._backbone is None or self._backbone[0] != key:
            self._backbone = None  # freed before the next one is loaded
            self._backbone = (key, load_policy(policy, device, dtype, allow_mismatch))
        backbone = self._backbone[1]
        if backbone.policy.adapters != policy.adapters:
            use_adapters(backbone, policy.adapters, allow_mismatch)
        return backbone

    def chooser(
        self, policy: Policy, backbone: Backbone, device: str, dtype: str = "auto", allow_mismatch: bool = False
    ) -> LatentRewardModel | None:
        """The LRM of the policy's search, None without one. ConfigError if it judges another latent space."""
        if policy.search is None:
            return None
        lrm = self.lrm(policy.search.lrm, policy.base, device, dtype)
        require_fit(lrm, policy, backbone, allow_mismatch)
        return lrm

    def lrm(self, path: str, base: str, device: str, dtype: str = "auto") -> LatentRewardModel:
        """The LRM at `path` ('scenes' is the shipped one); an official folder takes its tokenizer from `base`."""
        key = (path, base, device, dtype, _changed(path))
        if key not in self._lrms:
            self._lrms[key] = LatentRewardModel.from_pretrained(path, base, device, dtype)
            while len(self._lrms) > MOST_LRMS:
                self._lrms.popitem(last=False)
        self._lrms.move_to_end(key)
        return self._lrms[key]

    def unload(self) -> None:
        """Lets go of everything, for another job's turn on the device (worker_turns.py)."""
        self._backbone = None
        self._lrms.clear()


def batch(task: Task, policy: dict) -> int:
    """How many pictures of this policy are drawn together: few enough that the first ones are soon stored."""
    _, rows, columns = _ready(task, policy).latent_shape()
    return 8 if rows * columns <= SMALL else 2


@torch.no_grad()
def draw(task: Task, policy: dict, rows: Sequence[tuple[int, str]], sampler: dict) -> list[Image.Image]:
    """One picture per (seed, prompt), the same ones that `python -m lpo sample` draws."""
    task.worker.models.breathe(task.store)
    size, backbone, pictures = batch(task, policy), _ready(task, policy), []
    plan = from_dict(Policy, policy)
    lrm = task.worker.models.chooser(plan, backbone, task.device)
    settings = backbone.latent_shape(), sampler["steps"], sampler["guidance_scale"], sampler["eta"]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        if lrm is None:
            latents = sample_latents(backbone, part, *settings)
        else:
            latents = search_latents(backbone, lrm, plan.search, part, *settings, batch_size=size).latents
        pictures += to_pil(backbone.decode(latents))
    return pictures


def spent(task: Task, policy: dict, sampler: dict) -> Costs:
    """What a picture of this policy takes."""
    backbone, plan = _ready(task, policy), from_dict(Policy, policy)
    return costs(backbone, plan.search, sampler["steps"], sampler["guidance_scale"], sampler["eta"])


def _ready(task: Task, policy: dict) -> Backbone:
    return task.worker.models.policy(from_dict(Policy, policy), task.device)


def provenance(policy: dict, sampler: dict, seed: int) -> dict:
    """Where a picture comes from, adapters and a search's LRM with the hash of their weights: enough to draw it
    again."""
    search = policy.get("search")
    adapters = [
        {"path": each["path"], "strength": each.get("strength", 1.0), "hash": content_hash(adapter_file(each["path"]))}
        for each in policy.get("adapters", [])
    ]
    made_by = {"base": policy["base"], "adapters": adapters}
    if policy.get("unet"):
        made_by |= {"unet": policy["unet"], "unet_hash": folder_hash(Path(policy["unet"]).expanduser())}
    if search:
        made_by["search"] = {**search, "hash": lrm_hash(search["lrm"])}
    return {"policy": made_by, "scheduler": "DDIM", **sampler, "seed": seed}


def _changed(path: str) -> float:
    """When an LRM folder was last written; an alias or hub id never changes."""
    folder = Path(path)
    return max((file.stat().st_mtime for file in folder.glob("*")), default=0.0) if folder.is_dir() else 0.0
