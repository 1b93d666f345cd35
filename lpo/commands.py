"""What each command does, once its settings are known to be good. `lpo/__main__.py` is the way in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lpo.backbones import load_policy
from lpo.backbones.latent_space import require_same
from lpo.config import CONFIGS, ConfigError, SampleConfig, TraceConfig, from_dict, to_dict
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_files import latent_space
from lpo.lrm_trainer import LRMTrainer
from lpo.prompts import read_prompts
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import STOPPED, Run, write_json
from lpo.sampling import sample, to_pil
from lpo.trace import collect, save_trace, score_siblings, score_step, score_trace, step_thresholds, trace
from lpo.training import run_training

TRAINERS = {"train-lrm": LRMTrainer, "train-lpo": LPOTrainer}


def start(command: str, config: Any, run_dir: str, settings: dict) -> int:
    """Begin a run in `run_dir`. Returns the exit code; raises a ValueError subclass with one sentence on bad input."""
    run = Run.create(run_dir, {**settings, "command": command})
    return _guarded(command, config, run, resuming=False)


def resume(command: str, run_dir: str) -> int:
    """Go on with the run in `run_dir`, with the settings it was started with."""
    run, settings = Run.resume(run_dir)
    started_as = settings.pop("command", command)
    if started_as != command:
        raise ConfigError(f"The run in {run_dir} is a {started_as} run: resume it with that command.")
    return _guarded(command, from_dict(CONFIGS[command], settings), run, resuming=True)


def _guarded(command: str, config: Any, run: Run, resuming: bool) -> int:
    """Run the command; whatever goes wrong ends up as the last line of log.txt."""
    try:
        with run.catching_signals():
            if command in ("sample", "trace"):
                run.rewind(0)  # these start over: they take seconds
                return run_sample(config, run) if command == "sample" else run_trace(config, run)
            return run_training(TRAINERS[command](config, run), run, resuming)
    except torch.OutOfMemoryError as error:
        sentence = "The device ran out of memory: use a smaller batch size, fewer prompts per iteration or bfloat16."
        run.fail(sentence)
        raise ConfigError(sentence) from error
    except Exception as error:
        run.fail(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise


def run_sample(config: SampleConfig, run: Run) -> int:
    """Pictures as samples/prompt<i>_seed<s>.png, listed in result.json. Pictures already there are drawn again."""
    prompts = list(config.prompts)
    if len(prompts) == 1 and prompts[0].endswith((".json", ".txt")):
        prompts = read_prompts(prompts[0])
    if not prompts or not config.seeds:
        raise ConfigError("sample needs at least one prompt and one seed.")
    policy = load_policy(config.policy, config.device, config.dtype)
    total, files = len(prompts) * len(config.seeds), []
    pictures = sample(
        policy, prompts, config.seeds, config.steps, config.guidance_scale, config.eta,
        config.height, config.width, config.negative_prompt, config.batch_size,
    )  # fmt: skip
    for done, (index, seed, picture) in enumerate(pictures, 1):
        name = f"samples/prompt{index}_seed{seed}.png"
        picture.save(run.path / name)
        files.append({"prompt": prompts[index], "seed": seed, "file": name})
        run.record({"step": done, "total": total})
        if run.stop_requested:
            run.log(f"stopped after {done} of {total} pictures")
            return STOPPED
    run.finish({"pictures": files})
    run.log(f"{total} pictures in {run.samples}")
    return 0


def run_trace(config: TraceConfig, run: Run) -> int:
    """traces/seed<s>.safetensors, the finished pictures, and scores.json: scores of every LRM at every timestep."""
    if not config.prompt or not config.seeds:
        raise ConfigError("trace needs a prompt and at least one seed.")
    policy = load_policy(config.policy, config.device, config.dtype)
    lrms = {}
    for name in config.lrm:
        lrm = LatentRewardModel.from_pretrained(name, config.policy.base, config.device, config.dtype)
        space, own = latent_space(lrm, config.policy.base), policy.fingerprint()
        require_same(space, own, name, config.policy.base, config.allow_latent_mismatch)
        lrms[name] = lrm
    limits = step_thresholds(
        policy, config.steps, config.eta, config.threshold, config.threshold_min, config.threshold_max
    )
    items, siblings = [], {name: [] for name in lrms}
    steps = trace(
        policy, config.prompt, config.seeds, config.steps, config.guidance_scale, config.eta, config.siblings,
        config.height, config.width, config.negative_prompt,
    )  # fmt: skip
    for item in steps:
        scores = {name: score_step(lrm, item, config.prompt) for name, lrm in lrms.items()}
        for name, lrm in lrms.items():
            siblings[name].append(score_siblings(lrm, item, config.prompt, limits[item["step"]], config.score_timestep))
        items.append({**item, "siblings": None})
        run.record({"step": item["step"] + 1, "total": config.steps, "t": item["t"], "scores": scores})
        if run.stop_requested:
            run.log("stopped; traces are not resumed, start again")
            return STOPPED
    meta = {k: v for k, v in to_dict(config).items() if k in ("policy", "steps", "guidance_scale", "eta")}
    traces = collect(items, config.prompt, config.seeds, meta)
    (run.path / "traces").mkdir(exist_ok=True)
    for stored in traces:
        save_trace(stored, run.path / "traces" / f"seed{stored.seed}.safetensors")
        picture = to_pil(policy.decode(stored.x_t[-1:].to(policy.device)))[0]
        picture.save(run.samples / f"seed{stored.seed}.png")
    scores = {
        "prompt": config.prompt,
        "seeds": list(config.seeds),
        "timesteps": traces[0].timesteps,
        "thresholds": limits,
        "scores": {name: [score_trace(lrm, stored) for stored in traces] for name, lrm in lrms.items()},
        "siblings": siblings if config.siblings else None,
    }
    write_json(run.path / "scores.json", scores)
    run.finish({"scores": "scores.json", "traces": [f"traces/seed{s.seed}.safetensors" for s in traces]})
    return 0


def score(lrm: str, base: str | None, latents: str, prompts: str, out: str, device: str, dtype: str) -> int:
    """Scores of a file of latents, as {"scores": [...]}."""
    try:
        tensors = load_file(latents)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{latents} is not a readable .safetensors file.") from error
    if not {"latents", "timesteps"} <= set(tensors):
        raise ConfigError(f"{latents} must hold the tensors `latents` and `timesteps`; it has {sorted(tensors)}.")
    x, t, texts = tensors["latents"].float(), tensors["timesteps"], read_prompts(prompts, keep_empty=True)
    if x.ndim != 4 or t.shape != x.shape[:1] or len(texts) != len(x):
        shapes = f"latents {tuple(x.shape)}, timesteps {tuple(t.shape)}, {len(texts)} prompts"
        raise ConfigError(f"The inputs do not match ({shapes}): N latents (N, C, H, W) need N timesteps and N prompts.")
    if bool((t < 0).any()) or bool((t > 999).any()):
        raise ConfigError("timesteps must lie between 0 and 999.")
    model = LatentRewardModel.from_pretrained(lrm, base, device, dtype)
    if x.shape[1] != model.unet.config.in_channels:
        raise ConfigError(
            f"The latents have {x.shape[1]} channels, but this LRM takes {model.unet.config.in_channels}."
        )
    with torch.no_grad():
        scores = model.score(x, t, texts, batch_size=64).tolist()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({"scores": scores}) + "\n")
    return 0
