"""What does an LRM bring without any training? Judge and style score on Scenes, base against search, same seeds.

    python -m benchmarks.search --prompts 100 --seeds 1 --out search-bench  # with the shipped warm LRM
    python -m benchmarks.search --lrm runs/lrm/checkpoints/final --policies base best-of-4 --out search-bench-mine

Prompts are held-out captions of two objects: of one object the base is right so often that alignment has nothing to
choose. All policies use eta 1, so candidate 0 of every search is the base's picture of that seed. Each picture's scores
are written as they come, and a second call goes on. Intervals are paired bootstraps clustered by prompt. An LRM's own
score is in-sample for the search that it guides: it says how far the search went, not whether the pictures are better.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

from app.statistics import paired_difference
from lpo.backbones import load_policy
from lpo.config import Policy, Search
from lpo.reward_model import LatentRewardModel
from lpo.sampling import sample_latents, to_pil
from lpo.scenes.judge import judge, style_score
from lpo.scenes.world import parse_caption
from lpo.search import FINISHED_T, candidate_rows, costs, require_fit, search_latents

PROMPTS = Path(__file__).parents[1] / "lpo" / "scenes" / "prompts.json"
STEPS, GUIDANCE, ETA, BATCH = 20, 5.0, 1.0, 8
SEARCHES: dict[str, dict | None] = {
    "base": None,
    "best-of-4": {"method": "best-of-n", "candidates": 4},
    "steps-4": {"method": "steps", "candidates": 4},
    "steps-4-t600": {"method": "steps", "candidates": 4, "t_max": 600},
}
CEILING = "ceiling-of-4"
MEASURES = ("judge", "style", "lrm")


def search_of(name: str, lrm_path: str) -> Search | None:
    how = SEARCHES.get(name)
    return None if how is None else Search(lrm=lrm_path, **how)


def prompts_of(count: int) -> list[str]:
    """`count` held-out prompts of two objects, the same ones every time."""
    known = [p for p in json.loads(PROMPTS.read_text())["heldout"] if len(parse_caption(p).objects) == 2]
    random.Random("search").shuffle(known)
    if count > len(known):
        raise SystemExit(f"There are {len(known)} held-out prompts of two objects; --prompts is {count}.")
    return known[:count]


def measure(name: str, rows: list[tuple[int, str]], lrm_path: str, out: Path) -> list[dict]:
    """One JSON line per (seed, prompt) in out/<name>.jsonl: the three scores and the seconds a picture took."""
    path = out / f"{name}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    missing = rows[len(done) :]
    if not missing:
        return done
    search, together = search_of(name, lrm_path), SEARCHES["best-of-4"]["candidates"] if name == CEILING else 1
    policy = Policy("scenes", search=search)
    backbone, lrm = load_policy(policy), LatentRewardModel.from_pretrained(lrm_path, "scenes")
    require_fit(lrm, policy, backbone)
    settings = backbone.latent_shape(), STEPS, GUIDANCE, ETA
    with open(path, "a") as file:
        for start in range(0, len(missing), BATCH):
            part, began = missing[start : start + BATCH], time.monotonic()
            if search is None:
                everyone = candidate_rows(part, together)
                groups = [everyone[i : i + BATCH] for i in range(0, len(everyone), BATCH)]
                latents = torch.cat([sample_latents(backbone, group, *settings) for group in groups])
            else:
                latents = search_latents(backbone, lrm, search, part, *settings, batch_size=BATCH).latents
            seconds = (time.monotonic() - began) / len(part)
            scores = lrm.score(latents, FINISHED_T, [prompt for _, prompt in part] * together, BATCH).tolist()
            pictures = to_pil(torch.cat([backbone.decode(some) for some in latents.split(BATCH)]))
            for place, (seed, prompt) in enumerate(part):
                own = range(place, len(latents), len(part))
                found = {
                    "judge": max(judge(pictures[i], prompt).score for i in own),
                    "style": max(style_score(pictures[i]) for i in own),
                    "lrm": max(scores[i] for i in own),
                }
                line = {"prompt": prompt, "seed": seed, **found, "seconds": seconds}
                file.write(json.dumps(line) + "\n")
                done.append(line)
            file.flush()
            print(f"{name}: {len(done)} of {len(rows)} pictures", flush=True)
    return done


def report(found: dict[str, list[dict]], lrm_path: str) -> str:
    """A Markdown table: means, the difference from the base with its interval, and what a picture takes."""
    backbone = load_policy(Policy("scenes"))
    lines = [
        "| policy | judge | style | LRM score (in-sample) | network evaluations | latents scored | s a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        cells = []
        for key in MEASURES:
            own, base = [r[key] for r in rows], [r[key] for r in found["base"]]
            cell = f"{sum(own) / len(own):.3f}"
            if name != "base":
                gap = paired_difference(own, base, [r["prompt"] for r in rows])
                cell += f", {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
            cells.append(cell)
        spent = costs(backbone, search_of(name, lrm_path), STEPS, GUIDANCE, ETA)
        seconds = sum(r["seconds"] for r in rows) / len(rows)
        takes = "| | " if name == CEILING else f"{spent.policy} | {spent.lrm} | {seconds:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {takes} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="how many held-out prompts of two objects")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--lrm", default="scenes", help="LRM folder that chooses; 'scenes' is the shipped warm one")
    parser.add_argument(
        "--policies", nargs="+", default=[*SEARCHES, CEILING], choices=[*SEARCHES, CEILING], help="base is always there"
    )
    parser.add_argument("--out", type=Path, default=Path("search-bench"), help="folder of the scores and the table")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = vars(arguments) | {"out": None, "policies": None}
    stamp = arguments.out / "asked.json"
    if stamp.exists() and json.loads(stamp.read_text()) != asked:
        raise SystemExit(f"{arguments.out} holds other prompts, seeds or another LRM: choose another --out.")
    stamp.write_text(json.dumps(asked))
    rows = [(seed, prompt) for prompt in prompts_of(arguments.prompts) for seed in range(arguments.seeds)]
    names = list(dict.fromkeys(["base", *arguments.policies]))
    found = {name: measure(name, rows, arguments.lrm, arguments.out) for name in names}
    table = report(found, arguments.lrm)
    (arguments.out / "table.md").write_text(table + "\n")
    print(f"{len(rows)} pictures a policy, {arguments.prompts} prompts; LRM {arguments.lrm}\n\n{table}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
