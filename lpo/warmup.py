"""Warms up a latent reward model for Scenes without a single label, so that curves mean something before the first vote
and few votes go far. The LRM that ships with Scenes was made by

    python -m lpo.warmup --model lpo/scenes/weights/model --out runs/warmup --minutes 42

Its trunk starts as the model's own down and mid blocks, its text encoder as the model's. It then learns which of two
captions made which of two pictures (symmetric InfoNCE over 2 x 2 hard negatives), and which of two pictures of one
caption was drawn carelessly, at all timesteps, on rendered, edited and generated pictures (lpo/warmup_pictures.py).
Held-out captions and the judge are not involved. A stopped run goes on where it was; the learning rate follows the
clock, so it always decays however busy the machine is. OUT/lrm is the result, OUT/log.jsonl the record.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lpo import rng
from lpo.backbones import Backbone, Features, load_policy
from lpo.backbones.latent_space import require_same
from lpo.backbones.unet import early_features
from lpo.calibration import fit_temperature
from lpo.config import ConfigError, LRMConfig, Policy
from lpo.data import prompt_hash
from lpo.preflight import require_base, require_startable
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import require_writable
from lpo.scenes.progress import Log
from lpo.warmup_pictures import KINDS, ORDERED, Pool, pool

CHUNKS = {"other": 40, "rendered": 120, "warped": 64, "spoilt": 24, "edited": 12, "generated": 48, "weak": 16}  # of 48
EASY = {"other": 7, "rendered": 2, "warped": 1, "spoilt": 1, "edited": 1, "generated": 2, "weak": 1}  # pairs a step
HARD = {"other": 1, "rendered": 4, "warped": 2, "spoilt": 1, "edited": 1, "generated": 5, "weak": 1}  # after EASY_SHARE
EASY_SHARE = 0.2
UNSEEN_SEED = 1  # pools of this seed are only measured on
TIMESTEPS = (1, 201, 401, 601, 801, 951)
WEAK_TARGET = 0.9  # a careless drawing is now and then the better one
HEADS = ("visual_projection", "text_projection", "logit_scale")
LEARNING_RATES = {"heads": 1e-3, "unet": 5e-4, "text_encoder": 5e-5}  # the text encoder already knows its captions
WEIGHT_DECAY, EMA = 0.01, 0.998
FIT_PAIRS, RIDGE = 1200, 0.3
FIRST_T_MAX, HOLD_T = 400, 0.3  # t below 400 for the first part, then growing to all: little noise teaches faster

Captions = list[tuple[str, str]]


def noised(backbone: Backbone, one: Pool, t: torch.Tensor, *key: int | str) -> torch.Tensor:
    """(N, 2, C, h, w): both pictures of each pair at timestep t[n], each with its own keyed noise."""
    t = t.repeat_interleave(2)
    noise = rng.normal(tuple(one.latents.shape), *key).flatten(0, 1)
    noisy = backbone.process.add_noise(one.latents.flatten(0, 1), noise, t)
    return noisy.unflatten(0, (-1, 2))


def read(
    lrm: LatentRewardModel, pictures: torch.Tensor, t: torch.Tensor, captions: Captions
) -> tuple[Features, torch.Tensor]:
    """Features of noisy pairs (N, 2, C, h, w), every picture read with both captions, and pooled text: 4 N rows each.

    The unconditional branch does not read the caption, so it runs once a picture: 6 rows a pair instead of 8.
    """
    n = len(pictures)
    pictures, t = pictures.flatten(0, 1).to(lrm.device), t.to(lrm.device).repeat_interleave(2)
    text = lrm.encode_text([caption for pair in captions for _ in range(2) for caption in pair])
    empty = lrm.encode_text([""]).states.expand(2 * n, -1, -1)
    down, mid = early_features(lrm.unet, torch.cat([pictures.repeat_interleave(2, dim=0), pictures]),
                               torch.cat([t.repeat_interleave(2), t]), torch.cat([text.states, empty]))
    alone = mid[4 * n:].repeat_interleave(2, dim=0)
    return Features([level[:4 * n] for level in down], mid[:4 * n], alone), text.pooled


def scores(lrm: LatentRewardModel, pictures: torch.Tensor, t: torch.Tensor, captions: Captions) -> torch.Tensor:
    """(N, 2, 2) scores of noisy pairs (N, 2, C, h, w): [n, i, j] is picture i of pair n read with its caption j."""
    features, pooled = read(lrm, pictures, t, captions)
    cosine = F.cosine_similarity(lrm.image_features(features), lrm.text_features(pooled), dim=-1)
    return (lrm.logit_scale.exp() * cosine).view(-1, 2, 2)


@torch.no_grad()
def fit_heads(lrm: LatentRewardModel, backbone: Backbone, pools: Sequence[Pool], pairs: int, seed: int) -> float:
    """Starts the visual projection where a linear reader of the untrained trunk would: gradient steps from a random
    projection take hundreds of steps to get there. Returns the share that it tells apart of a tenth kept aside.

    Kernel ridge regression of match (+1) and mismatch (-1) on the products of picture features and text features; its
    solution M = sum_i a_i f_i e_i^T is a matrix, and f^T M e is the LRM's score before normalisation.
    """
    rows, texts = [], []
    share = pairs // len(pools)
    for kind, one in enumerate(pools):
        for start in range(0, min(share, len(one)), 24):
            part = Pool(one.latents[start:start + 24], one.captions[start:start + 24])
            t = rng.integers(FIRST_T_MAX, (len(part),), seed, "warmup-fit", kind, start)
            features, pooled = read(lrm, noised(backbone, part, t, seed, "warmup-fit", kind, start), t, part.captions)
            rows.append(lrm.guided(features).cpu())
            texts.append(lrm.text_features(pooled).cpu())
    raw, text = torch.cat(rows).double(), torch.cat(texts).double()
    text = text - text.mean(dim=0)  # what all captions share cannot tell them apart
    spread = raw.std(dim=0)
    features = (raw - raw.mean(dim=0)) / spread
    match = torch.tensor([1.0, -1.0, -1.0, 1.0]).double().repeat(len(raw) // 4)
    aside = torch.arange(len(raw)) % 40 >= 36
    f, e = features[~aside], text[~aside]
    kernel = (f @ f.T) * (e @ e.T)
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel)).double()
    weights = torch.linalg.solve(kernel + ridge, match[~aside])
    matrix = (f * weights[:, None]).T @ e  # (features, text)
    found = ((features[aside] @ matrix) * text[aside]).sum(dim=1).view(-1, 2, 2)
    visual = (matrix / spread[:, None]).T
    lrm.visual_projection.weight.copy_(visual / visual.norm() * lrm.visual_projection.weight.norm())
    right = torch.cat([found[:, 0, 0] > found[:, 1, 0], found[:, 1, 1] > found[:, 0, 1]])
    return right.double().mean().item()


def contrastive_loss(table: torch.Tensor) -> torch.Tensor:
    """(N,) symmetric InfoNCE of (N, 2, 2) scores with the right ones on the diagonal: over captions, over pictures."""
    target = torch.arange(2, device=table.device).expand(len(table), 2)
    both = [F.cross_entropy(one, target, reduction="none") for one in (table, table.transpose(1, 2))]
    return torch.stack(both).mean(dim=(0, 2))


def margins(lrm: LatentRewardModel, pictures: torch.Tensor, t: torch.Tensor, captions: Captions) -> torch.Tensor:
    """(N,) score of the first minus the second picture, both read with the first caption."""
    prompts = [caption for caption, _ in captions for _ in range(2)]
    return lrm.score(pictures.flatten(0, 1), t.repeat_interleave(2), prompts).view(-1, 2) @ torch.tensor([1.0, -1.0])


def losses(lrm: LatentRewardModel, backbone: Backbone, parts: dict[str, Pool], t_max: int, seed: int, step: int
           ) -> dict[str, torch.Tensor]:
    """The (N,) losses of every kind's pairs, each pair at its own timestep below `t_max`.

    Contrastive loss; of ORDERED kinds, whose two captions are one, the pair loss: the first picture is better. The
    kinds of one loss go through the network together.
    """
    found = {}
    for ordered in (False, True):
        kinds = [kind for kind in parts if (kind in ORDERED) == ordered]
        if not kinds:
            continue
        joint = Pool(torch.cat([parts[kind].latents for kind in kinds]),
                     [pair for kind in kinds for pair in parts[kind].captions])
        t = rng.integers(t_max, (len(joint),), seed, "warmup-t", ordered, step)
        pictures = noised(backbone, joint, t, seed, "warmup-noise", ordered, step)
        if ordered:
            margin = margins(lrm, pictures, t, joint.captions)
            rows = F.binary_cross_entropy_with_logits(margin, torch.full_like(margin, WEAK_TARGET), reduction="none")
        else:
            rows = contrastive_loss(scores(lrm, pictures, t, joint.captions))
        found |= dict(zip(kinds, rows.split([len(parts[kind]) for kind in kinds]), strict=True))
    return found


@torch.no_grad()
def unseen_margins(lrm: LatentRewardModel, backbone: Backbone, kind: str, one: Pool) -> torch.Tensor:
    """(T, N) margins of unseen pairs at TIMESTEPS, above 0 where the picture made for the caption wins."""
    rows = []
    for t in TIMESTEPS:
        times = torch.full((len(one),), t)
        rows.append(margins(lrm, noised(backbone, one, times, "warmup-eval", kind, t), times, one.captions).cpu())
    return torch.stack(rows)


def train(
    lrm: LatentRewardModel, backbone: Backbone, pools: dict[str, Pool], state: Path, minutes: float, seed: int, log: Log
) -> int:
    """Trains all weights until `minutes` have been spent, on from `state` if there is one. Leaves the LRM with the
    moving average of its weights and returns the steps taken."""
    lrm.set_trainable("full")
    lrm.unet.to(memory_format=torch.channels_last)  # a third less time a step on CPU
    weights = lrm.trainable_parameters()
    part_of = {name: "heads" if name.startswith(HEADS) else name.split(".")[0] for name in weights}
    groups = [{"params": [weights[name] for name in weights if part_of[name] == part], "peak": peak}
              for part, peak in LEARNING_RATES.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    step, spent = 0, 0.0
    if state.exists():
        stored = torch.load(state, weights_only=True)
        lrm.load_state_dict(stored["weights"], strict=False)
        optimizer.load_state_dict(stored["optimizer"])
        average, step, spent = stored["average"], stored["step"], stored["seconds"]

    began = saved = time.monotonic()
    done = min(1.0, spent / (60 * minutes))
    while done < 1.0:
        factor = min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        t_max = int(FIRST_T_MAX + (1000 - FIRST_T_MAX) * max(0.0, (done - HOLD_T) / (1 - HOLD_T)))
        parts = {}
        for kind in pools:
            count = (EASY if done < EASY_SHARE else HARD)[kind]
            picks = rng.integers(len(pools[kind]), (count,), seed, "warmup-pick", kind, step)
            parts[kind] = Pool(pools[kind].latents[picks], [pools[kind].captions[k] for k in picks.tolist()])
        found = losses(lrm, backbone, parts, t_max, seed, step)
        optimizer.zero_grad(set_to_none=True)
        torch.cat(list(found.values())).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for name, weight in weights.items():
                average[name].lerp_(weight, 1 - min(EMA, (1 + step) / (10 + step)))
        seconds = spent + time.monotonic() - began
        done = min(1.0, seconds / (60 * minutes))
        if step % 20 == 0 or done == 1:
            log("train", step=step, seconds=round(seconds, 1), t_max=t_max, norm=round(norm.item(), 3),
                **{kind: round(one.mean().item(), 4) for kind, one in found.items()})
        if time.monotonic() - saved > 60 or done == 1:
            saved = time.monotonic()
            stored = {"weights": {name: weight.detach() for name, weight in weights.items()}, "average": average,
                      "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            torch.save(stored, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    lrm.load_state_dict(average, strict=False)
    lrm.forget_texts()
    return step


def warm_up(model: str, out: Path, minutes: float, seed: int = 0, kinds: Sequence[str] = KINDS, init: str = "base",
            chunks: dict[str, int] = CHUNKS) -> Path:
    """Makes the pools, trains for `minutes` of wall time in all, and returns the folder of the finished LRM.

    `init` is 'base' (the model's own blocks) or the LRM folder of an earlier warm-up on the same latents. Raises
    ConfigError with one sentence before anything is made.
    """
    if not minutes > 0:
        raise ConfigError(f"Nothing can be learned in {minutes} minutes: give more than 0.")
    require_base(model)
    if init != "base":
        require_startable(LRMConfig(base=model, init=init))
    require_writable(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.pt"
    backbone = load_policy(Policy(base=model))
    log = Log(out / "log.jsonl")
    began = time.monotonic()
    pools = {kind: pool(backbone, out / "pool", kind, seed, chunks[kind]) for kind in kinds}
    unseen = {kind: pool(backbone, out / "pool", kind, seed + UNSEEN_SEED, 2) for kind in kinds}
    log("pools", seconds=round(time.monotonic() - began, 1), pairs={kind: len(one) for kind, one in pools.items()})

    if init == "base":
        lrm, known = LatentRewardModel.from_base(model, seed=seed), []
        if not state.exists():
            contrasts = [pools[kind] for kind in kinds if kind not in ORDERED]
            log("heads", told_apart=round(fit_heads(lrm, backbone, contrasts, FIT_PAIRS, seed), 3))
    else:
        lrm = LatentRewardModel.from_pretrained(init, model)
        require_same(lrm.fingerprint, backbone.fingerprint(), init, model, False)
        lrm.temperature, known = 1.0, lrm.meta.get("training_prompts", [])
    step = train(lrm, backbone, pools, state, minutes, seed, log)
    margin = {kind: unseen_margins(lrm, backbone, kind, one) for kind, one in unseen.items()}
    accuracy = {kind: {str(t): round((row > 0).double().mean().item(), 3)
                       for t, row in zip(TIMESTEPS, one, strict=True)} for kind, one in margin.items()}
    # what is scored later are the model's own drawings, so the temperature is theirs
    generated = margin.get("generated", margin[kinds[0]]).double().numpy().reshape(-1)
    lrm.temperature = fit_temperature(generated, np.ones(len(generated)), np.ones(len(generated)))
    log("done", step=step, temperature=round(lrm.temperature, 4), unseen_accuracy=accuracy)
    prompts = {prompt_hash(text) for one in pools.values() for pair in one.captions for text in pair} | set(known)
    lrm.save(out / "lrm", {"base": "scenes", "init": init, "step": step, "minutes": minutes, "seed": seed,
                           "pairs": {kind: len(one) for kind, one in pools.items()}, "unseen_accuracy": accuracy,
                           "training_prompts": sorted(prompts)}, dtype="float16")
    return out / "lrm"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lpo.warmup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="scenes", help="Scenes model folder, or 'scenes' for the embedded one")
    parser.add_argument("--out", type=Path, required=True, help="run folder; a stopped run in it is continued")
    parser.add_argument("--minutes", type=float, default=20, help="training time, without the making of pictures")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of pictures to learn from")
    parser.add_argument("--init", default="base", help="'base', or the LRM folder of an earlier warm-up to go on from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        print(warm_up(args.model, args.out, args.minutes, args.seed, args.kinds, args.init))
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
