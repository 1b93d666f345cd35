"""Does the loop work? Simulated annotators label generated pictures, an LRM learns from them, LPO follows the LRM, and
pictures of prompts that none of them ever saw are judged against the base.

    python -m benchmarks.study --plan full --out study        # `make study`
    python -m benchmarks.study --plan quick --out study-quick # `make study QUICK=1`, part of the tests

Every part is cached under --out by a file that is written last, so an interrupted study goes on where it stopped; the
trainers run as `python -m lpo ...` and resume by themselves. The report is study_report.py's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from lpo.scenes.judge import judge, simulated_vote, style_score
from lpo.scenes.world import parse_caption

TASTES = ("alignment", "style")
NOISE = 0.1  # share of a simulated annotator's answers that are random
PROMPTS = Path(__file__).parents[1] / "lpo" / "scenes" / "prompts.json"
TARGETS = {"first": 1.0, "tie": 0.5, "second": 0.0}
TIMESTEPS = (1, 101, 201, 301, 401, 501, 601, 701, 801, 901)


@dataclass(frozen=True)
class Plan:
    """How much of everything. `sizes` are numbers of labels (0 is the warm start itself); seeds name annotators, LRMs
    and LPO runs alike; `lrm` and `lpo` are overrides of the `scenes` presets."""

    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    heldout_pairs: int
    prompts: int
    seeds_per_prompt: int
    lpo_labels: int
    lpo_seeds: tuple[int, ...]
    lrm: dict = field(default_factory=dict)
    lpo: dict = field(default_factory=dict)
    tastes: tuple[str, ...] = TASTES


FROM_BASE = {"init": "base", "fit_start": "false", "steps": 300, "batch_size": 32, "warmup_steps": 30, "max_epochs": 0}
PLANS = {
    "full": Plan((0, 25, 50, 100, 200, 800), (0, 1, 2), 400, 300, 4, 200, (0, 1, 2)),
    "medium": Plan((0, 50, 200, 800), (0, 1, 2), 400, 300, 2, 200, (0, 1)),
    "longer": Plan((0, 200), (0, 1), 400, 300, 2, 200, (0,), lpo={"iterations": 100}, tastes=("alignment",)),
    "short": Plan((0, 50, 200), (0, 1), 200, 100, 2, 200, (0,)),
    "style": Plan((200,), (0,), 200, 100, 2, 200, (0,), FROM_BASE, tastes=("style",)),
    # what learns from 200 labels, beside the preset's full: LoRA on the trunk, or the heads alone
    "lora": Plan((0, 200), (0, 1), 400, 0, 0, 200, (), {"train": "lora", "lr": 3e-4}),
    "heads": Plan((0, 200), (0, 1), 400, 0, 0, 200, (), {"train": "heads", "lr": 3e-4}),
    # the fewest labels, with as many steps as many labels take: --plan few --lrm max_epochs=0 --out study-few
    "few": Plan((0, 25), (0, 1, 2), 400, 0, 0, 25, ()),
    # what one setting of LPO brings: --plan setting --lpo antithetic=true --out study-antithetic
    "setting": Plan((200,), (0, 1), 400, 100, 2, 200, (0,), tastes=("style",)),
    "quick": Plan(
        (0, 16),
        (0, 1),
        12,
        4,
        1,
        16,
        (0,),
        {"steps": 4, "batch_size": 8, "warmup_steps": 1},
        {"iterations": 2, "prompts_per_iteration": 2, "eval_every": 100, "save_every": 100},
    ),
}


class Study:
    """One study in one folder. Each method makes one part and returns where it lies, or what was measured."""

    def __init__(self, out: Path, plan: Plan, threads: int | None = None):
        self.out, self.plan = out, plan
        self.prompts = json.loads(PROMPTS.read_text())
        out.mkdir(parents=True, exist_ok=True)
        stamp, wanted = out / "plan.json", json.loads(json.dumps(asdict(plan)))
        if stamp.exists() and json.loads(stamp.read_text()) != wanted:
            raise SystemExit(f"{out} holds a study of another plan: choose another --out or remove the folder.")
        write(stamp, wanted)
        if threads:
            import torch

            torch.set_num_threads(threads)

    # --- pictures and labels ------------------------------------------------------------------------------------

    def pictures(self, name: str, prompts: list[str], seeds: list[list[int]], adapter: Path | None = None) -> Path:
        """`name/000012_3.png` (prompt 12, seed 3) for every prompt and its seeds, from the base or an adapter."""
        folder = self.out / "pictures" / name
        if (folder / "done.json").exists():
            return folder
        from lpo.backbones import load_policy
        from lpo.config import Adapter, Policy
        from lpo.sampling import sample

        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        backbone = load_policy(Policy("scenes", (Adapter(str(adapter)),) if adapter else ()))
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, own in enumerate(seeds):
            if any(not (folder / f"{index:06d}_{seed}.png").exists() for seed in own):
                groups.setdefault(tuple(own), []).append(index)
        for own, indices in groups.items():
            for start in range(0, len(indices), 8):
                chunk = indices[start : start + 8]
                for place, seed, picture in sample(backbone, [prompts[i] for i in chunk], list(own)):
                    picture.save(folder / f"{chunk[place]:06d}_{seed}.png")
                _say(f"{name}: {start + len(chunk)} of {len(indices)} prompts")
        write(folder / "done.json", {"seconds": time.monotonic() - started, "count": sum(map(len, seeds))})
        return folder

    def pool(self, split: str) -> list[dict]:
        """The pairs that are labelled: two pictures of the base for one prompt, other seeds each time round.

        Only prompts of two objects: of one object the base is right so often that alignment has nothing to prefer.
        """
        count = max(self.plan.sizes) if split == "train" else self.plan.heldout_pairs
        known = [prompt for prompt in self.prompts[split] if len(parse_caption(prompt).objects) == 2]
        prompts = [known[i % len(known)] for i in range(count)]
        offset = 10_000 if split == "train" else 20_000
        laps = [i // len(known) for i in range(count)]
        folder = self.pictures(f"pool-{split}", prompts, [[offset + 2 * lap, offset + 2 * lap + 1] for lap in laps])
        return [
            {
                "id": f"{split}-{i}",
                "prompt": prompt,
                "split": split,
                "weight": 1.0,
                "first": str((folder / f"{i:06d}_{offset + 2 * lap}.png").resolve()),
                "second": str((folder / f"{i:06d}_{offset + 2 * lap + 1}.png").resolve()),
            }
            for i, (prompt, lap) in enumerate(zip(prompts, laps, strict=True))
        ]

    def labels(self, taste: str, seed: int, count: int) -> list[dict]:
        """`count` noisy training labels of annotator `seed`, and every held-out pair with its noiseless verdict."""
        rng = np.random.default_rng([seed, TASTES.index(taste)])
        train = self.pool("train")
        chosen = [train[i] for i in rng.permutation(len(train))[:count]]
        return [
            {**pair, "target": TARGETS[vote(taste, pair, rng, noise)]}
            for pairs, noise in ((chosen, NOISE), (self.pool("heldout"), 0.0))
            for pair in pairs
        ]

    # --- reward models ------------------------------------------------------------------------------------------

    def reward_model(self, taste: str, count: int, seed: int) -> Path:
        """The LRM folder trained on `count` labels of annotator `seed`; the shipped warm LRM for 0."""
        if count == 0:
            return Path("scenes")
        run = self.out / "lrm" / f"{taste}-{count}-{seed}"
        if not (run / "result.json").exists():
            run.parent.mkdir(parents=True, exist_ok=True)
            lines = run.parent / f"{run.name}.jsonl"
            labels = [pair for pair in self.labels(taste, seed, count) if pair["split"] == "train"]
            lines.write_text("".join(json.dumps(pair) + "\n" for pair in labels))
            files = {"pairs": str(lines.resolve()), "latent_cache": str((self.out / "latents").resolve())}
            run_trainer("train-lrm", run, {**self.plan.lrm, **files, "seed": seed})
        return run / "checkpoints" / "final"

    def accuracy(self, taste: str, count: int, seed: int) -> dict:
        """Per timestep: is the picture preferred that the noiseless annotator prefers? Ties are left out."""
        file = self.out / "accuracy" / f"{taste}-{count}-{seed}.json"
        if file.exists():
            return json.loads(file.read_text())
        pairs = [p for p in self.labels(taste, seed, 0) if p["target"] != 0.5]
        margins = self._margins(self.reward_model(taste, count, seed), pairs)
        signs = np.array([1.0 if p["target"] == 1.0 else -1.0 for p in pairs])
        correct = (margins * signs > 0) + 0.5 * (margins == 0)
        result = {"timesteps": list(TIMESTEPS), "prompts": [p["prompt"] for p in pairs], "correct": correct.tolist()}
        write(file, result)
        return result

    def _margins(self, lrm: Path, pairs: list[dict]) -> np.ndarray:
        """(T, N) margins first − second, both pictures under independent keyed noise at every timestep."""
        first = self._scores(lrm, [p["first"] for p in pairs], [p["prompt"] for p in pairs])
        second = self._scores(lrm, [p["second"] for p in pairs], [p["prompt"] for p in pairs])
        return first - second

    def _scores(
        self, path: Path, files: list[str], prompts: list[str], timesteps: tuple[int, ...] = TIMESTEPS
    ) -> np.ndarray:
        """(T, N) scores of picture files for their prompts, each noised to every timestep."""
        import torch

        from lpo import rng
        from lpo.backbones import load_policy
        from lpo.config import Policy
        from lpo.reward_model import LatentRewardModel

        backbone, lrm = load_policy(Policy("scenes")), LatentRewardModel.from_pretrained(str(path))
        rows = []
        with torch.no_grad():
            for start in range(0, len(files), 64):
                names, texts = files[start : start + 64], prompts[start : start + 64]
                stack = np.stack([np.asarray(Image.open(name).convert("RGB")) for name in names])
                pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1
                clean = backbone.encode(pixels)[0]  # (B, C, h, w) posterior means
                for t in timesteps:
                    noise = torch.stack(
                        [rng.normal(tuple(clean.shape[1:]), "study", Path(name).stem, t) for name in names]
                    )
                    noisy = backbone.process.add_noise(clean, noise, t)
                    rows.append(lrm.score(noisy, torch.full((len(names),), t), texts).cpu().numpy())
        count = len(timesteps)
        return np.stack([np.concatenate(rows[i::count]) for i in range(count)])

    # --- policies -----------------------------------------------------------------------------------------------

    def adapter(self, taste: str, seed: int) -> Path:
        """The LPO adapter that follows the LRM of `lpo_labels` labels of annotator `seed`."""
        run = self.out / "lpo" / f"{taste}-{seed}"
        if not (run / "result.json").exists():
            run.parent.mkdir(parents=True, exist_ok=True)
            prompts, lrm = self.out / "train-prompts.json", self.reward_model(taste, self.plan.lpo_labels, seed)
            write(prompts, self.prompts["train"])
            overrides = {"lrm": str(lrm.resolve()), "prompts": str(prompts.resolve()), "seed": seed}
            run_trainer("train-lpo", run, {**self.plan.lpo, **overrides})
        return run / "checkpoints" / "final"

    def verdict(self, taste: str, seed: int) -> dict:
        """Judge, style and LRM scores of base and adapter on held-out prompts × shared seeds, and pair winners."""
        file = self.out / "verdict" / f"{taste}-{seed}.json"
        if file.exists():
            return json.loads(file.read_text())
        plan, prompts = self.plan, self.prompts["heldout"][: self.plan.prompts]
        seeds = [list(range(plan.seeds_per_prompt)) for _ in prompts]
        folders = {
            "base": self.pictures("heldout-base", prompts, seeds),
            "lpo": self.pictures(f"heldout-{taste}-{seed}", prompts, seeds, self.adapter(taste, seed)),
        }
        names = [f"{i:06d}_{s}.png" for i, own in enumerate(seeds) for s in own]
        texts = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        other = next(s for s in (*plan.seeds, seed) if s != seed or len(plan.seeds) == 1)
        lrms = {
            "lrm": self.reward_model(taste, plan.lpo_labels, seed),
            "lrm_other": self.reward_model(taste, plan.lpo_labels, other),
        }
        result: dict = {"prompts": texts}
        for who, folder in folders.items():
            shown = [Image.open(folder / name).convert("RGB") for name in names]
            scores = {
                key: self._scores(lrm, [str(folder / n) for n in names], texts, (1,))[0].tolist()
                for key, lrm in lrms.items()
            }
            result[who] = {
                "judge": [judge(p, t).score for p, t in zip(shown, texts, strict=True)],
                "style": [style_score(p) for p in shown],
                **scores,
            }
        rng = np.random.default_rng([seed, 99])
        result["votes"] = [
            vote(taste, {"first": folders["lpo"] / n, "second": folders["base"] / n, "prompt": t}, rng, 0.0)
            for n, t in zip(names, texts, strict=True)
        ]
        write(file, result)
        return result

    def run(self) -> Iterator[tuple[str, str, int, int]]:
        """Everything, in an order that gives early answers; yields (part, taste, labels, seed) as each is finished."""
        for count in self.plan.sizes:
            for taste in self.plan.tastes:
                for seed in self.plan.seeds if count else self.plan.seeds[:1]:
                    self.accuracy(taste, count, seed)
                    yield "accuracy", taste, count, seed
        for seed in self.plan.lpo_seeds:
            for taste in self.plan.tastes:
                self.verdict(taste, seed)
                yield "verdict", taste, self.plan.lpo_labels, seed


def vote(taste: str, pair: dict, rng: np.random.Generator, noise: float) -> str:
    """What a simulated annotator says to two picture files: first, second or tie."""
    first, second = (Image.open(pair[side]).convert("RGB") for side in ("first", "second"))
    return simulated_vote(taste, first, second, pair["prompt"], rng, noise)


def run_trainer(command: str, run: Path, overrides: dict) -> None:
    """Run or resume one trainer through the command line, with the `scenes` preset and `overrides`."""
    call = [sys.executable, "-m", "lpo", command, "--run-dir", str(run)]
    if (run / "config.json").exists():
        call += ["--resume"]
    else:
        call += ["--preset", "scenes"] + [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    _say(f"{command} {run.name}")
    done = subprocess.run(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(call)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def write(file: Path, data: dict | list) -> None:
    """JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data))
    partial.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full", help="how much of everything")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the study; a half-done one goes on")
    for what in ("lrm", "lpo"):
        parser.add_argument(f"--{what}", nargs="*", default=[], metavar="FIELD=VALUE", help="beside the preset")
    parser.add_argument("--threads", type=int, help="torch threads of this process (default: torch's own)")
    args = parser.parse_args()
    plan = PLANS[args.plan]
    lrm, lpo = (dict(setting.split("=", 1) for setting in settings) for settings in (args.lrm, args.lpo))
    plan = replace(plan, lrm=plan.lrm | lrm, lpo=plan.lpo | lpo)
    study = Study(args.out, plan, args.threads)
    started = time.monotonic()
    for part, taste, labels, seed in study.run():
        _say(f"done: {part} {taste} labels {labels} seed {seed} ({(time.monotonic() - started) / 60:.1f} min)")
    from benchmarks.study_report import write_report

    print(write_report(args.out, plan))


if __name__ == "__main__":
    main()
