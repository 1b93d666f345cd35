"""The app's worker on a tiny Stable Diffusion 3: pairs, traces with siblings, curves; nothing there asks which model it
is, but its timesteps are fractions and its latents have 16 channels.
"""

import pytest
import torch
from PIL import Image
from tiny_sd3 import SIDE, tiny_sd3

from app import figures, jobs, traces, worker_models
from app.worker import Worker
from lpo.backbones import load_policy
from lpo.config import Policy, Search, TraceConfig, to_dict
from lpo.reward_model import LatentRewardModel
from lpo.sampling import sample
from lpo.trace import load_trace, score_trace
from storage import jobs as queue
from storage import labels, media


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny"))


@pytest.fixture(scope="module")
def lrm(base, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lrm") / "lrm"
    LatentRewardModel.from_base(base, device="cpu", feature_layer=2).save(folder)
    return str(folder)


@pytest.fixture
def study(lab, base):
    study = labels.create_study(lab.store, "SD3", base=base)
    labels.add_prompts(lab.store, study.id, ["a red circle", "the sea"])
    lab.choose_study(study.id)
    return study


def work(lab, monkeypatch, kind: str, config: dict, study) -> dict:
    monkeypatch.setattr(worker_models, "interactive_threads", lambda training: 1)
    worker = Worker(lab.store, "interactive", "cpu")
    worker.models = worker_models.Models()
    jobs.submit(lab, kind, config, study.id)
    job = queue.claim(worker.store, worker.lane, worker.name)
    worker.work(job)
    done = queue.get(worker.store, job.id)
    assert done.state == "done", done.error
    return done.result


@pytest.mark.parametrize("searching", [False, True])
def test_pairs_are_drawn(lab, study, base, lrm, monkeypatch, searching):
    search = Search(method="steps", lrm=lrm, candidates=2) if searching else None
    policy = {k: v for k, v in to_dict(Policy(base, search=search)).items() if k != "format_version"}
    sampler = {"steps": 3, "guidance_scale": 3.0, "eta": 0.5}
    config = {"count": 1, "policies": [policy], "prompts": ["the sea"], "origin": "form", "sampler": sampler}
    work(lab, monkeypatch, "pairs", config, study)
    with lab.store.reader() as session:
        drawn = list(session.exec(media.select(media.Picture)))
    assert len(drawn) == 2 and {picture.width for picture in drawn} == {SIDE}
    if not searching:
        seed = drawn[0].provenance["seed"]
        ((_, _, again),) = sample(load_policy(Policy(base), "cpu"), ["the sea"], [seed], **sampler)
        with Image.open(lab.store.media.path(drawn[0].hash)) as stored:
            # drawn two at a time there and alone here: the last bit of a float may round a pixel the other way
            assert max(abs(x - y) for x, y in zip(stored.tobytes(), again.tobytes(), strict=True)) <= 1


def test_curves_have_fractions_of_t(lab, study, base, lrm, monkeypatch):
    config = TraceConfig(policy=Policy(base), lrm=(lrm,), prompt="the sea", seeds=(3, 5), steps=4, siblings=3, eta=0.7,
                         device="cpu")  # fmt: skip
    policy = {"base": base, "adapters": []}
    wanted = {"trace": to_dict(config), "policies": [policy], "traces": traces.plan([("base", policy)], config),
              "lrms": [("mine", lrm)], "total": config.steps}  # fmt: skip
    work(lab, monkeypatch, "trace", wanted, study)
    model, times = LatentRewardModel.from_pretrained(lrm, device="cpu"), load_policy(Policy(base), "cpu").timesteps(4)
    curves = traces.curves(lab.store, wanted["traces"], wanted["lrms"], 4)
    for curve, item in zip(curves, wanted["traces"], strict=True):
        stored = load_trace(lab.store.traces_dir / item["key"] / "trace.safetensors")
        assert [step["t"] for step in curve["steps"]] == stored.timesteps == [*times, 0]
        scores = torch.tensor([step["score"] for step in curve["steps"]])
        torch.testing.assert_close(scores, torch.tensor(score_trace(model, stored)), atol=1e-4, rtol=1e-4)
        assert sum("gap" in step for step in curve["steps"]) == 3  # the last step has no noise to draw siblings from
    drawn = figures.rewards(curves, siblings=True)["figure"]["data"]
    assert any(list(line["x"]) == [*times, 0] for line in drawn)
