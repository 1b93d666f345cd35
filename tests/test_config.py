"""Settings: every field documented, every preset sourced, every absurd value refused with one sentence."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest

from lpo.__main__ import build_parser, read_settings
from lpo.config import (
    CONFIGS,
    PRESETS,
    SOURCES,
    Adapter,
    ConfigError,
    LPOConfig,
    LRMConfig,
    Policy,
    SampleConfig,
    Search,
    TraceConfig,
    from_dict,
    from_preset,
    to_args,
    to_dict,
)

CLASSES = [*CONFIGS.values(), Policy, Adapter, Search]


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_field_is_documented_and_typed(config_class):
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        assert len(field.metadata["help"]) > 10, field.name
        if hints[field.name] in (int, float):
            assert field.metadata["min"] is not None and field.metadata["max"] is not None, field.name


@pytest.mark.parametrize(("command", "preset"), [(c, p) for c in PRESETS for p in PRESETS[c]])
def test_presets_are_valid_and_every_value_has_a_source(command, preset):
    config = from_preset(CONFIGS[command], preset)
    assert from_dict(CONFIGS[command], json.loads(json.dumps(to_dict(config)))) == config
    assert all(SOURCES[command][preset][name] for name in PRESETS[command][preset])


def test_each_command_has_the_three_presets():
    assert all({"scenes", "sd15", "sd21"} <= set(presets) for presets in PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS["trace"])
def test_a_trace_keeps_the_pairs_that_a_training_would(preset):
    trace, lpo = from_preset(TraceConfig, preset), from_preset(LPOConfig, preset)
    for name in ("threshold", "threshold_min", "threshold_max", "score_timestep", "steps", "guidance_scale", "eta"):
        assert getattr(trace, name) == getattr(lpo, name), name


def test_official_keeps_the_published_numbers():
    config = from_preset(LPOConfig, "official")
    assert (config.beta, config.clamp, config.lora_rank, config.lr) == (500.0, 0.1, 4, 6e-5)
    assert (config.siblings, config.steps, config.guidance_scale, config.eta) == (4, 20, 5.0, 1.0)
    assert (config.threshold, config.threshold_min, config.threshold_max) == ("sigma", 0.35, 0.5)
    assert (config.score_timestep, config.max_grad_norm, config.weight_decay) == ("parent", 0.0, 1e-4)
    assert (config.prompts_per_iteration, config.train_batch_size) == (5, 10)
    lrm = from_preset(LRMConfig, "official")
    assert (lrm.lr, lrm.steps, lrm.batch_size, lrm.warmup_steps, lrm.guidance_scale) == (1e-5, 4000, 128, 500, 7.5)


@pytest.mark.parametrize(
    ("config_class", "settings", "words"),
    [
        (LPOConfig, {"steps": 0}, "steps is 0"),
        (LPOConfig, {"steps": 2.5}, "whole number"),
        (LPOConfig, {"steps": True}, "whole number"),
        (LPOConfig, {"lr": "fast"}, "lr is 'fast'"),
        (LPOConfig, {"lr": float("nan")}, "lr is not a number"),
        (LPOConfig, {"lr": float("inf")}, "between"),
        (LPOConfig, {"threshold": "cubic"}, "none, linear, variance, sigma"),
        (LPOConfig, {"threshold_min": 0.6}, "threshold_max"),
        (LPOConfig, {"eta": 0.0}, "above 0"),
        (LPOConfig, {"antithetic": True, "siblings": 3}, "even"),
        (LPOConfig, {"bata": 3}, "did you mean 'beta'"),
        (LPOConfig, {"format_version": 2}, "update the program"),
        (LPOConfig, {"policy": {"base": ""}}, "base"),
        (LPOConfig, {"policy": {"base": "x", "adapters": [{"strength": 1.0}]}}, "path"),
        (LPOConfig, {"policy": 3}, "Policy"),
        (SampleConfig, {"height": 100}, "multiple of 8"),
        (SampleConfig, {"policy": {"search": {"method": "steps"}}}, "set eta above 0"),
        (SampleConfig, {"policy": {"search": {"method": "beam"}}}, "best-of-n, steps"),
        (SampleConfig, {"policy": {"search": {"candidates": 0}}}, "candidates is 0"),
        (SampleConfig, {"policy": {"search": {"t_min": 800, "t_max": 100}}}, "t_min"),
        (SampleConfig, {"policy": {"search": {"lrm": ""}}}, "needs an LRM"),
        (SampleConfig, {"policy": {"search": "steps"}}, "Search object"),
        (TraceConfig, {"eta": 0.0, "policy": {"search": {"method": "steps"}}}, "set eta above 0"),
        (LPOConfig, {"policy": {"search": {"method": "best-of-n"}}}, "leave the search out"),
        (SampleConfig, {"prompts": "a cat"}, "list"),
        (SampleConfig, {"seeds": [1, "2"]}, "list"),
        (TraceConfig, {"siblings": 1}, "siblings is 1"),
        (LRMConfig, {"t_min": 800, "t_max": 100}, "t_min"),
        (LRMConfig, {"train": "some"}, "full, lora, heads"),
    ],
)
def test_absurd_settings_get_one_sentence(config_class, settings, words):
    with pytest.raises(ConfigError) as caught:
        from_dict(config_class, settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def settings_of(*argv):
    return read_settings(build_parser().parse_args(list(argv)))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"beta": 7.0, "lr": 0.01}))
    config = settings_of("train-lpo", "--preset", "official", "--config", str(tmp_path / "c.json"), "--lr", "0.5",
                         "--height", "none", "--antithetic", "true")  # fmt: skip
    assert (config.beta, config.lr, config.lora_rank, config.height, config.antithetic) == (7.0, 0.5, 4, None, True)


def test_policy_flags():
    config = settings_of("sample", "--base", "m", "--adapters", "a@0.5", "b", "--prompts", "x y", "--seeds", "1", "2")
    assert config.policy == Policy("m", (Adapter("a", 0.5), Adapter("b", 1.0)))
    assert config.prompts == ("x y",) and config.seeds == (1, 2)


def test_search_flags_describe_the_policy_and_say_when_they_describe_nothing(tmp_path):
    config = settings_of("sample", "--search", "steps", "--candidates", "8", "--search-t-min", "500", "--eta", "1")
    assert config.policy == Policy("scenes", (), Search("steps", "scenes", 8, 500, 1000))
    (tmp_path / "c.json").write_text(json.dumps(to_dict(config)))
    again = ("sample", "--config", str(tmp_path / "c.json"))
    assert settings_of(*again).policy == config.policy
    assert settings_of(*again, "--candidates", "2").policy.search == Search("steps", "scenes", 2, 500, 1000)
    assert settings_of(*again, "--search", "none").policy.search is None
    with pytest.raises(ConfigError, match="--candidates describes a search"):
        settings_of("sample", "--candidates", "8")


def test_a_policy_written_before_there_was_search_samples_plainly():
    assert from_dict(Policy, {"base": "scenes", "adapters": []}).search is None


@pytest.mark.parametrize("command", CONFIGS)
def test_shown_flags_give_the_config_back(command):
    default = from_preset(CONFIGS[command], "scenes")
    changes = {"train-lpo": {"beta": 9.0, "antithetic": True}, "train-lrm": {"train": "heads", "lr": 0.1}}
    changes |= {"sample": {"seeds": (1, 2), "height": 64}, "trace": {"prompt": "a red star", "siblings": 4}}
    if command == "trace":
        changes["trace"]["policy"] = dataclasses.replace(default.policy, search=Search("steps", "lrm", 8, 100))
    wanted = dataclasses.replace(default, **changes[command])
    assert settings_of(command, *to_args(wanted, default)) == wanted


def test_help_names_every_field():
    parser = build_parser()
    for command, config_class in CONFIGS.items():
        text = parser._subparsers._group_actions[0].choices[command].format_help()
        names = [f.name for f in dataclasses.fields(config_class) if f.name != "policy"]
        assert all(f"--{name}" in text for name in names) and "presets" in text


def test_configs_and_command_line_start_without_torch():
    code = "import sys, lpo.config, lpo.__main__, lpo.run_dir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_merged_unet_is_named_by_a_flag_and_shown_as_one():
    config = settings_of("sample", "--base", "m", "--unet", "official/unet", "--prompts", "x")
    assert config.policy == Policy("m", unet="official/unet")
    default = from_preset(CONFIGS["sample"], "scenes")
    wanted = dataclasses.replace(default, policy=Policy("m", (Adapter("a"),), unet="u"))
    assert settings_of("sample", *to_args(wanted, default)) == wanted
    assert from_dict(Policy, {"base": "m", "adapters": []}).unet == ""  # of before there was one
