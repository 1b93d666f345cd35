"""Trains the Scenes model from nothing: pictures, autoencoder, text encoder, UNet, diffusers folder.

    python -m lpo.scenes.train --out runs/scenes                        # CPU: about 80 minutes on two cores
    python -m lpo.scenes.train --out runs/scenes --device cuda --batch 256 --unet-minutes 30

Every stage saves its state and resumes from it: run the same command again after an interruption. The learning rates
follow the clock, so each stage ends after its minutes with its decay done, whatever else the machine does. The record
of the run is `train_log.jsonl` in --out; `python -m lpo.scenes.evaluate` says how good the result is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lpo.scenes.dataset import rendered
from lpo.scenes.progress import Log
from lpo.scenes.text import build_tokenizer, train_text
from lpo.scenes.unet import train_unet
from lpo.scenes.vae import cached_latents, train_vae

STAGES = ("render", "vae", "text", "unet")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lpo.scenes.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, states and the log")
    parser.add_argument("--model", type=Path, help="where the diffusers folder goes (default: OUT/model)")
    parser.add_argument("--stage", choices=STAGES, default="unet", help="last stage to run (default: all of them)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, or processes of the UNet (default: 2)")
    parser.add_argument("--scenes", type=int, default=48_000, help="pictures to draw (default: 48000)")
    parser.add_argument("--batch", type=int, default=24, help="pictures a UNet step (default: 24)")
    parser.add_argument("--vae-minutes", type=float, default=18.5)
    parser.add_argument("--text-minutes", type=float, default=8.0)
    parser.add_argument("--unet-minutes", type=float, default=35.0)
    parser.add_argument("--export-minutes", type=float, default=10.0, help="minutes between exported models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="allow --out to hold an earlier run, and continue it")
    return parser.parse_args(argv)


def unet_process(rank: int, world: int, args: argparse.Namespace) -> None:
    """One of `world` processes of the UNet stage; the earlier stages are read from their files."""
    log = Log(args.out / "train_log.jsonl")
    if world > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{(args.out / 'rendezvous').resolve()}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    pictures = rendered(args.out, args.scenes, args.seed, args.threads)
    vae = train_vae(args.out, pictures, args.vae_minutes, args.device, log, args.seed)
    latents = cached_latents(args.out, vae, pictures, args.device)
    tokenizer = build_tokenizer(args.seed)
    encoder, head = train_text(args.out, tokenizer, args.text_minutes, args.device, log, args.seed)
    train_unet(
        args.out,
        vae,
        encoder,
        head,
        tokenizer,
        latents,
        args.unet_minutes,
        args.device,
        log,
        args.model or args.out / "model",
        args.export_minutes,
        args.batch,
        args.seed,
        args.seed,
        rank,
        world,
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    log_path = args.out / "train_log.jsonl"
    if log_path.exists() and not args.resume:
        raise SystemExit(f"{args.out} holds an earlier run: add --resume to continue it, or name another --out folder.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda was asked for, but torch sees no GPU here: use --device cpu.")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    log = Log(log_path)
    last = STAGES.index(args.stage)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if v is not None}
    log("start", settings=settings, torch=torch.__version__)
    pictures = rendered(args.out, args.scenes, args.seed, args.threads)
    if last >= 1:
        vae = train_vae(args.out, pictures, args.vae_minutes, args.device, log, args.seed)
        cached_latents(args.out, vae, pictures, args.device)
    if last >= 2:
        train_text(args.out, build_tokenizer(args.seed), args.text_minutes, args.device, log, args.seed)
    if last >= 3:
        world = args.threads if args.device == "cpu" else 1
        rendezvous = args.out / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        if world == 1:
            unet_process(0, 1, args)
        else:
            torch.multiprocessing.start_processes(unet_process, (world, args), world, start_method="spawn")
    log("finished", stage_done=args.stage)


if __name__ == "__main__":
    main()
