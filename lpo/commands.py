"""What each command does, once its settings are known to be good. `lpo/__main__.py` is the way in."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lpo.backbones import base_fingerprint
from lpo.backbones.latent_space import require_same
from lpo.config import ConfigError
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_files import latent_space
from lpo.lrm_trainer import LRMTrainer
from lpo.ranks import LostRank, Ranks, join
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import Run, unusable
from lpo.sample_commands import run_sample, run_trace
from lpo.training import run_training

TRAINERS = {"train-lrm": LRMTrainer, "train-lpo": LPOTrainer}
FULL = 2**20  # bytes free, below which a disk counts as full
FORWARDED = 60.0  # seconds for which the second stop signal is the launcher's copy of the first


def start(command: str, config: Any, run_dir: str, settings: dict) -> int:
    """Begin a run in `run_dir`. Returns the exit code; raises a ValueError subclass with one sentence on bad input."""
    ranks = _ranks(command, config)
    run = Run.create(run_dir, {**settings, "command": command}) if ranks.main else Run(run_dir, writes=False)
    ranks.any(False)  # the folder is there
    return _guarded(command, config, run, ranks, resuming=False)


def resume(command: str, config: Any, run: Run) -> int:
    """Go on with `run`, from `Run.resume`, with the settings it was started with. Returns as `start` does."""
    ranks = _ranks(command, config)
    run.writes = ranks.main
    return _guarded(command, config, run, ranks, resuming=True)


def _ranks(command: str, config: Any) -> Ranks:
    ranks = join(config.device)
    if ranks.count > 1 and command not in TRAINERS:
        raise ConfigError(f"{command} works in one process: start it with python -m lpo, not with a launcher of many.")
    return ranks


def _guarded(command: str, config: Any, run: Run, ranks: Ranks, resuming: bool) -> int:
    """Run the command; whatever goes wrong ends up as the last line of log.txt."""
    try:
        with run.catching_signals(patience=FORWARDED if ranks.count > 1 else 0.0):
            if command in ("sample", "trace"):
                run.rewind(0)  # these start over: they take seconds
                return run_sample(config, run) if command == "sample" else run_trace(config, run)
            config = dataclasses.replace(config, device=ranks.device or config.device)
            code = run_training(TRAINERS[command](config, run, ranks), run, resuming)
            ranks.leave()
            return code
    except torch.OutOfMemoryError as error:
        sentence = "The device ran out of memory: use a smaller batch size, fewer prompts per iteration or bfloat16."
        run.fail(sentence)
        raise ConfigError(sentence) from error
    except Exception as error:
        if _disk_is_full(error, run.path):
            sentence = f"The disk with {run.path} is full: make room on it and resume; what was saved before is whole."
            with contextlib.suppress(OSError):  # the log lies on that disk, too
                run.fail(sentence)
            raise ConfigError(sentence) from error
        said = (isinstance(error, OSError) and unusable(error)) or str(error).strip() or type(error).__name__
        first = run.fail(said.splitlines()[0])
        if isinstance(error, LostRank) and not first:
            return 2  # the rank that was lost has said why
        raise


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Torch and safetensors say it in words or not at all, so the disk is asked as well."""
    if getattr(error, "errno", None) == errno.ENOSPC or "no space left" in str(error).lower():
        return True
    return isinstance(error, OSError | RuntimeError | SafetensorError) and shutil.disk_usage(folder).free < FULL


def score(
    lrm: str, base: str | None, latents: str, texts: list[str], out: str, device: str, dtype: str, allow_mismatch: bool
) -> int:
    """Scores of a file of latents for as many prompts, as {"scores": [...]}. A `base` says which model's latents they
    are. Raises ConfigError for what `preflight.require_scorable` cannot tell."""
    try:
        tensors = load_file(latents)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{latents} is not a readable .safetensors file.") from error
    x, t = tensors["latents"].float(), tensors["timesteps"]
    if not x.numel() or not bool(torch.isfinite(x).all()):
        raise ConfigError(f"The latents {tuple(x.shape)} are empty or not finite: there is nothing to score.")
    if t.dtype == torch.bool or t.is_complex() or not bool(torch.isfinite(t).all()):
        raise ConfigError("timesteps must be real, finite numbers: whole or with a fraction.")
    model = LatentRewardModel.from_pretrained(lrm, base, device, dtype)
    if bool((t < 0).any()) or bool((t > model.trunk.last_t).any()):
        raise ConfigError(f"timesteps must lie between 0 and {model.trunk.last_t}.")
    if x.shape[1] != model.trunk.channels:
        raise ConfigError(f"The latents have {x.shape[1]} channels, but this LRM takes {model.trunk.channels}.")
    if base and (model.fingerprint is not None or model.meta.get("base") != base):
        require_same(latent_space(model, base), base_fingerprint(base), lrm, base, allow_mismatch)
    with torch.no_grad():
        scores = model.score(x, t, texts, batch_size=64).tolist()
    if not all(map(math.isfinite, scores)):
        raise ConfigError(f"Some scores are not finite: the latents are too large for {dtype}.")
    Path(out).write_text(json.dumps({"scores": scores}, allow_nan=False) + "\n")
    return 0
