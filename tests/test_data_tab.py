"""The Data tab reads the truth, keeps blind votes out of sight, and answers bad input with one sentence."""

import errno
import time
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from storage_lab import picture_bytes
from worker_lab import TaskInHand

import storage
from app import data_routes, story, worker_data
from app.lab import Lab, Settings
from app.tabs import data, data_exchange
from app.worker_task import Stopped, explain
from storage import Unwritable, browse, checkpoints, comparisons, labels, media, stories, studies
from storage import jobs as queue
from storage.browse import Filters

PROVENANCE = {
    "policy": {"base": "scenes", "adapters": []},
    "scheduler": "ddim",
    "steps": 20,
    "guidance_scale": 5.0,
    "eta": 0.0,
}


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade % 256, shade // 256, 7))


@pytest.fixture
def filled(store):
    """Six pairs of two prompts; Ada answered four, took one back; a program answered one."""
    study = studies.create_study(store, "Tastes", salt="scenes")
    red, blue = studies.add_prompts(store, study.id, ["a red ball <b>", "a blue star"])
    pairs = []
    for i in range(6):
        prompt = red if i < 4 else blue
        ids = [
            media.add_picture(
                store, picture(2 * i + k), prompt_id=prompt.id, provenance={**PROVENANCE, "seed": 2 * i + k}
            ).id
            for k in (0, 1)
        ]
        pairs.append(studies.add_pair(store, study.id, prompt.id, *ids, origin="queue" if i % 2 else "form"))
    ada = studies.annotator(store, "Ada")
    robot = studies.annotator(store, "robot", kind="simulated")
    for i, (who, choice) in enumerate([(ada, "first"), (ada, "tie"), (ada, "second"), (ada, "skip"), (robot, "first")]):
        labels.vote(
            store,
            study_id=study.id,
            pair_id=pairs[i].id,
            annotator_id=who.id,
            choice=choice,
            left="first",
            milliseconds=1500,
            client_key=f"key{i}",
        )
    labels.undo(store, study.id, ada.id, "undo")  # takes back the skip
    return SimpleNamespace(study=study, pairs=pairs, ada=ada, robot=robot, red=red, blue=blue)


def ids(page) -> list[int]:
    return [row["id"] for row in page[1]]


def test_filters_of_pairs(store, filled):
    everything = ids(browse.pairs(store, Filters(study_id=filled.study.id), 0, 50))
    assert everything == [pair.id for pair in reversed(filled.pairs)]
    numbers = [pair.id for pair in filled.pairs]

    def found(**filters) -> list[int]:
        return sorted(numbers.index(i) for i in ids(browse.pairs(store, Filters(**filters), 0, 50)))

    assert found(text="BLUE") == [4, 5]
    assert found(text="%") == []  # a wildcard is a character like any other
    assert found(annotator_id=filled.ada.id) == [0, 1, 2]  # the skip was taken back
    assert found(choice="tie") == [1]
    assert found(choice="unlabelled") == [3, 5]
    assert found(kind="simulated") == [4]
    assert found(origin="form") == [0, 2, 4]
    assert found(since=time.time() + 10) == []
    heldout = {p.id for p in studies.study_prompts(store, filled.study.id, "heldout")}
    wanted = [i for i, pair in enumerate(filled.pairs) if pair.prompt_id in heldout]
    assert found(split="heldout") == wanted


def test_pictures_and_labels(store, filled):
    total, rows = browse.pictures(store, Filters(), 0, 5)
    assert (total, len(rows)) == (12, 5)
    assert (
        browse.pictures(store, Filters(annotator_id=filled.ada.id), 0, 50)[0] == 8
    )  # skipped pair included: rows stay
    assert browse.pictures(store, Filters(origin="import"), 0, 50)[0] == 0
    total, rows = browse.labels(store, Filters(study_id=filled.study.id), 0, 50)
    assert total == 6
    assert [row["status"] for row in rows] == ["undo", "counts", "taken back", "counts", "counts", "counts"]
    assert rows[2]["choice"] == "skip"
    assert browse.labels(store, Filters(kind="simulated"), 0, 50)[0] == 1


def test_story_shows_history_and_escapes(store, filled):
    found = stories.pair_story(store, filled.pairs[3].id)
    html = story.pair_html(found, {})
    assert "a red ball &lt;b&gt;" in html and "<b>a red" not in html and "ball <b>" not in html
    assert 'class="st-gone"' in html and "takes back row" in html
    assert "guidance_scale" in html and "scenes" in html
    assert stories.pair_story(store, 999) is None
    one = stories.picture_story(store, found["first"]["id"])
    assert one["pairs"] == [filled.pairs[3].id]
    assert f"pair {filled.pairs[3].id}" in story.picture_html(one, {})


