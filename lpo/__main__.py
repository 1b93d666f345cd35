"""The command line: `python -m lpo sample | score | trace | train-lrm | train-lpo | export | check | gaps --help`.

Settings come from --preset, then --config FILE.json, then flags, each winning over the one before.
Exit codes: 0 finished, 2 bad input (one sentence on stderr), 3 stopped on request and resumable with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from lpo import export_cli, gaps_cli
from lpo.cli_help import BARE, field_help, preset_help
from lpo.config import CONFIGS, PRESETS, ConfigError, Policy, Search, from_dict, to_dict
from lpo.options import parse_json
from lpo.preflight import require_inputs, require_scorable, require_startable
from lpo.run_dir import Run, unusable

_HELP = {
    "sample": "draw pictures for every prompt and seed",
    "score": "score latents with an LRM",
    "trace": "sample one prompt, keep the trajectory, score it at every step",
    "train-lrm": "train a latent reward model on preference pairs",
    "train-lpo": "train a LoRA adapter that raises an LRM's reward",
}


class _Parser(argparse.ArgumentParser):
    """Argparse with one sentence on bad input, like everything else here."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command, config_class in CONFIGS.items():
        sub = commands.add_parser(
            command, help=_HELP[command], description=_HELP[command], epilog=preset_help(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--config", metavar="FILE.json", help="settings as a JSON object")
        sub.add_argument(
            "--preset", metavar="NAME", help=f"one of {', '.join(PRESETS[command])}; {BARE} if no --config"
        )
        sub.add_argument("--run-dir", metavar="DIR", help="folder for everything the command writes")
        sub.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, with its own settings")
        for field in dataclasses.fields(config_class):
            _add_field(sub, field, typing.get_type_hints(config_class)[field.name], command)
        if command in ("sample", "trace"):
            _add_search(sub)
    score = commands.add_parser("score", help=_HELP["score"], description=_HELP["score"])
    score.add_argument("--lrm", required=True, help="LRM folder of this program or of the official code, or 'scenes'")
    score.add_argument("--base", help="model whose latents these are; an official LRM folder needs it, "
                       "for its tokenizer")  # fmt: skip
    score.add_argument("--latents", required=True, metavar="FILE.safetensors",
                       help="tensors `latents` (N, C, H, W) and `timesteps` (N,)")  # fmt: skip
    score.add_argument("--prompts", required=True, metavar="FILE.json", help="list of N prompts")
    score.add_argument("--out", required=True, metavar="FILE.json", help='where {"scores": [...]} goes')
    score.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    score.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    score.add_argument("--allow_latent_mismatch", "--allow-latent-mismatch", action="store_true",
                       help="score although the LRM was trained in another latent space than --base's")  # fmt: skip
    export_cli.add_parsers(commands)
    gaps_cli.add_parser(commands)
    return parser


def _add_field(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any, command: str) -> None:
    if hint is Policy:
        inner = {each.name: each for each in dataclasses.fields(Policy)}
        parser.add_argument("--base", dest="policy.base", metavar="MODEL", help=field_help(inner["base"]))
        parser.add_argument("--unet", dest="policy.unet", metavar="DIR", help=field_help(inner["unet"]))
        parser.add_argument("--adapters", dest="policy.adapters", nargs="*", metavar="PATH[@STRENGTH]",
                            help=field_help(inner["adapters"]))  # fmt: skip
        return
    many = typing.get_origin(hint) is tuple
    names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
    parser.add_argument(*names, dest=field.name, nargs="*" if many else None, metavar="VALUE",
                        help=field_help(field, command))  # fmt: skip


# The flags of a policy's search, and the fields of Search that they set.
_SEARCH_FLAGS = {"search": "method", "search_lrm": "lrm", "candidates": "candidates"}
_SEARCH_FLAGS |= {"search_t_min": "t_min", "search_t_max": "t_max"}


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search", "an LRM chooses while the policy samples; nothing is trained")
    fields = {field.name: field for field in dataclasses.fields(Search)}
    for flag, name in _SEARCH_FLAGS.items():
        text = field_help(fields[name])
        if name == "method":  # of the class a default, of the flag none: plain sampling
            text = text.rpartition(" [")[0] + " [default: none]"
        names = [f"--{flag}"] + ([f"--{flag.replace('_', '-')}"] if "_" in flag else [])
        group.add_argument(*names, dest=f"search.{name}", metavar="VALUE", help=text)


def _read_search(given: dict, before: dict | None) -> dict | None:
    """The search that the flags describe, on top of what the file says. Raises ConfigError for flags without one."""
    flags = {name: given.get(f"search.{name}") for name in _SEARCH_FLAGS.values()}
    flags = {name: value for name, value in flags.items() if value is not None}
    if not flags:
        return before
    if flags.get("method") == "none":
        return None
    if "method" not in flags and not before:
        named = ", ".join(f"--{flag}" for flag, name in _SEARCH_FLAGS.items() if name in flags)
        raise ConfigError(f"{named} describes a search, but none is asked for: add --search best-of-n or steps.")
    hints = typing.get_type_hints(Search)
    return {**(before or {}), **{name: _parse(value, hints[name], name) for name, value in flags.items()}}


def _parse(text: str, hint: Any, name: str) -> Any:
    """A flag's text as the field's type; wrong text is left as it is and refused by the config's own checks."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if type(None) in options and text == "none":
        return None
    if bool in options:
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _adapter(text: str) -> dict:
    path, at, strength = text.rpartition("@")
    try:
        return {"path": path, "strength": float(strength)} if at else {"path": text}
    except ValueError:
        return {"path": text}


def read_settings(args: argparse.Namespace, own: dict | None = None) -> Any:
    """The config of the command: preset, then file, then flags, over a run's `own` settings. Raises ConfigError."""
    config_class = CONFIGS[args.command]
    hints = typing.get_type_hints(config_class)
    settings = dict(own or {})
    preset = args.preset or (None if args.config or own else BARE)
    if preset:
        if preset not in PRESETS[args.command]:
            known = ", ".join(PRESETS[args.command])
            raise ConfigError(f"There is no preset {preset!r} for {args.command}; choose one of {known}.")
        settings |= PRESETS[args.command][preset]
    if args.config:
        settings |= _read_config(args.config)
    given = vars(args)
    for name, hint in hints.items():
        value = given.get(name)
        if value is not None:
            inner = typing.get_args(hint)[0] if isinstance(value, list) else hint
            settings[name] = (
                [_parse(v, inner, name) for v in value] if isinstance(value, list) else _parse(value, hint, name)
            )
    if any(given.get(f"policy.{name}") is not None for name in ("base", "unet", "adapters")):
        policy = _group(settings, "policy")
        for name in ("base", "unet"):
            if given[f"policy.{name}"] is not None:
                policy[name] = given[f"policy.{name}"]
        if given["policy.adapters"] is not None:
            policy["adapters"] = [_adapter(text) for text in given["policy.adapters"]]
        settings["policy"] = policy
    if any(given.get(f"search.{name}") is not None for name in _SEARCH_FLAGS.values()):
        policy = _group(settings, "policy")
        settings["policy"] = {**policy, "search": _read_search(given, _group(policy, "search"))}
    return from_dict(config_class, settings)


def _group(settings: dict, name: str) -> dict:
    """A copy of a group of settings that flags are about to change; empty where there is none. Raises ConfigError."""
    group = settings.get(name) or {}
    if not isinstance(group, dict):
        raise ConfigError(f"{name} is {group!r}, but must be a JSON object.")
    return dict(group)


def _read_config(path: str) -> dict:
    try:
        return parse_json(Path(path).read_bytes(), dict, f"{path} is not valid JSON: it must hold one object.")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        if args.command is None:
            build_parser().print_help()
            return 0
        return _run(args)
    except OSError as error:
        sentence = unusable(error)
        if sentence is None:
            raise
    except ValueError as error:
        if not type(error).__module__.startswith("lpo."):  # ConfigError and the like are sentences, others' are not
            raise
        sentence = str(error)
    if _speaks():
        print(f"error: {sentence}", file=sys.stderr)
    return 2


def _speaks() -> bool:
    """Of several processes that a launcher has started one checks and speaks for all; see also Run.fail."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _run(args: argparse.Namespace) -> int:
    if args.command == "export":
        return export_cli.run(args, _adapter)
    if args.command == "check":
        return export_cli.check(args)
    if args.command == "gaps":
        return gaps_cli.run(args)
    if args.command == "score":
        return _score(args)
    if args.run_dir is None:
        raise ConfigError(f"{args.command} needs --run-dir DIR, the folder for what it writes.")
    if args.resume:
        run, config = _resumed(args)
    else:
        config = read_settings(args)
        if _speaks():
            Run.require_new(args.run_dir)
            require_inputs(config)
            require_startable(config)
    from lpo import commands  # torch and the Hugging Face stack: only once all is asked that can be without them

    if args.resume:
        return commands.resume(args.command, config, run)
    return commands.start(args.command, config, args.run_dir, to_dict(config))


def _resumed(args: argparse.Namespace) -> tuple[Run, Any]:
    """A run that is to go on, and the settings that it was started with. Raises ConfigError, also for other ones."""
    run, settings = Run.resume(args.run_dir)
    started_as = settings.pop("command", args.command)
    if started_as != args.command:
        raise ConfigError(f"The run in {args.run_dir} is a {started_as} run: resume it with that command.")
    config = from_dict(CONFIGS[args.command], settings)
    asked = _flat(read_settings(args, settings))
    for name, value in _flat(config).items():
        if asked[name] != value:
            raise ConfigError(
                f"{args.run_dir} was started with {name} {value!r} and goes on with that, not with {asked[name]!r}: "
                "leave it away, or start a new run in another --run-dir."
            )
    return run, config


def _flat(config: Any) -> dict:
    """The settings by the names of their flags, those of the policy among them."""
    fields = to_dict(config)
    return fields | fields.pop("policy", {})


def _score(args: argparse.Namespace) -> int:
    texts = require_scorable(args.lrm, args.base, args.latents, args.prompts, args.out, args.allow_latent_mismatch)
    from lpo import commands

    return commands.score(args.lrm, args.base, args.latents, texts, args.out, args.device, args.dtype,
                          args.allow_latent_mismatch)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
