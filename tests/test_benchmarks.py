"""Every speed benchmark at the smallest size: the network evaluations it counts are those that the method needs, and
both patterns do the same maths. Never a time: this machine may be busy."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest

from benchmarks import gpu, lpo_iteration, lpo_patterns, lrm_step, pictures, variants, work

PROMPTS, SIBLINGS, STEPS, KEPT = 2, 2, 3, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the random-weight models, made once."""
    return str(tmp_path_factory.mktemp("models"))


def common(models, out, size="tiny") -> list[str]:
    return ["--size", size, "--device", "cpu", "--models", models, "--repeats", "1", "--no-memory", "--out", str(out)]


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl"])
def test_lpo_iteration(models, tmp_path, capsys, size):
    flags = ["--prompts", PROMPTS, "--siblings", SIBLINGS, "--steps", STEPS, "--train-batch-size", 3, "--kept", KEPT]
    assert lpo_iteration.main([*common(models, tmp_path / "a.json", size), *map(str, flags)]) == 0
    found = json.loads((tmp_path / "a.json").read_text())["kept"][str(KEPT)]
    sampled, scored, trained = 2 * PROMPTS * STEPS, 2 * PROMPTS * STEPS * SIBLINGS, 2 * KEPT  # two guidance branches
    assert found["ours"]["rows"] == {
        "policy": sampled + trained,  # the reference is the policy without its adapter
        "LRM": scored,
        "policy with gradients": trained,
    }
    assert found["naive"]["rows"] == {
        "policy": sampled,
        "LRM": scored,
        "policy with gradients": 2 * trained,
        "reference": 2 * trained,
    }
    assert found["agreement"]["pairs"] == 1.0
    assert found["agreement"]["gradients"] < 5e-3 and found["agreement"]["losses"] < 5e-3
    # the forward and the backward of both pictures against those of one
    assert found["ours"]["tflop"]["training"] == pytest.approx(found["naive"]["tflop"]["training"] / 2, rel=1e-6)
    assert found["ours"]["tflop"]["sampling"] == pytest.approx(found["naive"]["tflop"]["sampling"], rel=1e-6)
    assert 0 < found["ours"]["tflop"]["scoring"] <= found["naive"]["tflop"]["scoring"]
    text = capsys.readouterr().out
    assert f"{KEPT} pairs of {PROMPTS * STEPS}" in text and "| rows through LRM |" in text


def test_lpo_iteration_measures_memory(models, tmp_path, capsys):
    flags = ["--prompts", "1", "--siblings", "2", "--steps", "1", "--kept", "1", "--memory-of", "naive"]
    assert lpo_iteration.main([*common(models, tmp_path / "a.json"), *flags]) == 0
    assert int(capsys.readouterr().out.split()[-1]) >= 0