def test_a_story_calls_checkpoints_as_the_lists_do(lab, filled):
    """By the names of the lists, also when hidden there; what is not of this lab by its file."""
    runs = lab.store.runs_dir
    policy = {
        "base": "scenes",
        "adapters": [
            {"path": str(runs / "a486c15e66" / "checkpoints" / "step-000040"), "strength": 0.5},
            {"path": "/elsewhere/0123456789ab/checkpoints/step-000007", "strength": 1.0},
        ],
        "search": {"method": "best-of-n", "lrm": str(runs / "b" / "lrm"), "candidates": 4},
    }
    adapter = checkpoints.add_checkpoint(
        lab.store, kind="adapter", name="LPO 1 <i>", path=policy["adapters"][0]["path"], study_id=filled.study.id
    )
    checkpoints.hide_checkpoint(lab.store, adapter.id)
    checkpoints.add_checkpoint(lab.store, kind="lrm", name="LRM 3", path=policy["search"]["lrm"])
    one, two = (
        media.add_picture(lab.store, picture(shade), prompt_id=filled.pairs[0].prompt_id, provenance=provenance)
        for shade, provenance in ((700, {"policy": policy}), (701, PROVENANCE))
    )
    pair = studies.add_pair(lab.store, filled.study.id, filled.pairs[0].prompt_id, one.id, two.id, origin="form")
    for html in (data.told(lab, "pair", pair.id), data.told(lab, "picture", one.id)):
        assert "scenes + LPO 1 &lt;i&gt; × 0.5 + 01234567/step-000007 + best of 4 (LRM 3)" in html
    assert data.told(lab, "pair", 999) == data.told(lab, "picture", 999) == data.HINT


def test_blind_pictures_stay_hidden_everywhere(store, filled):
    """Until the verdict neither pictures nor pairs of a comparison appear, nor an old picture with the same file."""
    row = comparisons.create_comparison(
        store, filled.study.id, {"base": "scenes"}, {"base": "x"}, prompts=["a blue star"], seeds=[1, 2], votes=2
    )
    for seed, known in ((1, 0), (2, 500)):
        comparisons.add_comparison_pair(
            store,
            row.id,
            "a blue star",
            seed,
            picture(known),
            picture(600 + seed),
            {**PROVENANCE, "seed": seed},
            {**PROVENANCE, "seed": seed},
        )
    comparisons.start_voting(store, row.id)
    asked = comparisons.next_comparison_pairs(store, row.id, filled.ada.id, 2)
    hashes = {item[side] for item in asked for side in ("first", "second")}
    assert len(hashes) == 4
    shown = {p["hash"] for p in browse.pictures(store, Filters(), 0, 500)[1]}
    assert not shown & hashes
    assert len(shown) == 11  # the old picture with the same file is hidden too
    assert browse.hidden(store) == (5, 2)
    assert not {item["pair_id"] for item in asked} & set(ids(browse.pairs(store, Filters(), 0, 500)))
    assert all(stories.pair_story(store, item["pair_id"]) is None for item in asked)
    for item in asked:
        labels.vote(
            store,
            study_id=filled.study.id,
            pair_id=item["pair_id"],
            annotator_id=filled.ada.id,
            choice="first",
            left="first",
            milliseconds=1,
            client_key=f"vote{item['pair_id']}",
        )
    assert browse.labels(store, Filters(), 0, 500)[0] == 6
    comparisons.complete(store, row.id)
    assert hashes <= {p["hash"] for p in browse.pictures(store, Filters(), 0, 500)[1]}
    assert browse.labels(store, Filters(), 0, 500)[0] == 8
    assert browse.hidden(store) == (0, 0)


def test_listing_pages_and_sentences(lab, store, filled):
    plain = ("Pairs", "", filled.study.id, 0, "any", "any", "any", "any")
    value, words, number, *_ = data.listed(lab, 7, *plain, None, None)
    assert value["kind"] == "pairs" and len(value["items"]) == 6
    assert (words, number) == ("6 pairs.", 0)  # a page past the end falls back to the last one
    nothing = data.listed(lab, 0, "Pairs", "no such words", *plain[2:], None, None)[0]
    assert nothing["items"] == [] and "Nothing matches" in nothing["empty"]
    with pytest.raises(ValueError, match="first day lies after"):
        data.listed(lab, 0, *plain, 2e9, 1e9)
    head = data.overview(lab, filled.study.id)
    assert "1 tie, 0 both bad, 0 skipped; 1 simulated" in head
    assert "agreement with oneself" in head


@pytest.mark.parametrize(("kind", "words"), [("Pictures", "No pictures yet"), ("Labels", "No label yet")])
def test_an_empty_lab_says_what_to_do_first(lab, kind, words):
    value = data.listed(lab, 0, kind, "", lab.current_study().id, 0, "any", "any", "any", "any", None, None)[0]
    assert value["empty"].startswith(words) and "Label tab" in value["empty"]


