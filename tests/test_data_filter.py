"""The filter section and its jobs: a CSV or local scorers, the preview's figure, Apply, and what the training sees."""

import json
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from test_filters import imported, random_rows, write_csv  # noqa: F401  (a fixture)
from test_scorers import tiny_clip
from worker_lab import TaskInHand

from app import filter_figure, training, worker_gaps, worker_inputs
from app.tabs import data, data_filter
from app.worker_task import Stopped
from storage import filters, gaps, labels, mpcf
from storage import jobs as queue


@pytest.fixture
def joined(lab, store, tmp_path, imported):  # noqa: F811
    """(study, gap set id) with the CSV joined through its job."""
    study, rows = imported
    path = write_csv(tmp_path / "scores.csv", rows)
    job_id = data_filter.start_csv(lab, str(path), gaps.list_imports(store, study.id)[0].id, study.id)
    result = worker_gaps.run(TaskInHand(store, job_id))
    assert (result["labels"], result["disagree"], result["finished"]) == (36, 0, True)
    assert not (store.cache_dir / "uploads" / queue.get(store, job_id).config["upload"]).exists()
    return study, result["gap_set_id"]


def form(rule=mpcf.PRESETS[mpcf.DEFAULT]):
    return [*data_filter._values(rule), rule.keep_ties, rule.tie_distance, rule.name]


def test_the_form_is_the_rule():
    for rule in mpcf.PRESETS.values():
        made = data_filter.rule_of(*form(rule))
        assert (made.active, mpcf.words(made), made.name) == (rule.active, mpcf.words(rule), rule.name)
    values = form()
    values[1] = None
    with pytest.raises(ValueError, match="gate of aesthetic has no number"):
        data_filter.rule_of(*values)


def test_the_preview_counts_draws_and_shows_what_apply_will_do(lab, store, joined):
    study, gap_set = joined
    rule = mpcf.PRESETS[mpcf.DEFAULT]
    words, figure, pairs = data_filter.looked(lab, study.id, gap_set, rule)
    told = filters.preview(gaps.load(store, gap_set), rule)
    total = told["kept"] + told["dropped"]
    assert "No filter is on" in words and f"<b>{told['kept']} of {total} labels</b>" in words
    assert pairs.count("<img") == 2 * (min(6, told["kept"]) + min(6, told["dropped"])) and "fi-missed" in pairs
    by_panel: dict[tuple, list] = {}
    for row in figure["rows"]:
        by_panel.setdefault((row["pairs"], row["score"]), []).append(row)
    assert len(by_panel) == 6  # three scores, chosen pairs and ties
    for score in ("aesthetic", "CLIP", "VQA"):  # every panel counts every label
        kept = sum(row["kept"] for (_, name), rows in by_panel.items() if name == score for row in rows)
        dropped = sum(row["dropped"] for (_, name), rows in by_panel.items() if name == score for row in rows)
        assert (kept, dropped) == (told["kept"], told["dropped"])
    json.dumps(figure)
    filters.apply(store, gap_set, rule)
    assert f"MPCF rule 2 is on</b>: {told['kept']} imported labels train" in data_filter.state_html(store, study.id)


def test_bars_split_at_the_gate_when_one_score_decides(store, joined):
    _, gap_set = joined
    rule = mpcf.Rule("one", {"clip": mpcf.Gate(True, 0.01, 0.02)})
    figure = filter_figure.value(gaps.load(store, gap_set), rule)
    for row in figure["rows"]:
        if row["score"] == "CLIP" and row["pairs"] == "a picture is chosen":
            assert not (row["kept"] and row["high"] <= 0.01) and not (row["dropped"] and row["low"] > 0.01)
    lines = [s["x0"] for s in figure["figure"]["layout"]["shapes"] if s["type"] == "line"]
    assert lines == [0.01, 0.02]


