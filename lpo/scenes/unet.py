"""Trains the UNet of the Scenes model together with its pre-trained text encoder, and writes the diffusers folder.

What makes two CPU cores enough: one process with one thread per core (twice as fast as one process with two threads,
whose small operators wait for each other), cached latents, few attention heads, a loss that looks three times harder
at objects than at the sky (per-element weights leave the optimum of epsilon prediction where it is), min-SNR weights,
stratified timesteps, and a learning rate that decays by the clock, because the quality comes with the decay.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lpo.scenes.dataset import object_weights, scene_of
from lpo.scenes.progress import Log, load_state, save_state
from lpo.scenes.text import WIDTH, LayoutHead, encode, layout_targets
from lpo.scenes.world import train_caption

LEARNING_RATE, TEXT_RATE, BATCH, MIN_SNR, DROPOUT, EMA = 1.5e-3, 0.2, 24, 5.0, 0.1, 0.998
OBJECT_WEIGHT, LAYOUT_WEIGHT = 2.0, 0.05


def build_unet() -> UNet2DConditionModel:
    """SD1.5's UNet (3 cross-attention levels + 1) at 32/64/80/96 channels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 80, 96),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2, 3),
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def rate(done: float, step: int) -> float:
    """Learning-rate factor at the fraction `done` of the time: warm-up, flat half, cosine to 1 %."""
    decay = 0.01 + 0.495 * (1 + math.cos(math.pi * max(0.0, (done - 0.45) / 0.55)))
    return min(1.0, (step + 1) / 300) * decay


def scaling_factor(mean: torch.Tensor, std: torch.Tensor) -> float:
    """1 / standard deviation of the first 4,000 latents, so that diffusion starts from unit variance."""
    mean, std = mean[:4000].float(), std[:4000].float()
    return float(1 / (mean.var() + (std**2).mean()).sqrt())