@pytest.mark.parametrize(("kind", "rows"), [("zip", 6), ("parquet", 4)])  # parquet: one row an answer
def test_export_then_import_into_a_new_study(lab, store, filled, tmp_path, kind, rows):
    job = queue.get(store, data_exchange.start_export(lab, filled.study.id, kind))
    result = worker_data.run(TaskInHand(store, job))
    assert result["done"] == rows
    exported = store.runs_dir / job.id / result["path"]
    assert exported.stat().st_size == result["bytes"]
    upload = tmp_path / f"../{'My data'}.{kind}"
    upload.write_bytes(exported.read_bytes())
    other = studies.create_study(store, "Other", salt="scenes")
    job = queue.get(store, data_exchange.start_import(lab, [str(upload)], "", other.id))
    waiting = store.cache_dir / "uploads" / job.config["upload"]
    assert [file.name for file in waiting.iterdir()] == [f"My data.{kind}"]
    result = worker_data.run(TaskInHand(store, job))
    assert (result["done"], sum(result["rejected"].values())) == (rows, 0)
    assert result["labels"] > 0
    assert not waiting.exists()
    assert browse.pairs(store, Filters(study_id=other.id), 0, 50)[0] == rows


def test_hostile_and_wrong_uploads(lab, store, filled, tmp_path):
    with pytest.raises(ValueError, match="No file is chosen"):
        data_exchange.start_import(lab, None, " ", None)
    wrong = tmp_path / "notes.txt"
    wrong.write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt is not a .zip or .parquet file"):
        data_exchange.start_import(lab, [str(wrong)], "", None)
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../outside.txt", "x")
        line = '{"prompt": "p", "first": "../../etc/passwd", "second": "a.png", "choice": "first"}'
        archive.writestr("pairs.jsonl", line + "\n{oops\n")
    job = queue.get(store, data_exchange.start_import(lab, [str(evil)], "", None))
    result = worker_data.run(TaskInHand(store, job))
    assert result["pairs"] == 0 and sum(result["rejected"].values()) == 2
    assert not (tmp_path / "outside.txt").exists()
    report = data_exchange._report(result, "0" * 32, "Tastes <b>")
    assert "2 rejected" in report and "row 1" in report
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nonsense")
    job = queue.get(store, data_exchange.start_import(lab, [str(broken)], "", None))
    with pytest.raises(ValueError):
        worker_data.run(TaskInHand(store, job))
    assert not (store.cache_dir / "uploads" / job.config["upload"]).exists()
    with pytest.raises(ValueError, match="choose the file again"):
        worker_data.uploads(store, "../../etc")


def test_a_full_disk_keeps_the_upload_and_what_is_in_and_the_import_goes_on(lab, store, filled, monkeypatch):
    job = queue.get(store, data_exchange.start_export(lab, filled.study.id, "zip"))
    exported = store.runs_dir / job.id / worker_data.run(TaskInHand(store, job))["path"]
    other = storage.open(store.data_dir.parent / "other")
    its = Lab(other, Settings(data_dir=other.data_dir, workers=False))
    job = queue.get(other, data_exchange.start_import(its, [str(exported)], "", None))
    written = []

    def keep(digest, ending, data, real=other.media.keep):
        written.append(digest)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(digest, ending, data)

    with monkeypatch.context() as patch, pytest.raises(Unwritable, match=r"No space left on device.*make room"):
        patch.setattr("storage.exchange.take.ROWS", 2)
        patch.setattr(other.media, "keep", keep)
        worker_data.run(TaskInHand(other, job))
    report = worker_data.run(TaskInHand(other, job))  # Try again: the upload is still there
    assert report["finished"] and report["resumed"] > 0 and report["pairs"] == 6 and report["duplicates"] == 0
    told = explain(TaskInHand(other, job), OSError(errno.ENOSPC, "No space left on device"))
    assert told == f"The disk with {other.data_dir} is full; make room on it and try again."


def test_stopped_import_keeps_its_upload(lab, store, filled, monkeypatch):
    job = queue.get(store, data_exchange.start_export(lab, filled.study.id, "zip"))
    result = worker_data.run(TaskInHand(store, job))
    exported = store.runs_dir / job.id / result["path"]
    job = queue.get(store, data_exchange.start_import(lab, [str(exported)], "", None))
    halfway = {"done": 3, "total": 6, "pairs": 0, "rejected": {}, "left_s": 7.0, "waiting": False,
               "finished": False}  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(worker_data, "import_data", lambda *_: iter([halfway]))
        worker_data.run(TaskInHand(store, job, stop_after=0))
    assert (store.cache_dir / "uploads" / job.config["upload"]).exists()
    assert worker_data.run(TaskInHand(store, job))["finished"]


