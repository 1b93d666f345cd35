"""How much work one LPO iteration is at full size, and how much the weights weigh: counted, not timed, so it needs
neither a GPU nor the weights.

    python -m benchmarks.work --sizes sd15 sdxl

Runs one row of every network on PyTorch's meta device (shapes without numbers) under torch.utils.flop_counter, and
multiplies by the rows that benchmarks/lpo_iteration.py counts in real runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import measure, models
from lpo.backbones.lora import AdapterStack
from lpo.backbones.unet import early_features, strip

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OFFICIAL = {"sdxl": {"prompts": 4, "rank": 64, "kept": 80}, "tiny-sdxl": {"prompts": 4, "rank": 64, "kept": 80}}
SD = {"prompts": 5, "rank": 4, "kept": 100}
STEPS, SIBLINGS = 20, 4


def count(work) -> float:
    """TFLOP of calling `work`."""
    with FlopCounterMode(display=False, custom_mapping=measure.CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops() / 1e12


def inputs(unet: UNet2DConditionModel) -> tuple[tuple, dict | None]:
    """(x, t, token states) and the added condition of one row."""
    config, side = unet.config, unet.config.sample_size
    x, t = torch.zeros(1, 4, side, side), torch.zeros(1, dtype=torch.long)
    states, added = torch.zeros(1, 77, config.cross_attention_dim), None
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
    return (x, t, states), added


def parts(size: str) -> tuple[UNet2DConditionModel, list[torch.nn.Module], AutoencoderKL]:
    """Network, text encoders and VAE without numbers."""
    config = models.MODELS[size]
    tokens = {"vocab_size": config["vocabulary"]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"])
        towers = [CLIPTextModel(CLIPTextConfig(**config["text_encoder"], **tokens))]
        if "text_encoder_2" in config:
            towers.append(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"], **tokens)))
        vae = AutoencoderKL(
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **config["vae"],
        )
    return unet, towers, vae


def weigh(size: str) -> dict[str, float]:
    """Millions of parameters of each part; `trunk` is what an LRM keeps of the network."""
    unet, towers, vae = parts(size)
    millions = {"unet": size_of(unet), "vae": size_of(vae), "text": sum(size_of(tower) for tower in towers)}
    return millions | {"trunk": size_of(strip(unet))}


def measure_size(size: str, training: bool = True) -> dict:
    """TFLOP of one row (a guidance branch of a latent) of each kind, and the parameters of each part in millions.
    Without `training`, rows through the adapter are left out: they take most of the time."""
    setting = {**SD, **OFFICIAL.get(size, {})}
    unet, towers, _vae = parts(size)
    unet.requires_grad_(False)
    with torch.device("meta"):
        row, added = inputs(unet)
        ids = torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            tflop = {
                "text": count(lambda: [tower(ids) for tower in towers]),
                "network": count(lambda: unet(*row, added_cond_kwargs=added)),
            }
        if training:
            AdapterStack(unet, "unet").add_trainable(setting["rank"], TARGETS, 0)
            with torch.no_grad():
                tflop["network with adapter"] = count(lambda: unet(*row, added_cond_kwargs=added))
            tflop["forward and backward"] = count(lambda: unet(*row, added_cond_kwargs=added).sample.sum().backward())
        early = strip(parts(size)[0])
        with torch.no_grad():
            tflop["trunk"] = count(lambda: early_features(early, *row, added))
    return {"setting": setting, "tflop_per_row": tflop, "millions": weigh(size)}


def size_of(part: torch.nn.Module) -> float:
    return sum(p.numel() for p in part.parameters()) / 1e6


def iteration(found: dict, kept: int, naive: bool) -> dict[str, float]:
    """TFLOP of the phases of one iteration."""
    setting, row = found["setting"], found["tflop_per_row"]
    drawn = setting["prompts"] * STEPS
    encoded = (setting["prompts"] + 1) * (STEPS * SIBLINGS if naive else 1)
    forwards = 2 * kept * (row["network"] + row["forward and backward"])
    return {
        "sampling": 2 * drawn * row["network with adapter"],
        "scoring": 2 * drawn * SIBLINGS * row["trunk"] + encoded * row["text"],
        "training": 2 * forwards if naive else forwards,
    }


def resident(millions: dict[str, float], naive: bool) -> float:
    """GiB of frozen weights in half precision that stay on the device while LPO trains. Naive: a reference, a whole LRM
    and a second VAE. Ours: text encoders and VAE rest in main memory (lpo/backbones/placement.py)."""
    more = 2 * (millions["unet"] + millions["vae"] + millions["text"])
    return (millions["unet"] + (more if naive else millions["trunk"])) * 2e6 / 2**30


def report(found: dict) -> str:
    """The tables, in Markdown."""
    lines = []
    for size, one in found.items():
        rows = [[kind, f"{value:.3f}"] for kind, value in one["tflop_per_row"].items()]
        lines += [f"## Work of {size}", "", measure.table(["one row", "TFLOP"], rows), ""]
        rows = []
        for kept in sorted({28, one["setting"]["kept"]}):
            ours, naive = iteration(one, kept, False), iteration(one, kept, True)
            for phase in ours:
                rows.append([f"{kept} pairs, {phase}", f"{ours[phase]:.0f}", f"{naive[phase]:.0f}"])
            total = sum(ours.values()), sum(naive.values())
            rows.append([f"{kept} pairs, all", f"{total[0]:.0f}", f"{total[1]:.0f} (ratio {total[0] / total[1]:.2f})"])
        weights = resident(one["millions"], False), resident(one["millions"], True)
        rows.append(["weights, GiB", f"{weights[0]:.1f}", f"{weights[1]:.1f} (ratio {weights[0] / weights[1]:.2f})"])
        title = f"one iteration, {one['setting']['prompts']} prompts, TFLOP"
        lines += [measure.table([title, "ours", "naive"], rows), ""]
    return "\n".join(lines)


def carry_out(about: str, measure_size: Callable, report: Callable, argv: list[str] | None) -> int:
    """The command line of a count: `report` of what `measure_size` finds for every size."""
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("--sizes", choices=tuple(models.MODELS), nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    found = {size: measure_size(size) for size in arguments.sizes}
    print(report(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    return carry_out(__doc__, measure_size, report, argv)


if __name__ == "__main__":
    sys.exit(main())
