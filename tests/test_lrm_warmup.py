"""The label-free warm-up from end to end on the Scenes model, a few pairs and four steps, by a clock of the test's own:
the learning rate follows the time that was spent."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lpo import warmup
from lpo.reward_model import LatentRewardModel
from lpo.warmup_pictures import make

KINDS = {"rendered": 5, "weak": 1}  # one of each loss, and the pairs of a chunk
STEPS, SECONDS = 4, 61.0  # a step takes longer than the minute after which a state is saved


class Killed(Exception):
    pass


@pytest.fixture
def small(monkeypatch):
    """Small pools and steps of SECONDS each; the returned dict says at which step a run is killed."""
    now, killed = [0.0], {"at": None}
    losses = warmup.losses

    def timed(lrm, backbone, parts, t_max, seed, step):
        if step == killed["at"]:
            raise Killed
        now[0] += SECONDS
        return losses(lrm, backbone, parts, t_max, seed, step)

    monkeypatch.setattr(warmup, "losses", timed)
    monkeypatch.setattr(warmup, "TIMESTEPS", (1, 951))
    monkeypatch.setattr(warmup, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("lpo.warmup_pictures.make", lambda b, kind, seed, k: make(b, kind, seed, k, KINDS[kind]))
    for shares in ("EASY", "HARD"):
        monkeypatch.setattr(warmup, shares, dict.fromkeys(KINDS, 2))
    return killed


def warm_up(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the finished LRM."""
    folder = warmup.warm_up("scenes", out, STEPS * SECONDS / 60, 0, tuple(KINDS), "base", {"rendered": 2, "weak": 1})
    return load_file(folder / "model.safetensors")


def test_a_warm_up_trains_everything_and_goes_on_where_it_was_killed(small, tmp_path):
    whole = warm_up(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "pool", tmp_path / "killed" / "pool")
    small["at"] = 2
    with pytest.raises(Killed):
        warm_up(tmp_path / "killed")
    small["at"] = None
    resumed = warm_up(tmp_path / "killed")
    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-5)

    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["pools", "heads", "train", "done"] and log[-1]["step"] == STEPS
    assert all(math.isfinite(log[2][kind]) for kind in KINDS) and 0 <= log[1]["told_apart"] <= 1
    trained = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["weights"]
    fresh = LatentRewardModel.from_base("scenes", seed=0)
    fresh.set_trainable("full")
    before = fresh.trainable_parameters()
    assert trained.keys() == before.keys()
    assert [name for name, weight in trained.items() if torch.equal(weight, before[name])] == []
    lrm = LatentRewardModel.from_pretrained(tmp_path / "whole" / "lrm")
    assert lrm.temperature > 0 and len(lrm.meta["training_prompts"]) > 10


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--minutes", "0"], "Nothing can be learned in 0.0 minutes"),
        (["--model", "/nowhere"], "There is no model at /nowhere"),
        (["--init", "/nowhere"], "/nowhere is not an LRM folder"),
        (["--out", "/proc/warm"], "/proc/warm cannot be used"),
    ],
)
def test_bad_input_gets_one_sentence_before_a_picture_is_made(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        warmup.main(["--out", str(tmp_path / "out"), *argv])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