def test_download_route(lab, store, filled):
    server = FastAPI()
    server.include_router(data_routes.router(lab))
    client = TestClient(server)
    job_id = data_exchange.start_export(lab, filled.study.id, "zip")
    assert client.get(f"/exports/{job_id}").status_code == 404  # not written yet
    job = queue.claim(store, "data", "w")
    queue.finish(store, job.id, "w", worker_data.run(TaskInHand(store, job)))
    answer = client.get(f"/exports/{job_id}")
    assert answer.status_code == 200 and "Tastes.zip" in answer.headers["content-disposition"]
    for name in ("nothing", "0" * 32, "..%2f..%2flab.sqlite"):
        assert client.get(f"/exports/{name}").status_code == 404
    assert "Download" in data_exchange.progress(lab)[0]


def small_parquet(path, numbers):
    """Pick-a-Pic rows; numbers below 0 have no caption."""
    rows = [
        {
            "caption": None if n < 0 else "a cat", "label_0": 1.0, "label_1": 0.0,
            "jpg_0": picture_bytes(2 * abs(n)), "jpg_1": picture_bytes(2 * abs(n) + 1),
        }
        for n in numbers
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_several_parts_are_one_import(lab, store, tmp_path):
    parts = [small_parquet(tmp_path / f"train-{n}.parquet", [2 * n, 2 * n + 1]) for n in range(2)]
    job = queue.get(store, data_exchange.start_import(lab, parts[::-1], "", None))
    result = worker_data.run(TaskInHand(store, job))
    assert (result["done"], result["pairs"]) == (4, 4)
    assert not (store.cache_dir / "uploads" / job.config["upload"]).exists()
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"choose \.parquet files only"):
        data_exchange.start_import(lab, [parts[0], str(tmp_path / "a.zip")], "", None)


def test_a_path_on_this_machine(lab, store, tmp_path):
    path = small_parquet(tmp_path / "big.parquet", [1, -2, 3])
    job = queue.get(store, data_exchange.start_import(lab, None, f" {path} ", None))
    assert f"Import of {path}<" in data_exchange.progress(lab)[0]  # the page empties the box
    task = TaskInHand(store, job)
    assert worker_data.run(task)["pairs"] == 2
    assert (tmp_path / "big.parquet").exists()  # not ours to delete
    assert task.said[0][1].startswith("3 of 3 rows read, 2 pairs are new, 1 rejected; about")
    with pytest.raises(ValueError, match="There is no file or folder"):
        data_exchange.start_import(lab, None, str(tmp_path / "gone"), None)
    with pytest.raises(ValueError, match="needs a base model"):
        data_exchange.start_import(lab, None, path, None, " ")
    with pytest.raises(ValueError, match="There is no model at sd15"):
        data_exchange.start_import(lab, None, path, None, "sd15")
    job = queue.get(store, data_exchange.start_import(lab, None, path, None, "owner/sd15"))
    made = worker_data.run(TaskInHand(store, job))["study_id"]
    assert (studies.get_study(store, made).name, studies.get_study(store, made).base) == ("big (2)", "owner/sd15")


def test_a_lab_that_others_can_reach_reads_its_inbox_only(store, tmp_path):
    path = small_parquet(tmp_path / "secret.parquet", [1])
    public = Lab(store, Settings(data_dir=store.data_dir, host="0.0.0.0", workers=False))
    inbox = store.data_dir / "inbox"
    inbox.mkdir()
    (inbox / "link.parquet").symlink_to(path)
    for text in (path, "../../secret.parquet", "link.parquet"):
        with pytest.raises(ValueError, match=r"only what lies in .*inbox is read"):
            data_exchange.start_import(public, None, text, None)
    small_parquet(inbox / "mine.parquet", [1])
    assert data_exchange.start_import(public, None, "mine.parquet", None)


def test_rejected_rows_can_be_downloaded(lab, store, tmp_path):
    server = FastAPI()
    server.include_router(data_routes.router(lab))
    client = TestClient(server)
    job_id = data_exchange.start_import(lab, [small_parquet(tmp_path / "a.parquet", [1, -2, -3, 4])], "", None)
    assert client.get(f"/imports/{job_id}/rejected.csv").status_code == 404
    job = queue.claim(store, "data", "w")
    assert "data-act" in data_exchange.progress(lab)[0]
    queue.finish(store, job.id, "w", worker_data.run(TaskInHand(store, job)))
    got = client.get(f"/imports/{job_id}/rejected.csv")
    assert got.text.splitlines() == ["row,reason", "2,the row has no caption", "3,the row has no caption"]
    assert "a-parquet-rejected.csv" in got.headers["content-disposition"]
    assert f"imports/{job_id}/rejected.csv" in data_exchange.progress(lab)[0]
    assert client.get(f"/exports/{job_id}").status_code == 404
