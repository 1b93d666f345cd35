"""Traces: sampled once, scored by every LRM, shown step by step; checked against the trajectory and the LRM itself."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from worker_lab import TaskInHand

import lpo.search
from app import traces, worker_trace
from app.worker_models import Models
from app.worker_task import Stopped
from lpo.backbones import load_policy
from lpo.config import ConfigError, Policy, Search, TraceConfig, to_dict
from lpo.reward_model import LatentRewardModel
from lpo.trace import load_trace, score_trace
from storage import jobs

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE, LRM = str(GOLDEN / "tiny_sd15"), str(GOLDEN / "lrm_sd15")
POLICY = {"base": BASE, "adapters": []}
MODELS = Models()
CONFIG = TraceConfig(
    policy=Policy(BASE), lrm=(LRM,), prompt="a red circle", seeds=(3, 5), steps=4, siblings=3, device="cpu"
)


def task_for(store, wanted, stop_after=None):
    """A trace job in hand for this request."""
    return TaskInHand(store, jobs.submit(store, "trace", "interactive", wanted), MODELS, stop_after)


def request(config=CONFIG, lrms=(("golden", LRM),), policy=POLICY):
    planned = traces.plan([("base", policy)], config)
    return {
        "trace": to_dict(config),
        "policies": [policy],
        "traces": planned,
        "lrms": list(lrms),
        "total": config.steps,
    }


@pytest.fixture(scope="module")
def other_lrm(tmp_path_factory):
    """A second LRM of the same latent space, in the project's own format."""
    folder = tmp_path_factory.mktemp("other") / "lrm"
    LatentRewardModel.from_base(BASE, device="cpu", seed=1).save(folder)
    return str(folder)


def test_curves_are_the_lrms_scores_and_siblings_enclose_them(store):
    wanted = request()
    task = task_for(store, wanted)
    worker_trace.run(task)
    lrm = LatentRewardModel.from_pretrained(LRM, BASE, "cpu")
    for curve, item in zip(traces.curves(store, wanted["traces"], wanted["lrms"], 4), wanted["traces"], strict=True):
        kept = load_trace(store.traces_dir / item["key"] / "trace.safetensors")
        assert [s["t"] for s in curve["steps"]] == kept.timesteps
        scores = [s["score"] for s in curve["steps"]]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(score_trace(lrm, kept)), rtol=1e-4, atol=1e-4)
        judged = [s for s in curve["steps"] if "gap" in s]
        assert len(judged) >= 3
        # the sibling that was taken is one of them, and is scored at its own timestep: the curve's own point
        assert all(s["low"] - 1e-3 <= s["score"] <= s["high"] + 1e-3 for s in judged)
        assert all(s["kept"] == (s["gap"] > s["threshold"]) for s in judged)
        assert curve["pictures"] == 5
    progress = [p for p, _ in task.said]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_a_new_lrm_scores_the_stored_trace_without_sampling(store, other_lrm, monkeypatch):
    worker_trace.run(task_for(store, request()))
    before = {p: p.stat().st_mtime_ns for p in store.traces_dir.rglob("trace.safetensors")}
    monkeypatch.setattr(worker_trace, "_sample", lambda *a: pytest.fail("it was sampled again"))
    both = request(lrms=(("golden", LRM), ("other", other_lrm)))
    assert not traces.complete(store, both["traces"], [LRM, other_lrm])
    worker_trace.run(task_for(store, both))
    assert traces.complete(store, both["traces"], [LRM, other_lrm])
    assert before == {p: p.stat().st_mtime_ns for p in store.traces_dir.rglob("trace.safetensors")}
    curves = traces.curves(store, both["traces"], both["lrms"], 4)
    assert len(curves) == 4
    assert all(sum("gap" in s for s in c["steps"]) >= 3 for c in curves)


def test_scores_from_the_file_are_those_taken_while_sampling(store, other_lrm, tmp_path):
    """Siblings are drawn again from keyed noise; only the fp16 mean differs."""
    import storage

    both = request(lrms=(("golden", LRM), ("other", other_lrm)))
    worker_trace.run(task_for(store, both))
    live = traces.curves(store, both["traces"], [("other", other_lrm)], 4)
    second = storage.open(tmp_path / "second")
    worker_trace.run(task_for(second, request()))
    worker_trace.run(task_for(second, both))
    later = traces.curves(second, both["traces"], [("other", other_lrm)], 4)
    second.close()
    for a, b in zip(live, later, strict=True):
        for s, u in zip(a["steps"], b["steps"], strict=True):
            assert s.keys() == u.keys()
            assert s["score"] == pytest.approx(u["score"], abs=1e-4)
            assert s.get("low", 0) == pytest.approx(u.get("low", 0), abs=2e-2)
            assert s.get("threshold") == u.get("threshold")


def test_a_stopped_trace_shows_its_steps_and_can_be_done_again(store):
    wanted = request()
    with pytest.raises(Stopped):
        worker_trace.run(task_for(store, wanted, stop_after=2))
    partial = traces.curves(store, wanted["traces"], wanted["lrms"], 4)
    assert [len(c["steps"]) for c in partial] == [2, 2]
    assert all(s["score"] is not None for c in partial for s in c["steps"])
    assert not traces.complete(store, wanted["traces"], [LRM])
    worker_trace.run(task_for(store, wanted))
    assert traces.complete(store, wanted["traces"], [LRM])


def test_an_lrm_of_another_latent_space_is_refused_with_one_sentence(store, monkeypatch):
    monkeypatch.setattr(
        lpo.search,
        "latent_space",
        lambda lrm, base: {**load_policy(Policy(BASE), "cpu").fingerprint(), "channels": 16},
    )
    with pytest.raises(ConfigError, match="16 against 4 latent channels"):
        worker_trace.run(task_for(store, request()))


