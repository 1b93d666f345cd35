"""LPO beside Diffusion-DPO: the same labels, the same LoRA, the same held-out pictures.

    python -m benchmarks.study_dpo --out study        # after `make study`, whose labels and pictures it reads

Diffusion-DPO (Wallace et al., CVPR 2024, arXiv 2311.12908, eq. 14) trains the generator on the labelled pictures
themselves, each noised to one random timestep; no reward model is learned and nothing is sampled. It is given every
advantage: a grid of settings on the first annotator, of which the one that wins most often is taken for all annotators,
on pictures that are then reported, against LPO's one setting. Ties are left out, as its authors do.

Minutes are those of one core's work, whatever else the machine does; LRM and LPO are trained again for them. Adapters
lie under OUT/dpo, pictures under OUT/pictures/dpo-*; an interrupted run goes on with the next of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from app.statistics import paired_difference, win_rate
from benchmarks.study import PLANS, TASTES, Study, run_trainer, vote, write
from benchmarks.study_report import OUTCOMES, signed
from lpo import rng
from lpo.backbones import Backbone, load_policy
from lpo.config import LPOConfig, Policy, from_preset
from lpo.data import load_picture
from lpo.scenes.judge import judge, style_score

GRID_PROMPTS = 50  # of the grid: one picture each


@dataclass(frozen=True)
class Setting:
    """One cell of the grid. beta is the published one, of errors averaged over C, H, W: 2000 at 4 x 64 x 64 pulls as
    strongly on a nat as 125 at Scenes' 4 x 16 x 16."""

    beta: float
    lr: float
    steps: int

    def __str__(self) -> str:
        return f"beta {self.beta:g}, lr {self.lr:g}, {self.steps} steps"


