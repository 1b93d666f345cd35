"""Models out of the app and into it: the jobs with their real child processes, the links, and what is refused."""

import contextlib
import json
import shutil
import sys
import zipfile
from io import BytesIO, StringIO

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from interchange_lab import BASE, GOLDEN
from safetensors.numpy import load
from worker_lab import TaskInHand

from app import choices, comparisons, jobs, model_routes, models, worker_export
from app.worker_export import ModelError
from app.worker_task import Stopped
from lpo.__main__ import main
from lpo.config import Policy, from_dict
from storage import checkpoints, labels
from storage import jobs as queue

FAKE = "import sys, time; print('written'); time.sleep({}); print('error: {}', file=sys.stderr); sys.exit({})"


@pytest.fixture
def tiny(lab):
    """A study of the tiny base, chosen, with a finished adapter of two checkpoints."""
    study = labels.create_study(lab.store, "Tiny & <b>", base=BASE, question="Which?")
    lab.choose_study(study.id)
    job = queue.submit(lab.store, "train-lpo", "training", {}, study_id=study.id)
    for name, step in (("final", 4), ("step-000002", 2)):
        folder = lab.store.runs_dir / job.id / "checkpoints" / name
        shutil.copytree(GOLDEN / "lora_m1", folder)
        (folder / "adapter.json").write_text(json.dumps({"format_version": 1, "base": BASE, "adapters": []}))
        meta = {"final": name == "final", "policy": {"base": BASE, "adapters": []}, "config": {"lrm": "scenes"}}
        checkpoints.add_checkpoint(
            lab.store, kind="adapter", name="LPO 1" + ("" if name == "final" else f", step {step}"), path=folder,
            study_id=study.id, job_id=job.id, step=step, meta=meta,
        )  # fmt: skip
    return job.id


def work(lab, job_id, finish=True):
    """Does the waiting job of the data lane as its worker would."""
    job = queue.claim(lab.store, "data", "w")
    assert job.id == job_id
    result = worker_export.run(TaskInHand(lab.store, job))
    if finish:
        queue.finish(lab.store, job.id, "w", result)
    return result


def fake(monkeypatch, seconds: float, sentence: str, code: int) -> None:
    monkeypatch.setattr(worker_export, "COMMAND", [sys.executable, "-c", FAKE.format(seconds, sentence, code)])


def client(lab) -> TestClient:
    app = FastAPI()
    app.include_router(model_routes.router(lab))
    return TestClient(app)


def test_an_adapter_goes_out_by_a_link_and_comes_in_again(lab, tiny, tmp_path):
    final, earlier = models.of_run(lab, tiny)
    assert (final.name, earlier.name) == ("LPO 1", "LPO 1, step 2")
    job_id = models.export(lab, final.id, "kohya", "float16")
    html, moving = models.listing(lab, models.EXPORT, [final.id, earlier.id])
    assert moving and "LPO 1" in html and "href" not in html
    names = [file["name"] for file in work(lab, job_id)["files"]]
    assert names == ["lpo-1.safetensors", "lpo-1.md"]
    html, moving = models.listing(lab, models.EXPORT, [final.id])
    assert not moving and f'href="models/{job_id}/0"' in html
    web = client(lab)
    answer = web.get(f"/models/{job_id}/0")
    assert answer.status_code == 200 and "lpo-1.safetensors" in answer.headers["content-disposition"]
    tensors = load(answer.content)
    assert all(key.startswith("lora_unet_") for key in tensors) and len(tensors) == 3 * 128
    card = web.get(f"/models/{job_id}/1").text
    assert "<b>" not in card and "Tiny" in card and "Scenes, as shipped" in card.replace("\\", "")
    for path in (f"{job_id}/2", f"{job_id}/-1", f"{job_id}/..%2fabout.json", "0" * 32 + "/0", "x/0", f"{job_id}/²"):
        assert web.get(f"/models/{path}").status_code == 404
    # the same again replaces it, so that exports do not pile up
    again = models.export(lab, final.id, "kohya", "float16")
    assert again != job_id and not (lab.store.runs_dir / job_id).exists()
    queue.request_stop(lab.store, again)
    assert "press the button again" in models.listing(lab, models.EXPORT, [final.id])[0]

    (tmp_path / "wild.safetensors").write_bytes(answer.content)
    taken = work(lab, models.take_in(lab, "adapter", str(tmp_path / "wild.safetensors"), " From  a friend "))
    assert taken["words"] == "a LoRA of 128 layers, rank 4"
    value = str(taken["checkpoint_id"])
    assert ("From a friend", value) in choices.policies(lab)
    policy = choices.policy(lab, value, 0.5)
    assert policy["adapters"] == [{"path": str(tmp_path / "wild.safetensors"), "strength": 0.5}]
    with pytest.raises(ValueError, match="here already, as From a friend"):
        models.take_in(lab, "adapter", str(tmp_path / "wild.safetensors"))
    checkpoints.hide_checkpoint(lab.store, taken["checkpoint_id"])
    models.take_in(lab, "adapter", str(tmp_path / "wild.safetensors"))  # off the lists: it may come again


