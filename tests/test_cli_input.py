"""Whatever a person gives the command line: help that tells the truth, and one sentence for bad input."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lpo
from lpo import commands, export
from lpo.__main__ import build_parser, main, read_settings
from lpo.backbones import load_policy
from lpo.cli_help import field_help
from lpo.config import CONFIGS, SOURCES, ConfigError, LPOConfig, LRMConfig, Policy, to_dict
from lpo.data import DataError, read_pairs
from lpo.lpo_trainer import LPOTrainer
from lpo.places import LORA_FILE
from lpo.preflight import require_inputs, require_startable
from lpo.prompts import read_prompts
from lpo.ranks import ALONE
from lpo.run_dir import Run, require_writable
from lpo.training import run_training
from tests.test_lpo_cli import BASE, LRM

DEEP = "[" * 100_000
SURROGATE = '"\\ud800"'


def help_of(command: str) -> dict[str, str]:
    """{flag: its help} as a person reads it, percent signs and all."""
    choices = build_parser()._subparsers._group_actions[0].choices[command]._actions
    return {action.dest: action.help % {} for action in choices if action.help is not argparse.SUPPRESS}


@pytest.mark.parametrize("command", CONFIGS)
def test_help_tells_range_source_and_what_a_bare_call_uses(command):
    bare, texts = read_settings(build_parser().parse_args([command])), help_of(command)
    for field in dataclasses.fields(CONFIGS[command]):
        if field.name == "policy":
            continue
        text, source = texts[field.name], SOURCES[command]["scenes"].get(field.name, "")
        value = getattr(bare, field.name)
        written = " ".join(value) if field.type == "tuple[str, ...]" else value
        told = text.partition("[default: ")[2].removesuffix("]")
        assert source in told and (field.metadata["source"] in told or value == field.default), text
        if isinstance(value, bool) or value is None:
            assert told.startswith(str(value).lower())
        elif isinstance(value, int | float):
            assert float(told.partition(" (")[0]) == pytest.approx(value)
        elif isinstance(written, str):
            assert told.startswith(written or "empty")
        if field.metadata["max"] is not None:
            assert " to " + f"{field.metadata['max']:,}".removesuffix(".0") in text
    assert "[default: scenes" in texts.get("policy.base", texts.get("base"))


def test_help_says_both_where_a_bare_call_and_the_field_differ():
    texts = help_of("train-lrm")
    assert "; 1 to 10,000,000 [default: 100 (measured at 90: 90 seconds on one core); " in texts["steps"]
    assert texts["steps"].endswith("; with --config and no --preset: 4000 (paper, SD1.5)]")
    assert "0 to 50" in texts["guidance_scale"] and "init 'base' only" in texts["guidance_scale"]
    assert "[default: empty]" in field_help(next(f for f in dataclasses.fields(Policy) if f.name == "unet"))


@pytest.fixture
def files(tmp_path):
    """A folder with one of everything that is wrong, and of what is right."""
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    latents, at = torch.zeros(1, 4, 16, 16), torch.tensor([1])
    tensors = {
        "good": (latents, at), "empty": (torch.zeros(1, 4, 0, 0), at), "nan": (latents * float("nan"), at),
        "nan_t": (latents, torch.tensor([float("nan")])), "bool_t": (latents, torch.tensor([True])),
        "huge": (latents + 3e38, at),
    }  # fmt: skip
    for name, (x, t) in tensors.items():
        save_file({"latents": x, "timesteps": t}, tmp_path / f"{name}.safetensors")
    texts = {
        "one.json": '["the cat"]', "two.json": '["the cat", "and"]', "deep.json": DEEP,
        "lone.json": f"[{SURROGATE}]", "file": "x",
        "digits.json": "9" * 5000, "policy.json": '{"policy": "scenes"}',
        "search.json": '{"policy": {"search": "steps"}}',
        "lone_config.json": f'{{"prompt": {SURROGATE}}}', "big.json": '{"steps": 1' + "0" * 400 + "}",
        "latin.json": '["caf\xe9"]',
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    for name, text in {"list": "[]", "broken": "{", "latin": '{"a": "\xe9"}', "deep": DEEP}.items():
        (tmp_path / f"run_{name}").mkdir()
        (tmp_path / f"run_{name}" / "config.json").write_bytes(text.encode("latin-1"))
    return tmp_path


@pytest.fixture
def no_torch(files, monkeypatch):
    """From here on torch, and what imports it, cannot be imported: None in its place makes the import fail."""
    for name in ("commands", "data", "export", "model_check"):
        monkeypatch.delattr(lpo, name, raising=False)
        monkeypatch.setitem(sys.modules, f"lpo.{name}", None)
    monkeypatch.setitem(sys.modules, "torch", None)


TRAIN = ["train-lpo", "--base", BASE, "--lrm", LRM, "--prompts", "{tmp}/one.json", "--run-dir", "{tmp}/run"]
SCORE = ["score", "--lrm", LRM, "--base", BASE, "--device", "cpu"]
GOOD = ["--latents", "{tmp}/good.safetensors", "--prompts", "{tmp}/one.json"]
RUN = ["--run-dir", "{tmp}/run"]
ONE_PAIR = {"id": "1", "prompt": "the cat", "first": "a.png", "second": "b.png", "target": 1}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*SCORE, *GOOD, "--out", "{tmp}/folder"], "folder cannot be used (Is a directory)"),
        ([*SCORE, *GOOD, "--out", "{tmp}/file/out.json"], "out.json cannot be used (Not a directory)"),
        ([*SCORE, *GOOD, "--out", "/proc/out.json"], "/proc/out.json cannot be used"),
        *(
            ([*SCORE, "--latents", f"{{tmp}}/{name}.safetensors", *GOOD[2:], "--out", "{tmp}/o"], words)
            for name, words in {"empty": "empty", "nan": "not finite", "huge": "not finite",
                                "nan_t": "timesteps must be", "bool_t": "timesteps must be"}.items()
        ),
        *(
            ([*SCORE, *GOOD[:3], f"{{tmp}}/{name}.json", "--out", "{tmp}/o"], words)
            for name, words in {"deep": "not a readable prompt file", "digits": "not a readable prompt file",
                                "lone": "lone surrogate", "latin": "both in UTF-8"}.items()
        ),
        (["sample", "--prompts", "x", "--run-dir", "{tmp}/file"], "cannot be used (Not a directory)"),
        (["sample", "--prompts", "x", "--run-dir", "/proc/run"], "/proc/run cannot be used"),
        (["sample", "--prompts", "x", "--run-dir", "{tmp}/" + "r" * 300], "File name too long"),
        (["sample", *RUN, "--prompts", "x", "--seeds", "-1"], "seeds is -1, but must be between 0"),
        (["trace", *RUN, "--prompt", "x", "--seeds", "0", "0"], "name each once"),
        (["sample", *RUN, "--prompts", "x", "--config", "{tmp}/policy.json", "--base", "b"], "policy is 'scenes'"),
        (["sample", *RUN, "--prompts", "x", "--config", "{tmp}/search.json", "--candidates", "2"], "search is 'steps'"),
        (["trace", *RUN, "--config", "{tmp}/deep.json"], "not valid JSON"),
        (["trace", *RUN, "--config", "{tmp}/lone_config.json"], "prompt holds a lone surrogate"),
        (["trace", *RUN, "--prompt", "x", "--config", "{tmp}/big.json"], "steps is a number of 401 digits"),
        (["sample", *RUN, "--prompts", "\udcff"], "prompts holds a lone surrogate"),
        *(
            (["trace", "--resume", "--run-dir", f"{{tmp}}/run_{name}"], "config.json is damaged")
            for name in ("list", "broken", "latin")
        ),
        ([*TRAIN, "--lora_targets", "zzz"], "lora_targets names 'zzz'"),
        ([*TRAIN, "--lora_targets"], "lora_targets is empty"),
        ([*TRAIN, "--lora_targets", "down_blocks"], "lora_targets names 'down_blocks'"),
    ],
)  # fmt: skip
def test_bad_paths_and_bad_files_get_one_sentence(files, capsys, argv, words):
    assert main([a.replace("{tmp}", str(files)) for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    log = files / "run" / "log.txt"
    assert not log.exists() or log.read_text().splitlines()[-1] == said.rstrip("\n")


@pytest.fixture
def pairs(tmp_path):
    """Two pictures, and a way to write a pairs file of one line that differs from a good one."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)

    def write(prompt='"the cat"', target="1", key='"1"', before=b""):
        line = f'{{"id": {key}, "prompt": {prompt}, "first": "a.png", "second": "b.png", "target": {target}}}\n'
        (tmp_path / "pairs.jsonl").write_bytes(before + line.encode())
        return tmp_path / "pairs.jsonl"

    return write


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"target": "1" + "0" * 400}, "'target' is 1000"),
        ({"target": "9" * 5000}, "not valid JSON"),
        ({"target": "NaN"}, "'target' is nan"),
        ({"target": "-Infinity"}, "'target' is -inf"),
        ({"target": DEEP}, "not valid JSON"),
        ({"prompt": SURROGATE}, "lone surrogate"),
        ({"key": SURROGATE}, "lone surrogate"),
        ({"before": b"\xff"}, "not UTF-8"),
    ],
)
def test_bad_lines_of_pairs_get_one_sentence(pairs, line, words):
    with pytest.raises(DataError, match=words) as caught:
        read_pairs(pairs(**line))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_folders_that_are_files_and_files_that_are_folders_get_one_sentence(pairs, tmp_path, capsys):
    train = ["train-lrm", "--base", BASE, "--init", LRM, "--pairs", str(pairs()), "--device", "cpu", "--latent_cache"]
    gaps = ["gaps", "--pairs", str(pairs()), "--clip", str(tmp_path), "--out"]
    for argv in ([*train, str(tmp_path / "a.png"), "--run-dir", str(tmp_path / "run")], [*gaps, str(tmp_path)]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert " cannot be used (" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["score", "--lrm", "{tmp}/gone", "--latents", "gone", "--prompts", "gone", "--out"],
        ["gaps", "--pairs", "{tmp}/gone.jsonl", "--out"],
        ["sample", "--base", "/nowhere", "--prompts", "x", "--run-dir"],
        ["trace", "--lrm", "/nowhere", "--prompt", "x", "--run-dir"],
        ["train-lpo", "--lrm", "/nowhere", "--prompts", "x", "--run-dir"],
        ["train-lrm", "--pairs", "gone", "--run-dir"],
    ],
)
def test_where_nothing_can_be_written_is_said_before_anything_is_read(files, capsys, no_torch, argv):
    for out in ("{tmp}/file/out", "/proc/out", "{tmp}/" + "o" * 300):
        out = out.replace("{tmp}", str(files))
        assert main([*(a.replace("{tmp}", str(files)) for a in argv), out]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {out} cannot be used (") and said.count("\n") == 1, said


NOT_THERE = [
    (["sample", "--prompts", "x", "--base", "{tmp}"], "model_index.json"),
    (["sample", "--prompts", "x", "--base", "{tmp}/good.safetensors"], "is no whole Stable Diffusion checkpoint"),
    (["sample", "--prompts", "x", "--adapters", "/nowhere"], "There is no adapter at /nowhere"),
    (["sample", "--prompts", "x", "--unet", "/nowhere"], "There is no UNet at /nowhere"),
    (
        ["sample", "--prompts", "x", "--search", "best-of-n", "--search_lrm", "/nowhere"],
        "/nowhere is not an LRM folder",
    ),
    (["sample", "--base", BASE], "sample needs at least one prompt"),
    (["sample", "--prompts", "/nowhere.txt"], "There is no prompt file '/nowhere.txt'"),
    (["trace", "--lrm", "scenes"], "trace needs a prompt"),
    (["trace", "--prompt", "x", "--lrm", "scenes", "/nowhere"], "/nowhere is not an LRM folder"),
    (["trace", "--prompt", "x", "--base", BASE, "--lrm", "scenes"], "does not share the latent space"),
    (["train-lpo", "--prompts", "/nowhere.txt"], "There is no prompt file"),
    (["train-lpo", "--prompts", "{tmp}/one.json", "--eval_prompts", "/nowhere.txt"], "There is no prompt file"),
    (["train-lpo", "--prompts", "{tmp}/one.json", "--lrm", "/nowhere"], "/nowhere is not an LRM folder"),
    (["train-lrm", "--pairs", "/nowhere.jsonl"], "The pairs file /nowhere.jsonl does not exist"),
    (["train-lrm", "--pairs", "{tmp}/file", "--init", "/nowhere"], "/nowhere is not an LRM folder"),
    (
        ["train-lrm", "--pairs", "{tmp}/file", "--init", "base", "--base", BASE, "--text_projection", ""],
        "set text_projection to",
    ),
    (["train-lrm", "--pairs", "{tmp}/file", "--latent_cache", "{tmp}/file"], "file cannot be used (Not a directory)"),
]


@pytest.mark.parametrize(
    ("command", "run", "words"),
    [
        ("trace", "none", "holds no run to resume"),
        ("trace", "run_deep", "config.json is damaged"),
        ("trace", "finished", "has already finished"),
        ("sample", "stopped", "is a trace run: resume it with that command"),
        ("trace", "stopped", "Unknown setting 'stepz'; did you mean 'steps'"),
    ],
)
def test_what_cannot_go_on_is_said_before_torch_is_imported(files, capsys, no_torch, command, run, words):
    for name in ("finished", "stopped"):
        (files / name).mkdir()
        (files / name / "config.json").write_text('{"command": "trace", "stepz": 1}')
    (files / "finished" / "result.json").write_text("{}")
    assert main([command, "--resume", "--run-dir", str(files / run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "7"], "was started with steps 5 and goes on with that, not with 7"),
        (["--preset", "sd15"], "was started with steps 5 and goes on with that, not with 20"),
        (["--config", "{tmp}/other.json"], "was started with prompt 'x' and goes on with that, not with 'y'"),
        (["--adapters", "a@0.5"], "was started with adapters [] and goes on with that"),
        (["--steps", "many"], "steps is 'many'"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_or_not_at_all(files, capsys, no_torch, flags, words):
    (files / "stopped").mkdir()
    (files / "stopped" / "config.json").write_text(
        '{"command": "trace", "prompt": "x", "lrm": ["scenes"], "steps": 5, "guidance_scale": 4.0}'
    )
    (files / "other.json").write_text('{"prompt": "y"}')
    run = ["--resume", "--run-dir", str(files / "stopped")]
    assert main(["trace", *run, *(flag.replace("{tmp}", str(files)) for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(("argv", "words"), NOT_THERE)
def test_what_is_not_there_is_said_before_torch_is_imported(files, capsys, no_torch, argv, words):
    assert main([a.replace("{tmp}", str(files)) for a in [*argv, *RUN]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (files / "run").exists()  # so that the corrected command finds it free


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--latents", "{tmp}/none"], "none is not a readable .safetensors file"),
        (["--latents", "{tmp}/other.safetensors"], "must hold the tensors `latents` and `timesteps`; it has ['x']"),
        (
            ["--prompts", "{tmp}/two.json"],
            "do not match (latents (1, 4, 16, 16), timesteps (1,), 2 prompts)",
        ),
        (["--prompts", "/nowhere.json"], "There is no prompt file"),
        (["--lrm", "/nowhere"], "/nowhere is not an LRM folder"),
        (["--base", "/nowhere"], "There is no model at /nowhere"),
        (["--base", ""], "is an official LRM folder: name its base model too"),
        (["--base", BASE, "--lrm", "scenes"], "does not share the latent space"),
    ],
)
def test_what_a_score_lacks_is_said_before_torch_is_imported(files, capsys, no_torch, argv, words):
    assert main([a.replace("{tmp}", str(files)) for a in [*SCORE, *GOOD, "--out", "{tmp}/o", *argv]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


ADAPTER = ["export", "--adapter", "{tmp}/lora.safetensors", "--base", BASE, "--out", "{tmp}/out"]
DIFFUSERS = [*ADAPTER, "--format", "diffusers"]
OFFICIAL = ["export", "--lrm", LRM, "--base", BASE, "--format", "official", "--out", "{tmp}/out"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*DIFFUSERS, "--adapter", "/nowhere"], "There is no adapter at /nowhere"),
        ([*DIFFUSERS, "--base", "/nowhere"], "There is no model at /nowhere"),
        ([*DIFFUSERS, "--base", ""], "lora.safetensors does not say what it was trained on"),
        ([*DIFFUSERS, "--adapter", "{tmp}/stacked"], "There is no adapter at /nowhere"),
        ([*DIFFUSERS, "--out", "{tmp}/file"], "file exists already, and an export overwrites nothing"),
        ([*DIFFUSERS, "--out", "{tmp}/other.safetensors"], "other.safetensors exists already"),
        ([*DIFFUSERS, "--out", "{tmp}/file/out"], "out cannot be used (Not a directory)"),
        ([*DIFFUSERS, "--about", "/nowhere.json"], "/nowhere.json cannot be read"),
        ([*DIFFUSERS, "--about", "{tmp}/file"], "file is not valid JSON"),
        ([*DIFFUSERS, "--about", "{tmp}/big.json"], "big.json says 'steps', which a model card does not take so"),
        ([*ADAPTER, "--format", "official"], "official is no format for an adapter"),
        ([*ADAPTER, "--format", "merged", "--out", "{tmp}/o.safetensors"], "file, but a merged network is a folder"),
        ([*OFFICIAL, "--format", "kohya"], "kohya is no format for an LRM"),
        ([*OFFICIAL, "--out", "{tmp}/o.safetensors"], "is a file, but an official LRM is a folder"),
        ([*OFFICIAL, "--out", "{tmp}/run_list"], "run_list exists already"),
        ([*OFFICIAL, "--out", "/proc/out"], "/proc/out cannot be used"),
        ([*OFFICIAL, "--lrm", "/nowhere"], "/nowhere is not an LRM folder"),
        ([*OFFICIAL, "--base", "/nowhere"], "There is no model at /nowhere"),
        ([*OFFICIAL, "--base", ""], "is an official LRM folder: name its base model too"),
        (["check", "--adapter", "/nowhere", "--base", BASE], "There is no adapter at /nowhere"),
        (["check", "--adapter", "{tmp}/file", "--base", BASE], "file is not a readable .safetensors file"),
        (["check", "--adapter", "{tmp}/lora.safetensors", "--base", "/nowhere"], "There is no model at /nowhere"),
        (["check", "--unet", "/nowhere", "--base", BASE], "There is no UNet at /nowhere"),
        (["check", "--unet", "no/where", "--base", BASE], "There is no folder at no/where"),
        (["check", "--unet", "{tmp}/folder", "--base", BASE], "it has no config.json"),
        (["check", "--lrm", "/nowhere", "--base", BASE], "/nowhere is not an LRM folder"),
        (["check", "--lrm", "scenes", "--base", BASE], "does not share the latent space"),
        (["gaps", "--pairs", "/nowhere", "--clip", "/nowhere", "--out", "{tmp}/o.csv"], "pairs file /nowhere does not"),
    ],
)
def test_what_export_check_and_gaps_lack_is_said_before_torch_is_imported(files, capsys, no_torch, argv, words):
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, files / "lora.safetensors")
    (files / "stacked").mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, files / "stacked" / LORA_FILE)
    below = {"base": BASE, "adapters": [{"path": "/nowhere", "strength": 1}]}
    (files / "stacked" / "adapter.json").write_text(json.dumps(below))
    assert main([a.replace("{tmp}", str(files)) for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (files / "out").exists()


@pytest.mark.parametrize("argv", [argv for argv, _ in NOT_THERE if "--latent_cache" not in argv])
def test_what_is_said_early_is_what_the_command_itself_says(files, argv):
    args = build_parser().parse_args([a.replace("{tmp}", str(files)) for a in [*argv, *RUN, "--device", "cpu"]])
    config = read_settings(args)
    with pytest.raises(ValueError) as early:
        require_inputs(config)
        require_startable(config)
    if isinstance(config, LRMConfig) and "/nowhere.jsonl" not in argv:
        (files / "file").write_text(json.dumps(ONE_PAIR))
        for name in ("a.png", "b.png"):
            Image.new("RGB", (64, 64)).save(files / name)
    with pytest.raises(ValueError) as late:
        commands.start(args.command, config, args.run_dir, to_dict(config))
    assert (type(early.value), str(early.value)) == (type(late.value), str(late.value))


@pytest.mark.parametrize(
    "argv",
    [
        ["--lrm", LRM, "--base", BASE, "--format", "official"],
        ["--adapter", "{tmp}/adapter", "--base", BASE, "--format", "diffusers"],
        ["--adapter", "{tmp}/adapter", "--base", BASE, "--format", "merged"],
    ],
)
def test_where_an_export_cannot_be_written_is_said_before_a_model_is_loaded(files, capsys, monkeypatch, argv):
    (files / "adapter").mkdir()
    (files / "adapter" / LORA_FILE).write_bytes(b"never read")
    for name in ("load_policy", "describe_base", "LatentRewardModel"):
        monkeypatch.delattr(export, name)
    outs = ["{tmp}/file/out", "/proc/out"] + (["{tmp}/file/out.safetensors"] if "diffusers" in argv else [])
    for out in outs:
        assert main(["export", *(a.replace("{tmp}", str(files)) for a in [*argv, "--out", out])]) == 2
        said = capsys.readouterr().err
        assert f"{out.replace('{tmp}', str(files))} cannot be used (" in said and said.count("\n") == 1, said


def test_asking_whether_a_place_can_be_written_leaves_it_as_it_is(tmp_path):
    (tmp_path / "file").write_text("x")
    before = (tmp_path / "file").stat().st_mtime_ns
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "a" / "new")
    require_writable(tmp_path, folder=True)
    require_writable(tmp_path / "b" / "new", folder=True)
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "file").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


def test_an_adapter_of_another_size_prints_one_sentence_and_nothing_else(tmp_path, capfd):
    wide = load_policy(Policy("scenes"), "cpu")
    wide.add_trainable_adapter(2, ["to_q", "to_k", "to_v", "to_out.0"], 0)
    wide.adapters.save(tmp_path / "wide")
    capfd.readouterr()
    assert main(["check", "--adapter", str(tmp_path / "wide"), "--base", BASE]) == 2
    said = capfd.readouterr()
    assert "was made for another architecture" in said.err and (said.err + said.out).count("\n") == 1


def test_two_spellings_of_a_prompt_do_not_stand_on_both_sides(tmp_path):
    (tmp_path / "train.txt").write_text("A red  ball.\nthe cat")
    (tmp_path / "heldout.txt").write_text("a red ball")
    config = LPOConfig(prompts=str(tmp_path / "train.txt"), eval_prompts=str(tmp_path / "heldout.txt"))
    with pytest.raises(ConfigError, match="'a red ball', are both trained on and held out"):
        LPOTrainer(config, Run(tmp_path))


def test_text_is_utf_8_with_or_without_a_mark_whatever_the_locale(pairs, tmp_path):
    for name, text in {"p.txt": "ein Caf\xe9", "p.json": '["ein Caf\xe9"]'}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_prompts(tmp_path / name) == ["ein Caf\xe9"]
    assert read_pairs(pairs(before=b"\xef\xbb\xbf"))[0].prompt == "the cat"
    (tmp_path / "p.txt").write_text("ein Caf\xe9", encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = f"from lpo.prompts import read_prompts; print(ascii(read_prompts({str(tmp_path / 'p.txt')!r})))"
    said = subprocess.run([sys.executable, "-c", code], env=ascii_only, capture_output=True, text=True, check=True)
    assert said.stdout == "['ein Caf\\xe9']\n"


class Saved:
    """A trainer that has nothing but a state."""

    ranks, weights, step = ALONE, {}, 7

    def load_state(self, path):
        self.step = torch.load(path, weights_only=True)["step"]


@pytest.mark.parametrize("damage", [b"", b"no state", b"PK\x03\x04 cut short"])
def test_a_damaged_state_cannot_go_on_and_says_so(tmp_path, damage):
    run = Run.create(tmp_path / "run", {})
    run.state_file.parent.mkdir(exist_ok=True)
    run.state_file.write_bytes(damage)
    with pytest.raises(ConfigError, match=r"state.pt is damaged or .*: start a new one"):
        run_training(Saved(), run, resume=True)


def test_damaged_metrics_are_written_anew_from_there_on(tmp_path):
    run, file = Run.create(tmp_path / "run", {}), tmp_path / "run" / "metrics.jsonl"
    for damaged in (b'{"step": 2, "sec', b"[]", b'{"seconds": 3}', b"\xff\xfe"):
        file.write_bytes(b'{"step": 1, "seconds": 2.5}\n' + damaged + b'\n{"step": 3, "seconds": 9}\n')
        run.rewind(3)
        assert file.read_text() == '{"step": 1, "seconds": 2.5}\n'
