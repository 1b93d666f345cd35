"""The command lines of `python -m lpo export` and `check`; what they do is in lpo/export.py and lpo/model_check.py.
Imports no torch until they run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lpo.config import Adapter, ConfigError, from_dict
from lpo.export_plan import plan_adapter, plan_lrm
from lpo.preflight import require_checkable

HELP = "write an adapter or an LRM for other tools"
CHECK_HELP = "say whether a LoRA, LRM or UNet from elsewhere fits a base, and what it is"
FORMATS = {
    "diffusers": "a LoRA for diffusers' load_lora_weights",
    "kohya": "a LoRA in the key layout that ComfyUI and A1111 read (SD1.x, SD2.x, SDXL)",
    "merged": "the denoiser with the adapters folded in, a unet/ folder that the official code loads",
    "official": "an LRM in the layout of the official code",
}
EPILOG = "formats:\n" + "\n".join(f"  {name:10} {text}" for name, text in FORMATS.items())
DTYPES = ("float32", "float16", "bfloat16")


def add_parsers(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("export", help=HELP, description=HELP, epilog=EPILOG, formatter_class=raw)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", nargs="+", metavar="PATH[@STRENGTH]",
                      help="an adapter, with those below it; several are the whole stack in order")  # fmt: skip
    what.add_argument("--lrm", metavar="DIR", help="an LRM folder, or 'scenes'")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
    parser.add_argument("--out", required=True, metavar="FILE_OR_DIR",
                        help="new folder, or new .safetensors file with its card beside it as .md")  # fmt: skip
    parser.add_argument("--base", default="", help="base model; empty takes the one that it was trained on")
    parser.add_argument("--stack", default="merged", choices=("merged", "last"),
                        help="merged: one LoRA of the whole stack [default]; last: the last adapter alone")  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="number format [default: float32]")
    parser.add_argument("--title", default="", help="its name in the header, the card and kohya's file name")
    parser.add_argument("--about", metavar="FILE.json",
                        help="for the card: name, study, question, labels, verdicts, lrm")  # fmt: skip

    parser = commands.add_parser("check", help=CHECK_HELP, description=CHECK_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", metavar="PATH", help="a LoRA in diffusers or kohya layout")
    what.add_argument("--lrm", metavar="DIR", help="an LRM folder of this program or of the official code")
    what.add_argument("--unet", metavar="DIR", help="a merged UNet of diffusers layout")
    parser.add_argument("--base", required=True, help="the base model that it is to work with")


def check(args: argparse.Namespace) -> int:
    """Prints what the file is. Raises ConfigError with one sentence."""
    require_checkable(args.adapter, args.lrm, args.unet, args.base)
    from lpo import model_check

    if args.adapter is not None:
        print(model_check.check_adapter(args.adapter, args.base))
    elif args.unet is not None:
        print(model_check.check_unet(args.unet, args.base))
    else:
        print(model_check.check_lrm(args.lrm, args.base))
    return 0


def run(args: argparse.Namespace, read_adapter: Callable[[str], dict]) -> int:
    """Prints each file written, one a line. Raises ConfigError with one sentence."""
    if (args.lrm is not None) != (args.format == "official"):
        named = "an LRM" if args.lrm is not None else "an adapter"
        fitting = "official" if args.lrm is not None else "diffusers, kohya or merged"
        raise ConfigError(f"{args.format} is no format for {named}: choose {fitting}.")
    # torch and the Hugging Face stack are imported only once all is asked that can be without them
    if args.lrm is not None:
        plan_lrm(args.lrm, args.base, args.out)
        from lpo.export import export_lrm

        files = export_lrm(args.lrm, args.base, args.out)
    else:
        stack = [from_dict(Adapter, read_adapter(text)) for text in args.adapter]
        how = (stack, args.format, args.out, args.base, args.stack == "last", args.title, args.about)
        plan_adapter(*how)
        from lpo.export import export_adapter

        files = export_adapter(*how, args.dtype)
    for file in files:
        print(file)
    return 0
