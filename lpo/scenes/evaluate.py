"""How good the Scenes model is, by the judge: generated pictures, reconstructions, and the judge itself.

    python -m lpo.scenes.evaluate --model lpo/scenes/weights/model --prompts 300 --seeds 0 --out report.json
    python -m lpo.scenes.evaluate --prompts 0 --renders 1000          # the judge on fresh renderings only

Held-out captions, 20 DDIM steps, guidance 5. Intervals are 95 % bootstraps over prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lpo.options import ConfigError
from lpo.run_dir import require_writable
from lpo.scenes.judge import CENTRES, Seen, judge, read, style_score, truth
from lpo.scenes.world import HELD_OUT_PAIRS, caption, prompts, render, sample_scene

MODEL = Path(__file__).parent / "weights" / "model"


def interval(groups: list[list[float]], draws: int = 2000, seed: int = 0) -> list[float]:
    """[mean, low, high]: mean over all values and its 95 % bootstrap interval, resampling whole groups (prompts)."""
    groups = [g for g in groups if g]
    sums, counts = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    pick = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    return [float(sums.sum() / counts.sum()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))]


def summary(found: list[list[dict[str, bool]]]) -> dict[str, list[float]]:
    """Scores per kind of attribute from the verdicts' `found`, one inner list per prompt."""
    kinds = ("shape1", "shape2", "colour1", "colour2", "size1", "size2", "relation", "background")
    report = {"all": interval([[v for f in group for v in f.values()] for group in found])}
    for kind in ("shape", "colour", "size", *kinds):
        values = [[f[k] for f in group for k in f if k.rstrip("12") == kind or k == kind] for group in found]
        if any(values):
            report[kind] = interval(values)
    for name, second in (("one object", False), ("two objects", True)):
        values = [[v for f in group for v in f.values()] for group in found if ("shape2" in group[0]) == second]
        if values:
            report[name] = interval(values)
    report["every claim right"] = interval([[all(f.values()) for f in group] for group in found])
    return report


def spoilt(picture: Image.Image, sigma: float, noise: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur of `sigma` pixels, then Gaussian noise of standard deviation `noise` (of 255)."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(sigma)), np.float32)
    return Image.fromarray((pixels + noise * rng.standard_normal(pixels.shape)).clip(0, 255).round().astype(np.uint8))


def judge_on_renders(count: int, seed: int = 1) -> dict:
    """Accuracy per attribute and confusions of the judge on fresh scenes, plain and spoilt; correlation of style."""
    report = {}
    for name, sigma, noise in (("plain", 0, 0), ("blur 0.7 px", 0.7, 0), ("noise 4", 0, 4), ("blur and noise", 0.7, 4)):
        rng = np.random.default_rng((seed, 9))
        hits: dict[str, list[bool]] = {}
        confusion: dict[str, dict[str, int]] = {}
        styles = []
        for _ in range(count):
            scene = sample_scene(rng, held_out_pairs=rng.random() < 0.2)
            picture = spoilt(render(scene), sigma, noise, rng)
            seen, real = read(picture), truth(scene)
            styles.append((scene.style, style_score(picture)))
            for kind, got, want in _answers(seen, real):
                hits.setdefault(kind, []).append(got == want)
                if got != want:
                    row = confusion.setdefault(kind, {})
                    row[f"{want} read as {got}"] = row.get(f"{want} read as {got}", 0) + 1
        accuracy = {kind: float(np.mean(h)) for kind, h in hits.items()}
        r = float(np.corrcoef(np.array(styles).T)[0, 1])
        report[name] = {"accuracy": accuracy, "confusion": confusion, "style r": r}
    return report


def _answers(seen: Seen, real: Seen):
    """(kind, read, true) for layout, background and each object in its place."""
    yield "layout", seen.layout, real.layout
    yield "background", seen.background, real.background
    for i in range(len(CENTRES[real.layout])):
        got = seen.objects[i] if seen.layout == real.layout else ("missing",) * 3
        yield from zip(("shape", "colour", "size"), got, real.objects[i], strict=True)


def generated(model: Path, texts: list[str], seeds: list[int], steps: int, guidance: float, batch: int = 12):
    """Yields (prompt index, seed, picture) from the diffusers folder."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    jobs = [(i, seed) for i in range(len(texts)) for seed in seeds]
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i, seed in part]
        pictures = pipeline(
            [texts[i] for i, _ in part], num_inference_steps=steps, guidance_scale=guidance, generator=noise
        ).images
        for (i, seed), picture in zip(part, pictures, strict=True):
            yield i, seed, picture


def reconstructions(model: Path, count: int, seed: int = 2) -> dict:
    """The judge on pictures that went through the autoencoder (posterior mean), held-out colour-shape pairs too."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32, local_files_only=True)
    rng, found, errors = np.random.default_rng((seed, 9)), [], []
    for _ in range(count):
        scene = sample_scene(rng, held_out_pairs=rng.random() < 0.1)
        text, picture = caption(scene, rng), np.asarray(render(scene), np.float32)
        with torch.no_grad():
            x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)[0].permute(1, 2, 0).numpy()
        copy = ((y + 1) * 127.5).round().astype(np.uint8)
        errors.append(float(((copy - picture) ** 2).mean()))
        found.append([judge(Image.fromarray(copy), text).found])
    return {"psnr": float(10 * np.log10(255**2 / np.mean(errors))), **summary(found)}


def montage(path: Path, pictures: list[Image.Image], columns: int = 10, scale: int = 2) -> None:
    """A contact sheet of 64 px pictures."""
    side = 64 * scale + 2
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((side - 2, side - 2), Image.LANCZOS), (i % columns * side, i // columns * side))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lpo.scenes.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder (default: the embedded one)")
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts; 0 skips generation (default: 300)")
    parser.add_argument("--split", choices=("heldout", "train", "composition"), default="heldout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--reconstructions", type=int, default=300)
    parser.add_argument("--renders", type=int, default=0, help="fresh renderings to validate the judge on (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--montage", type=Path, help="PNG of the first 100 generated pictures")
    args = parser.parse_args()
    try:
        for file in filter(None, (args.out, args.montage)):
            require_writable(file)
    except ConfigError as error:
        parser.error(str(error))
    report: dict = {"split": args.split, "steps": args.steps, "guidance": args.guidance, "seeds": args.seeds}
    report["held-out colour-shape pairs"] = [f"{c} {s}" for s, c in HELD_OUT_PAIRS]
    if args.renders:
        report["judge on renderings"] = judge_on_renders(args.renders)
    if args.reconstructions:
        report["reconstructions"] = reconstructions(args.model, args.reconstructions)
    if args.prompts:
        texts, pictures, styles = prompts(args.split, args.prompts), [], []
        found: list[list[dict[str, bool]]] = [[] for _ in texts]
        unread, started = 0, time.monotonic()
        for i, _, picture in generated(args.model, texts, args.seeds, args.steps, args.guidance):
            verdict = judge(picture, texts[i])
            found[i].append(verdict.found)
            unread += bool(verdict.unreadable)
            pictures.append(picture)
            styles.append(style_score(picture))
        report["generated"] = summary(found)
        report["pictures with something unreadable"] = unread / len(pictures)
        report["style"] = {"mean": float(np.mean(styles)), "std": float(np.std(styles))}
        report["seconds"] = time.monotonic() - started
        if args.montage:
            montage(args.montage, pictures[:100])
    text = json.dumps(report, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