def here(task, arguments, doing):
    """As worker_export.child, in this process: the real one needs ten seconds to import torch."""
    out, err = StringIO(), StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if code:
        raise ModelError(err.getvalue().strip())
    return out.getvalue()


def test_a_merged_unet_and_an_lrm_can_be_chosen(lab, tiny, monkeypatch):
    monkeypatch.setattr(worker_export, "child", here)
    unet, lrm = str(GOLDEN / "tiny_sd15" / "unet"), str(GOLDEN / "lrm_sd15")
    taken = work(lab, models.take_in(lab, "base", unet, "LPO of the paper"))
    value = str(taken["checkpoint_id"])
    assert taken["words"].startswith("a UNet of")
    policy = choices.policy(lab, value)
    assert from_dict(Policy, policy) == Policy(BASE, unet=unet)
    assert comparisons.policy_name(lab, policy) == "LPO of the paper"
    taken = work(lab, models.take_in(lab, "lrm", lrm, "official"))
    assert ("official", str(taken["checkpoint_id"])) in choices.lrms(lab)
    job_id = models.export(lab, taken["checkpoint_id"], "official")
    files = work(lab, job_id)["files"]
    assert [file["name"] for file in files] == ["official.zip"]
    archive = zipfile.ZipFile(BytesIO(client(lab).get(f"/models/{job_id}/0").content))
    assert {"official/state_dict.pt", "official/unet/config.json"} <= set(archive.namelist())


def test_a_child_that_refuses_dies_or_is_stopped(lab, tiny, monkeypatch):
    checkpoint = models.of_run(lab, tiny)[0].id
    fake(monkeypatch, 0, "That is no LoRA.", 2)
    with pytest.raises(ModelError, match=r"^That is no LoRA\.$"):
        work(lab, models.export(lab, checkpoint, "kohya"))
    fake(monkeypatch, 0, "", 137)
    with pytest.raises(ModelError, match="exit code 137"):
        work(lab, models.export(lab, checkpoint, "diffusers"))
    fake(monkeypatch, 60, "", 0)
    job = queue.get(lab.store, models.export(lab, checkpoint, "merged"))
    task = TaskInHand(lab.store, job, stop_after=0)
    with pytest.raises(Stopped):
        worker_export.run(task)


def test_what_cannot_be_is_said_before_a_job_is_queued(lab, tiny, tmp_path):
    checkpoint = models.of_run(lab, tiny)[0].id
    (tmp_path / "old.pt").write_bytes(b"x")
    for act, words in (
        (lambda: models.export(lab, None, "kohya"), "no checkpoint to export"),
        (lambda: models.export(lab, 999, "kohya"), "no checkpoint 999"),
        (lambda: models.export(lab, checkpoint, "official"), "kohya, diffusers, merged"),
        (lambda: models.export(lab, checkpoint, "kohya", "int8"), "float16, float32"),
        (lambda: models.take_in(lab, "vae", "/x"), "LoRA, LRM or merged UNet"),
        (lambda: models.take_in(lab, "adapter", "  "), "path is empty"),
        (lambda: models.take_in(lab, "adapter", str(tmp_path / "gone")), "nothing at"),
        (lambda: models.take_in(lab, "adapter", str(tmp_path / "old.pt")), "may hold code"),
        (lambda: models.take_in(lab, "lrm", str(tmp_path / "old.pt")), "are folders"),
    ):
        with pytest.raises(ValueError, match=words):
            act()
    assert jobs.list_jobs(lab, lane="data") == []


def test_names_from_outside_are_escaped_in_the_lists(lab, tiny, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    models.take_in(lab, "adapter", str(tmp_path / "x.safetensors"), "<img src=x onerror=alert(1)>")
    html, moving = models.listing(lab, models.IMPORT)
    assert moving and "<img" not in html and "&lt;img" in html
