"""`sample` and `trace`, the commands that draw pictures, plainly or with an LRM that chooses. See lpo/commands.py."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from lpo.backbones import Backbone, load_policy
from lpo.config import SampleConfig, TraceConfig, to_dict
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import STOPPED, Run, write_json
from lpo.sampling import sample, to_pil
from lpo.search import best, costs, load_lrm, require_fit, sample_searched
from lpo.trace import (
    collect,
    save_trace,
    score_candidates,
    score_siblings,
    score_step,
    score_trace,
    step_thresholds,
    take,
    trace,
)


def run_sample(config: SampleConfig, run: Run) -> int:
    """Pictures as samples/prompt<i>_seed<s>.png, listed in result.json. Pictures already there are drawn again."""
    prompts = config.texts()
    policy = load_policy(config.policy, config.device, config.dtype, config.allow_latent_mismatch)
    policy.tune(config)
    total, files = len(prompts) * len(config.seeds), []
    for done, (index, seed, picture, scores) in enumerate(_pictures(config, policy, prompts), 1):
        name = f"samples/prompt{index}_seed{seed}.png"
        picture.save(run.path / name)
        found = {"score": max(scores), "candidate": scores.index(max(scores)), "candidates": scores} if scores else {}
        files.append({"prompt": prompts[index], "seed": seed, "file": name, **found})
        run.record({"step": done, "total": total})
        if run.stop_requested:
            run.log(f"stopped after {done} of {total} pictures")
            return STOPPED
    shape = policy.latent_shape(config.height, config.width)
    spent = costs(policy, config.policy.search, config.steps, config.guidance_scale, config.eta, shape)
    evaluations = {"policy": spent.policy, "lrm": spent.lrm}
    run.finish({"pictures": files, "policy": to_dict(config.policy), "evaluations_per_picture": evaluations})
    run.log(f"{total} picture{'s' * (total > 1)} in {run.samples}; each took {spent.in_words()}")
    return 0


def _pictures(
    config: SampleConfig, policy: Backbone, prompts: list[str]
) -> Iterator[tuple[int, int, Image.Image, list[float]]]:
    """(prompt index, seed, picture, the candidates' scores, none without best-of-n)."""
    settings = (
        prompts, config.seeds, config.steps, config.guidance_scale, config.eta,
        config.height, config.width, config.negative_prompt, config.batch_size,
    )  # fmt: skip
    lrm = _choosing_lrm(config, policy)
    if lrm is not None:
        yield from sample_searched(policy, lrm, config.policy.search, *settings)
        return
    for index, seed, picture in sample(policy, *settings):
        yield index, seed, picture, []


def _choosing_lrm(config: SampleConfig | TraceConfig, policy: Backbone) -> LatentRewardModel | None:
    """The LRM of the policy's search, ready; None without a search."""
    if config.policy.search is None:
        return None
    lrm = load_lrm(config.policy, policy, config.device, config.dtype, config.allow_latent_mismatch)
    lrm.tune(config)
    return lrm


def run_trace(config: TraceConfig, run: Run) -> int:
    """traces/seed<s>.safetensors, the finished pictures, and scores.json: scores of every LRM at every timestep."""
    prompt, search = config.text(), config.policy.search
    policy = load_policy(config.policy, config.device, config.dtype, config.allow_latent_mismatch)
    policy.tune(config)
    chooser, lrms = _choosing_lrm(config, policy), {}
    for name in config.lrm:
        lrms[name] = LatentRewardModel.from_pretrained(name, config.policy.base, config.device, config.dtype)
        require_fit(lrms[name], config.policy, policy, config.allow_latent_mismatch)
        lrms[name].tune(config)
    limits = step_thresholds(
        policy, config.steps, config.eta, config.threshold, config.threshold_min, config.threshold_max,
        policy.latent_shape(config.height, config.width),
    )  # fmt: skip
    followed = _follow(config, run, policy, chooser, lrms, limits)
    if followed is None:
        run.log("stopped; traces are not resumed, start again")
        return STOPPED
    (items, siblings), everyone = followed, None
    if search is not None and search.method == "best-of-n":
        _, chosen = best(chooser, items[-1]["next"], [prompt] * len(config.seeds))
        everyone, items = items, take(items, chosen)
    meta = {k: v for k, v in to_dict(config).items() if k in ("policy", "steps", "guidance_scale", "eta")}
    traces = collect(items, prompt, config.seeds, meta, everyone)
    (run.path / "traces").mkdir(exist_ok=True)
    for stored in traces:
        save_trace(stored, run.path / "traces" / f"seed{stored.seed}.safetensors")
        picture = to_pil(policy.decode(stored.x_t[-1:].to(policy.device)))[0]
        picture.save(run.samples / f"seed{stored.seed}.png")
    spent = costs(policy, search, config.steps, config.guidance_scale, config.eta, tuple(items[0]["x_t"].shape[1:]))
    scores = {
        "prompt": prompt,
        "seeds": list(config.seeds),
        "timesteps": traces[0].timesteps,
        "thresholds": limits,
        "scores": {name: [score_trace(lrm, stored) for stored in traces] for name, lrm in lrms.items()},
        "siblings": siblings if config.siblings or (search and search.method == "steps") else None,
        "candidates": {name: [score_candidates(lrm, stored) for stored in traces] for name, lrm in lrms.items()}
        if everyone
        else None,
        "evaluations_per_picture": {"policy": spent.policy, "lrm": spent.lrm},
    }
    write_json(run.path / "scores.json", scores)
    run.finish({"scores": "scores.json", "traces": [f"traces/seed{s.seed}.safetensors" for s in traces]})
    run.log(f"{len(traces)} trace{'s' * (len(traces) > 1)} in {run.path / 'traces'}; each took {spent.in_words()}")
    return 0


def _follow(
    config: TraceConfig,
    run: Run,
    policy: Backbone,
    chooser: LatentRewardModel | None,
    lrms: dict[str, LatentRewardModel],
    limits: list[float],
) -> tuple[list[dict], dict[str, list]] | None:
    """The steps as `trace` yields them, but without their siblings, and {LRM: what LPO would make of these at each}.
    Scores go into metrics.jsonl as they come. None if a stop is asked for."""
    items, siblings = [], {name: [] for name in lrms}
    steps = trace(
        policy, config.prompt, config.seeds, config.steps, config.guidance_scale, config.eta, config.siblings,
        config.height, config.width, config.negative_prompt, config.policy.search, chooser,
    )  # fmt: skip
    for item in steps:
        scores = {name: score_step(lrm, item, config.prompt) for name, lrm in lrms.items()}
        for name, lrm in lrms.items():
            siblings[name].append(score_siblings(lrm, item, config.prompt, limits[item["step"]], config.score_timestep))
        items.append({**item, "siblings": None})
        run.record({"step": item["step"] + 1, "total": config.steps, "t": item["t"], "scores": scores})
        if run.stop_requested:
            return None
    return items, siblings