def test_the_snapshot_of_a_training_says_which_filter_it_respects(lab, store, tmp_path, joined):
    study, gap_set = joined
    filters.apply(store, gap_set, mpcf.PRESETS[mpcf.DEFAULT])
    task = SimpleNamespace(
        store=store, device="cpu", folder=tmp_path, job=SimpleNamespace(kind="train-lrm", study_id=study.id, config={})
    )
    config = worker_inputs.prepare(task)
    lines = [json.loads(line) for line in Path(config["pairs"]).read_text().splitlines()]
    assert {line["filter"] for line in lines} == {"MPCF rule 2"}
    about = json.loads((tmp_path / "snapshot.json").read_text())
    assert about["pairs"] == len(lines) and about["filter"]["words"].startswith("aesthetic > -0.5")
    told = training.sufficiency(labels.counts(store, study.id), True)
    assert "The filter MPCF rule 2 keeps 1" in told or "The filter MPCF rule 2 keeps 2" in told
    filters.remove(store, study.id)
    worker_inputs.prepare(task)
    assert json.loads((tmp_path / "snapshot.json").read_text())["filter"] is None
    assert "filter" not in training.sufficiency(labels.counts(store, study.id), True)


def test_local_scorers_score_every_imported_label_and_go_on_after_a_stop(lab, store, tmp_path, imported, monkeypatch):  # noqa: F811
    study, _ = imported
    tiny_clip(tmp_path / "clip", 3)
    monkeypatch.setattr(worker_gaps, "BATCH", 10)
    paths = {"clip": str(tmp_path / "clip"), "pick": str(tmp_path / "clip"), "aesthetic": "", "aesthetic_clip": ""}
    job_id = data_filter.start_scorers(lab, study.id, paths)
    with pytest.raises(Stopped):
        worker_gaps.run(TaskInHand(store, job_id, stop_after=2))
    assert gaps.list_sets(store, study.id) == []
    task = TaskInHand(store, job_id)
    result = worker_gaps.run(task)
    assert result["labels"] == 36 and task.said[1][1] == "30 of 36 labels scored"  # 20 were done
    loaded = gaps.load(store, result["gap_set_id"])
    assert len(loaded.labels) == 36
    scale = 1 / 0.07
    assert loaded.scores["pick"] == pytest.approx(scale * loaded.scores["clip"], rel=1e-2, abs=1e-4)
    words, _, _ = data_filter.looked(lab, study.id, result["gap_set_id"], mpcf.PRESETS[mpcf.DEFAULT])
    assert "These gaps have no aesthetic, VQA" in words
    with pytest.raises(ValueError, match="No scorer is named"):
        data_filter.start_scorers(lab, study.id, dict.fromkeys(paths, ""))
    with pytest.raises(ValueError, match="There is no file or folder"):
        data_filter.start_scorers(lab, study.id, {**paths, "clip": "/nowhere"})


def test_wrong_uploads_get_a_sentence(lab, store, tmp_path):
    with pytest.raises(ValueError, match="No file is chosen"):
        data_filter.start_csv(lab, None, 1, 1)
    with pytest.raises(ValueError, match="has no finished import"):
        data_filter.start_csv(lab, str(tmp_path / "a.csv"), None, 1)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt is not a \.csv file"):
        data_filter.start_csv(lab, str(tmp_path / "a.txt"), 1, 1)


def test_the_tab_shows_what_a_job_brought_as_soon_as_it_ends(lab, store, tmp_path, imported):  # noqa: F811
    """Numbers, pages, and the choices of studies, score gaps and imports follow the end of a job by themselves."""
    study, rows = imported
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Data"):
        data.build(lab)
    functions = blocks.fns
    tick = next(each for each in functions.values() if each.targets[0][1] == "tick")
    told = {number for number, each in functions.items() if (tick.outputs[-1]._id, "change") in each.targets}
    while more := {n for n, each in functions.items() if each.trigger_after in told} - told:
        told |= more
    shown = {output.elem_id for number in told for output in functions[number].outputs}
    assert {"data-numbers", "data-browser", "data-import-study"} <= shown
    assert {"filter-study", "filter-gaps", "filter-import"} <= shown
    imports = next(each.fn for each in functions.values() if each.name == "imports")
    row = gaps.list_imports(store, study.id)[0]
    assert imports(study.id, None).value == row.id

    job_id = data_filter.start_csv(lab, str(write_csv(tmp_path / "scores.csv", rows)), row.id, study.id)
    assert tick.fn()[-1] == []
    queue.claim(store, "data", "test")
    queue.finish(store, job_id, "test", {"labels": 36})
    assert tick.fn()[-1] == [job_id]
    buttons = [number for number, each in functions.items() if each.name in ("joined", "computed")]
    after = [each.outputs for each in functions.values() if each.trigger_after in buttons]
    assert len(after) == 2 and all(tick.outputs[1] in outputs for outputs in after)  # the timer starts