def test_lrm_step(models, tmp_path, capsys):
    assert lrm_step.main([*common(models, tmp_path / "a.json"), "--batch-size", "3"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rows"] == {"LRM with gradients": 3 * 2 * 2}  # pairs x pictures x guidance branches
    assert found["tflop"]["step"] > 0 and found["tflop"]["encoding"] > 0
    assert "One LRM training step, tiny, float32, 3 pairs" in capsys.readouterr().out


def test_pictures(models, tmp_path, capsys):
    assert pictures.main([*common(models, tmp_path / "a.json"), "--steps", "3"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["rows"] == {"policy": 4 * 3 * 2}
    assert found["tflop"]["decoding"] > 0 and "| achieved TFLOP/s |" in capsys.readouterr().out


def test_gpu_plans_every_measurement_of_both_sizes(tmp_path):
    found = gpu.plan(gpu.parse(["--out", str(tmp_path)]))
    assert len(found) == 12 and len({name for name, _, _ in found}) == 12
    for name, module, flags in found:
        assert ("--compile" in flags) == name.endswith("-compiled")
        assert flags[flags.index("--dtype") + 1] == "bfloat16" and flags[flags.index("--device") + 1] == "cuda"
        parsed = {"benchmarks.lpo_iteration": lpo_iteration, "benchmarks.lrm_step": lrm_step}.get(module, pictures)
        assert parsed.parse(flags).size == name.split("-")[0]


def test_gpu_writes_its_tables_and_names_what_failed(models, tmp_path, monkeypatch):
    """On the CPU and at the smallest size: the script that waits for a GPU must not be broken when there is one. Its
    processes run in this one, for starting six of them takes longer than what they do."""

    def here(command, **_settings):
        try:
            code = import_module(command[2]).main(command[3:])
        except SystemExit as error:
            code = error.code
        return SimpleNamespace(returncode=code, stderr="first line\nlast line\n")

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=here, DEVNULL=None, PIPE=None))
    flags = ["--sizes", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu", "--models", models, "--steps", "1"]
    flags += ["--dtype", "float32", "--repeats", "1", "--kept", "2", "--no-memory", "--no-compile"]
    assert gpu.main(flags) == 0
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "One LPO iteration, tiny" in text and "One LRM training step" in text and "Four pictures" in text
    assert len(list((tmp_path / "out").glob("*.json"))) == 3
    assert gpu.main([*flags, "--dtype", "float31"]) == 1
    assert (tmp_path / "out" / "tables.md").read_text().count("Failed: last line") == 3


def test_full_sizes_are_the_published_models():
    """Parameters as the model cards' weights have them, FLOPs as measured before this code was written."""
    found = {size: work.measure_size(size, training=size == "sd15") for size in ("sd15", "sdxl")}
    millions = {size: one["millions"] for size, one in found.items()}
    assert millions["sd15"]["unet"] == pytest.approx(859.520964)
    assert millions["sdxl"]["unet"] == pytest.approx(2567.463684)
    assert millions["sd15"]["vae"] == pytest.approx(83.653863)
    assert millions["sd15"]["text"] == pytest.approx(123.060480)
    assert millions["sdxl"]["text"] == pytest.approx(123.060480 + 694.659840)
    rows = {size: one["tflop_per_row"] for size, one in found.items()}
    assert rows["sd15"]["network"] == pytest.approx(0.803, rel=0.01)
    assert rows["sdxl"]["network"] == pytest.approx(6.76, rel=0.01)
    assert rows["sd15"]["trunk"] / rows["sd15"]["network"] == pytest.approx(0.325, abs=0.003)
    assert rows["sdxl"]["trunk"] / rows["sdxl"]["network"] == pytest.approx(0.434, abs=0.003)
    assert 2 < rows["sd15"]["forward and backward"] / rows["sd15"]["network"] < 3
    assert "28 pairs, all" in work.report({"sd15": found["sd15"]})


def test_variants_count_what_each_leaves_out(models, tmp_path, capsys, monkeypatch):
    prompts = lpo_patterns.write_prompts(tmp_path, 1)
    for changes in variants.VARIANTS.values():  # all are settings of train-lpo
        arguments = lpo_iteration.parse(["--models", models, "--device", "cpu", "--set", *changes])
        assert lpo_patterns.config_of(arguments, prompts).steps == 20
    monkeypatch.setattr(variants, "VARIANTS", dict([*variants.VARIANTS.items()][:4]))
    flags = ["--prompts", "1", "--siblings", "4", "--steps", "4", "--train-batch-size", "4"]  # t = 751, 501, 251, 1
    assert variants.main([*common(models, tmp_path / "a.json"), *flags]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert all(0 <= gap <= 1 for gap in result["gap"].values())
    found = result["rows"].values()
    assert [(r["policy"], r["policy with gradients"], r["LRM"]) for r in found] == [
        (8 + 8, 8, 32),  # 4 steps, 4 pairs, 4 siblings, two guidance branches
        (2 + 2, 2, 8),
        (8 + 8, 8, 16),
        (2 + 2, 2, 4),
    ]
    assert "| both | 4 | 2 | 4 |" in capsys.readouterr().out