def dpo_loss(winner: Tensor, loser: Tensor, winner_reference: Tensor, loser_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO per pair: -log sigmoid(-beta / 2 ((e_w - e_w,ref) - (e_l - e_l,ref))), all (B,).

    e is the squared error of a predicted noise, averaged over C, H, W, of the policy or the reference.
    """
    return -F.logsigmoid(-beta / 2 * ((winner - winner_reference) - (loser - loser_reference)))


def encode(backbone: Backbone, files: list[str]) -> Tensor:
    """Scaled posterior means (N, C, h, w) of picture files."""
    size = Image.open(files[0]).size[::-1]
    pixels = torch.stack([load_picture(file, size) for file in files])
    with torch.no_grad():
        return torch.cat([backbone.encode(some)[0] for some in pixels.split(64)])


def train(labels: list[dict], beta: float, lr: float, stops: list[int], batch: int, seed: int, folder: Path) -> None:
    """Adapters `folder`/<step> at every one of `stops`, and seconds.json: what each took of one core, loading apart.

    labels: {"prompt", "first", "second": picture files, "target"}.
    """
    preset = from_preset(LPOConfig, "scenes")
    backbone = load_policy(Policy("scenes"))
    backbone.add_trainable_adapter(preset.lora_rank, preset.lora_targets, seed)
    weights = list(backbone.trainable_parameters().values())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=preset.weight_decay)
    started, seconds, order = time.process_time(), {}, []
    sure = [label for label in labels if label["target"] != 0.5]
    names = ("first", "second")
    best = [names if label["target"] > 0.5 else names[::-1] for label in sure]
    latents = [encode(backbone, [label[each[i]] for label, each in zip(sure, best, strict=True)]) for i in range(2)]
    for step in range(1, max(stops) + 1):
        while len(order) < batch:
            order += rng.permutation(len(sure), seed, "dpo", step, len(order))
        rows, order = order[:batch], order[batch:]
        text = backbone.encode_prompts([sure[row]["prompt"] for row in rows])
        noise = rng.normal((batch, *latents[0].shape[1:]), seed, "dpo noise", step).repeat(2, 1, 1, 1)  # one of a pair
        t = rng.integers(1000, (batch,), seed, "dpo t", step).repeat(2)
        noisy = backbone.process.add_noise(torch.cat([side[rows] for side in latents]), noise, t)
        text = text.rows([*range(batch), *range(batch)])
        errors = (backbone.predict(noisy, t, text, 1.0) - noise).pow(2).mean((1, 2, 3))
        with torch.no_grad(), backbone.reference():
            reference = (backbone.predict(noisy, t, text, 1.0) - noise).pow(2).mean((1, 2, 3))
        loss = dpo_loss(*errors.chunk(2), *reference.chunk(2), beta).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, preset.max_grad_norm)
        optimizer.step()
        if step in stops:
            backbone.save_adapter(folder / str(step))
            seconds[step] = time.process_time() - started
            print(f"{time.strftime('%H:%M:%S')} {folder.name}: step {step}, loss {loss.item():.3f}", flush=True)
    write(folder / "seconds.json", seconds)


class Comparison:
    """Diffusion-DPO on the annotators of a study."""

    def __init__(self, study: Study, taste: str, stops: list[int], batch: int):
        self.study, self.taste, self.stops, self.batch = study, taste, stops, batch

    def adapter(self, setting: Setting, annotator: int) -> tuple[Path, float]:
        """The adapter's folder, and the seconds that its training took."""
        folder = self.study.out / "dpo" / f"{self.taste}-{setting.beta:g}-{setting.lr:g}-{annotator}"
        if not (folder / "seconds.json").exists():
            labels = self.study.labels(self.taste, annotator, self.study.plan.lpo_labels)
            labels = [label for label in labels if label["split"] == "train"]
            train(labels, setting.beta, setting.lr, self.stops, self.batch, annotator, folder)
        return folder / str(setting.steps), json.loads((folder / "seconds.json").read_text())[str(setting.steps)]

    def pictures(self, setting: Setting, annotator: int, prompts: int, seeds: int) -> Path:
        path, _ = self.adapter(setting, annotator)
        texts = self.study.prompts["heldout"][:prompts]
        name = f"dpo-{path.parent.name}-{setting.steps}-{prompts}x{seeds}"
        return self.study.pictures(name, texts, [list(range(seeds))] * prompts, path)

    def against_base(self, folder: Path, prompts: int, seeds: int) -> dict:
        """Of every held-out picture and the base's of the same seed: prompts, style and judge of both, and who wins."""
        found: dict = {"prompts": [], "style": [], "judge": [], "won": []}
        base, generator = self.study.out / "pictures" / "heldout-base", np.random.default_rng(0)
        for i, seed in itertools.product(range(prompts), range(seeds)):
            text, name = self.study.prompts["heldout"][i], f"{i:06d}_{seed}.png"
            pair = [Image.open(where / name).convert("RGB") for where in (folder, base)]
            found["prompts"].append(text)
            found["style"].append([style_score(picture) for picture in pair])
            found["judge"].append([judge(picture, text).score for picture in pair])
            chosen = vote(self.taste, {"first": folder / name, "second": base / name, "prompt": text}, generator, 0.0)
            found["won"].append((text, OUTCOMES[chosen]))
        return found

    def lpo_seconds(self, annotator: int) -> float:
        """What LRM and LPO take of one core, the start of their processes included: trained again for this alone."""
        out, plan = self.study.out, self.study.plan
        lrm, lpo = (out / "dpo" / f"{kind}-{self.taste}-{annotator}" for kind in ("lrm", "lpo"))
        file = lpo / "seconds.json"
        if not file.exists():
            pairs = out / "lrm" / f"{self.taste}-{plan.lpo_labels}-{annotator}.jsonl"
            data = {"pairs": pairs.resolve(), "latent_cache": (out / "dpo" / "latents").resolve(), "seed": annotator}
            judged = {"lrm": (lrm / "checkpoints" / "final").resolve(), "seed": annotator}
            prompts = {"prompts": (out / "train-prompts.json").resolve()}
            before = _children()
            run_trainer("train-lrm", lrm, plan.lrm | data)
            run_trainer("train-lpo", lpo, plan.lpo | judged | prompts)
            write(file, _children() - before)
        return json.loads(file.read_text())


def _children() -> float:
    """Seconds of one core that the processes took which this one has started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(name: str, found: list[dict], seconds: float) -> str:
    """A row of the table, over all annotators: their pictures side by side, of one prompt in one cluster."""
    prompts = [prompt for one in found for prompt in one["prompts"]]
    style, judged = (np.concatenate([one[key] for one in found]) for key in ("style", "judge"))
    spread = style[:, 1].std()
    won = win_rate([vote for one in found for vote in one["won"]])
    cells = [
        name,
        signed(paired_difference(style[:, 0] / spread, style[:, 1] / spread, prompts)),
        signed(paired_difference(judged[:, 0], judged[:, 1], prompts)),
        f"{won.rate:.2f} ({won.low:.2f}–{won.high:.2f})",
        f"{seconds / 60:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full", help="of the study in --out")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the study")
    parser.add_argument("--taste", choices=TASTES, default="style", help="of the simulated annotators")
    parser.add_argument("--beta", type=float, nargs="+", default=[125.0, 500.0])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 400], help="optimiser steps")
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimiser step")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts that are reported")
    parser.add_argument("--seeds", type=int, default=2, help="pictures per held-out prompt")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    study = Study(args.out, PLANS[args.plan], threads=1)
    comparison, annotators = Comparison(study, args.taste, args.steps, args.batch), study.plan.lpo_seeds
    head = "| | style, in sd of the base | judge | win rate | minutes |\n|---|---|---|---|---|"

    grid = [Setting(*cell) for cell in itertools.product(args.beta, args.lr, args.steps)]
    few, wins = min(GRID_PROMPTS, args.prompts), {}
    print(f"Annotator {annotators[0]}, {few} prompts:\n\n{head}")
    for setting in grid:
        folder = comparison.pictures(setting, annotators[0], few, 1)
        found = comparison.against_base(folder, few, 1)
        wins[setting] = win_rate(found["won"]).rate
        print(line(f"Diffusion-DPO, {setting}", [found], comparison.adapter(setting, annotators[0])[1]), flush=True)

    best = max(wins, key=wins.get)
    size = args.prompts, args.seeds
    ours = [comparison.against_base(study.out / "pictures" / f"heldout-{args.taste}-{a}", *size) for a in annotators]
    theirs = [comparison.against_base(comparison.pictures(best, a, *size), *size) for a in annotators]
    print(f"\n{len(annotators)} annotators, {args.prompts} prompts, {args.seeds} pictures each:\n\n{head}")
    print(line("LRM + LPO", ours, np.mean([comparison.lpo_seconds(a) for a in annotators])))
    print(line(f"Diffusion-DPO, {best}", theirs, np.mean([comparison.adapter(best, a)[1] for a in annotators])))


if __name__ == "__main__":
    main()