def train_unet(
    out: Path,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    head: LayoutHead,
    tokenizer: CLIPTokenizer,
    latents: tuple[torch.Tensor, torch.Tensor],
    minutes: float,
    device: str,
    log: Log,
    model_dir: Path,
    export_every: float = 10.0,
    batch: int = BATCH,
    data_seed: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Trains for `minutes` of wall time in all, resuming from `out`/unet.pt; writes the EMA model to `model_dir`.

    latents: posterior mean and std (N, 4, 16, 16) of the scenes drawn with `data_seed`. Each of `world` processes
    takes its share of every batch; gradients are averaged, all draws are keyed by step, and rank 0 keeps the clock,
    the averages, the log and the files.
    """
    torch.manual_seed(seed + 2)
    unet = build_unet().to(device, memory_format=torch.channels_last)
    encoder = encoder.to(device).train()
    averages = {"unet": copy.deepcopy(unet).requires_grad_(False), "text": copy.deepcopy(encoder).requires_grad_(False)}
    pairs = [*zip(averages["unet"].parameters(), unet.parameters(), strict=True)]
    pairs += [*zip(averages["text"].parameters(), encoder.parameters(), strict=True)]
    groups = [
        {"params": list(unet.parameters()), "scale": 1.0},
        {"params": [*encoder.parameters(), *head.parameters()], "scale": TEXT_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    parameters = [p for group in groups for p in group["params"]]
    parts = {
        "unet": unet,
        "text": encoder,
        "head": head,
        "ema_unet": averages["unet"],
        "ema_text": averages["text"],
        "opt": optimiser,
    }
    state = load_state(out / "unet.pt", parts)
    step, spent, pictures = state.get("step", 0), state.get("seconds", 0.0), state.get("pictures", 0)
    scenes = [scene_of(data_seed, i) for i in range(len(latents[0]))]
    weights = torch.from_numpy(np.stack([object_weights(s, 16, OBJECT_WEIGHT) for s in scenes])).half()
    factor = scaling_factor(*latents)
    vae.register_to_config(scaling_factor=factor)
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    started = saved = time.monotonic()
    exported, losses = spent, []
    seconds = spent
    while True:
        done = min(1.0, seconds / (60 * minutes))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * group["scale"] * rate(done, step)
        rng, noise = np.random.default_rng((seed, 5, step)), torch.Generator().manual_seed(seed * 10**9 + step)
        index, dropped = rng.integers(len(scenes), size=batch), rng.random(batch) < DROPOUT
        captions = ["" if drop else train_caption(scenes[i], rng) for i, drop in zip(index, dropped, strict=True)]
        t = (torch.from_numpy(rng.permutation(batch) + rng.random(batch)) / batch * 1000).long()
        first, epsilon = torch.randn((2, batch, *latents[0].shape[1:]), generator=noise)
        mine = slice(rank, None, world)
        index, captions, t, epsilon = index[mine], captions[mine], t[mine].to(device), epsilon[mine].to(device)
        mean, std = (part[index].float() for part in latents)
        x0 = ((mean + std * first[mine]) * factor).to(device)
        a = alphas[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * epsilon).to(memory_format=torch.channels_last)
        text = encoder(encode(tokenizer, captions, device))
        error = (unet(x_t, t, text.last_hidden_state).sample - epsilon) ** 2
        snr = alphas[t] / (1 - alphas[t])
        per_picture = (error * weights[index].float().to(device)[:, None]).mean((1, 2, 3))
        loss = (per_picture * snr.clamp(max=MIN_SNR) / snr).mean()
        told = [j for j, caption in enumerate(captions) if caption]
        targets = [layout_targets(scenes[index[j]], captions[j]) for j in told]
        layout, _ = head.loss(text.pooler_output[told], torch.tensor(targets, device=device))
        optimiser.zero_grad(set_to_none=True)
        (loss + LAYOUT_WEIGHT * layout).backward()
        seconds = average_gradients(parameters, world, spent + time.monotonic() - started if rank == 0 else 0.0)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step, pictures = step + 1, pictures + batch
        if rank != 0:
            if done == 1:
                return
            continue
        keep = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_([p.data for p, _ in pairs], [q.data for _, q in pairs], 1 - keep)
        losses.append((loss.item(), error.mean().item(), layout.item()))
        if step % 100 == 0 or done == 1:
            weighted, plain, layout = np.mean(losses, 0)
            rates = {"lr": optimiser.param_groups[0]["lr"], "norm": float(norm)}
            log("unet", step=step, pictures=pictures, seconds=seconds, loss=weighted, mse=plain, layout=layout, **rates)
            losses = []
        if time.monotonic() - saved > 150 or done == 1:
            saved = time.monotonic()
            save_state(out / "unet.pt", parts, step=step, seconds=seconds, pictures=pictures)
        if seconds - exported > 60 * export_every or done == 1:
            exported = seconds
            export(model_dir, vae, averages["text"], tokenizer, averages["unet"], scheduler)
            log("export", step=step, folder=model_dir.name)
        if done == 1:
            return


def average_gradients(parameters: list[torch.nn.Parameter], world: int, seconds: float) -> float:
    """Replaces gradients by their mean over the processes; returns the sum of `seconds` (only rank 0 gives its own)."""
    if world == 1:
        return seconds
    flat = torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([seconds])])
    torch.distributed.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for p, part in zip(parameters, flat[:-1].split(sizes), strict=True):
        p.grad.copy_(part.view(p.shape)).div_(world)  # in place: keeps the memory format of the weight
    return float(flat[-1])


def export(folder: Path, vae, encoder, tokenizer, unet, scheduler) -> None:
    """Writes a StableDiffusionPipeline folder in fp16 safetensors; an earlier one is replaced whole."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(encoder).eval().half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for path in (part, old):
        shutil.rmtree(path, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    card = folder / "README.md"
    if card.exists():
        shutil.copy(card, part / "README.md")
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