def test_keys_name_what_is_sampled_and_nothing_else(tmp_path):
    def key(policy=POLICY, seed=1, **changes):
        return traces.key(policy, "a star", seed, dataclasses.replace(CONFIG, **changes))

    assert key() == key(lrm=(LRM, "scenes"), device="auto")
    assert key(siblings=0) == key(siblings=0, threshold_max=0.9)
    others = [
        key(seed=2),
        key(steps=5),
        key(eta=0.5),
        key(siblings=4),
        key(threshold_max=0.9),
        key({"base": "scenes", "adapters": []}),
    ]
    assert len({key(), *others}) == len(others) + 1
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    adapter.write_bytes(b"one")
    policy = {"base": BASE, "adapters": [{"path": str(tmp_path), "strength": 1.0}]}
    first = key(policy)
    adapter.write_bytes(b"other")
    assert key(policy) != first


def test_weights_changed_in_place_are_another_key(tmp_path):
    """A base folder is known by its files' names, sizes and times; an LRM that searches by its content."""
    base, lrm = tmp_path / "base", tmp_path / "lrm"
    for folder in (base / "unet", lrm):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"one")

    def key(**search):
        policy = {"base": str(base), "adapters": []} | ({"search": {**search, "lrm": str(lrm)}} if search else {})
        return traces.key(policy, "a star", 1, CONFIG)

    keys = [key(), key(method="steps"), key(method="steps", candidates=3), key(method="best-of-n")]
    (lrm / "model.safetensors").write_bytes(b"other")
    assert key() == keys[0]
    keys.append(key(method="steps"))
    (base / "unet" / "model.safetensors").write_bytes(b"three")
    keys += [key(), key(method="steps")]
    assert len(set(keys)) == len(keys)
    assert traces.key({**POLICY, "base": "owner/never-downloaded"}, "a star", 1, CONFIG)


@pytest.mark.parametrize("search", [Search("steps", LRM, 4, 200, 800), Search("best-of-n", LRM, 4)])
def test_a_search_is_followed_with_its_candidates_live_and_by_a_new_lrm(store, other_lrm, search):
    policy = to_dict(Policy(BASE, search=search))
    wanted = request(policy=policy)
    task = task_for(store, wanted)
    worker_trace.run(task)
    lrm = LatentRewardModel.from_pretrained(LRM, BASE, "cpu")
    for curve, item in zip(traces.curves(store, wanted["traces"], wanted["lrms"], 4), wanted["traces"], strict=True):
        kept = load_trace(store.traces_dir / item["key"] / "trace.safetensors")
        assert kept.search == search
        scores = [s["score"] for s in curve["steps"]]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(score_trace(lrm, kept)), rtol=1e-3, atol=1e-3)
        if search.method == "best-of-n":  # the best at the end, among all from the start
            assert all(s["low"] <= s["score"] <= s["high"] and "gap" not in s for s in curve["steps"])
            assert curve["steps"][-1]["score"] == curve["steps"][-1]["high"] > curve["steps"][-1]["low"]
        else:  # t = 751, 501, 251, 1: the best of the siblings that three of the steps drew, plain siblings else
            assert [s["t"] for s in curve["steps"] if s["step"] and s["score"] == pytest.approx(s["high"], abs=1e-3)]
            for after, s in zip(curve["steps"][1:4], curve["steps"][:3], strict=True):
                assert not search.covers(s["t"]) or after["score"] == pytest.approx(after["high"], abs=1e-3)
        assert curve["pictures"] == 5
    progress = [p for p, _ in task.said]
    assert progress == sorted(progress) and progress[-1] == 1.0
    again = request(policy=policy, lrms=(("golden", LRM), ("other", other_lrm)))
    worker_trace.run(task_for(store, again))
    later = traces.curves(store, again["traces"], [("other", other_lrm)], 4)
    assert all(sum("low" in s for s in c["steps"]) >= 3 for c in later)
    told = traces.costs(later, [policy], wanted["traces"], 5.0)
    spent = "8 network evaluations + 12 latents" if search.method == "steps" else "32 network evaluations + 4 latents"
    assert told == f"A picture takes {spent} scored (base)."
    plain = request()
    worker_trace.run(task_for(store, plain))
    assert traces.costs(traces.curves(store, plain["traces"], plain["lrms"], 4), [POLICY], plain["traces"], 5.0) == ""


def test_a_search_whose_lrm_judges_another_latent_space_is_refused(store):
    with pytest.raises(ConfigError, match="The LRM scenes does not share the latent space"):
        worker_trace.run(task_for(store, request(policy=to_dict(Policy(BASE, search=Search("steps", "scenes"))))))


def test_thumbnails_are_asked_by_key_only(store):
    worker_trace.run(task_for(store, request()))
    item = request()["traces"][0]
    ask = traces.thumbnails(store)
    got = ask({"trace": item["key"], "steps": [0, 4, 9], "size": 16})
    assert sorted(got) == ["0", "4"]
    assert got["0"].startswith("data:image/webp;base64,")
    with Image.open(traces.picture_path(store, item["key"], 0)) as picture:
        assert picture.format == "WEBP"
    with pytest.raises(ValueError, match="not the name of a trace"):
        ask({"trace": "../../lab", "steps": [0], "size": 16})


def test_a_half_written_progress_line_is_not_read(store):
    item = request()["traces"][0]
    folder = traces.folder(store, item["key"])
    folder.mkdir()
    line = '{"step": 0, "t": 751, "scores": {"x": {"score": 1.0}}}\n'
    (folder / "progress.jsonl").write_text(line + '{"step": 1, "t"')
    curve = traces.curves(store, [item], [("x", "x")], 4)[0]
    assert [s["score"] for s in curve["steps"]] == [1.0]
