"""What the Train tab says and shows, nearly all without a browser."""

import json

import gradio as gr
import pytest
from PIL import Image
from playwright.sync_api import expect

import storage
from app import choices, jobs, training, training_figures, training_html
from app.tabs import compare_form, curves, train, train_queue
from lpo.config import LPOConfig, LRMConfig, from_preset, to_dict
from storage import checkpoints
from storage import jobs as queue


def counts(train, heldout, **choices_):
    return {"train": train, "heldout": heldout, "choices": choices_}


@pytest.mark.parametrize(
    ("train", "words"),
    [(0, "nothing to train on"), (10, "too few"), (60, "first try"), (150, "clear, simple taste"), (900, "Plenty")],
)
def test_whether_the_labels_suffice_is_said_in_words(train, words):
    assert words in training.sufficiency(counts(train, 20), True)


def test_what_is_not_known_about_accuracy_is_said_too():
    assert "None is held out yet" in training.sufficiency(counts(50, 0), True)
    assert "So few held-out labels say little" in training.sufficiency(counts(1, 1), True)
    assert "**1 usable label** to train on" in training.sufficiency(counts(1, 1), True)
    assert "± 20 points" in training.sufficiency(counts(50, 24), True)
    assert "(skipped and both-bad answers, 7 here, do not train)" in training.sufficiency(
        counts(50, 24, skip=3, both_bad=4, first=70), True
    )


def test_the_command_line_says_what_differs_from_the_preset():
    config = from_preset(LRMConfig, "scenes", steps=77, pairs="/data/pairs.jsonl")
    line = training.command("train-lrm", "scenes", config)
    assert line == "python -m lpo train-lrm --preset scenes --pairs pairs.jsonl --steps 77 --run-dir runs/my-lrm"
    policy = {"base": "scenes", "adapters": [{"path": "runs/a b/final", "strength": 1.0}]}
    line = training.command("train-lpo", "scenes", from_preset(LPOConfig, "scenes", policy=policy))
    assert "'runs/a b/final@1'" in line
    assert line.startswith("python -m lpo train-lpo --preset scenes --prompts prompts.json ")
    assert "--eval_prompts" not in line
    line = training.command("train-lpo", "scenes", from_preset(LPOConfig, "scenes"), heldout=True)
    assert "--prompts prompts.json --eval_prompts eval_prompts.json --run-dir" in line


def write_run(lab, kind, rows, result=None, **config):
    """A job that ran: its row in storage, metrics and result."""
    cls = {"train-lrm": LRMConfig, "train-lpo": LPOConfig}[kind]
    job_id = jobs.submit(lab, kind, to_dict(from_preset(cls, "scenes", **config)), lab.current_study().id)
    folder = jobs.run_dir(lab, job_id)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"number": 3, "threads": 1}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if result is not None:
        assert queue.claim(lab.store, "training", "test").id == job_id
        queue.finish(lab.store, job_id, "test", result)
    return job_id


def lpo_rows(n=12, kept=0.3, **changes):
    return [
        {"step": i, "total": 60, "seconds": 6.0 * i, "left_s": 6.0 * (60 - i), "reward": 3 + i / 50, "loss": 0.69,
         "margin": i / 10, "kept_fraction": kept, "clamp_fraction": 0.1, "drift": i / 100,
         "kept_by_t": {"951": 0.1, "51": 0.5},
         **({"heldout_reward": 3 + i / 60, "heldout_reward_reference": 3.0, "diversity": 0.5} if i % 5 == 0 else {}),
         **changes}
        for i in range(1, n + 1)
    ]  # fmt: skip


def test_the_estimate_learns_from_the_last_run(lab):
    size = {"prompts_per_iteration": 6, "steps": 20, "siblings": 4, "t_min": 0, "t_max": 1000}
    size |= {"eval_every": 10, "eval_count": 16, "eval_seeds": 2}
    config = from_preset(LPOConfig, "scenes", iterations=20, **size)
    assert "on one processor core" in training.estimate(lab, "train-lpo", config)
    write_run(lab, "train-lpo", lpo_rows(), iterations=20, **size)
    assert training.estimate(lab, "train-lpo", config) == "About 6 minutes, judging by your last run."
    # 40 x 6 x 20 x 3 and 5 evaluations of 32 x 20, against 20 x 6 x 20 x 3 and 3 evaluations: 1.93 times as much
    twice = from_preset(LPOConfig, "scenes", iterations=40, **size)
    assert training.estimate(lab, "train-lpo", twice) == "About 12 minutes, judging by your last run."
    slow = [{**row, "seconds": row["seconds"] + 60} for row in lpo_rows()]  # a minute of loading is spent once
    write_run(lab, "train-lpo", slow, iterations=20, **size)
    assert training.estimate(lab, "train-lpo", twice) == "About 13 minutes, judging by your last run."


@pytest.mark.parametrize(
    ("labels", "changes", "words"),
    [
        (25, {}, "14 of the 100 steps are taken: no label is seen more than 10 times."),  # ceil(10 * 22 / 16)
        (200, {}, ""),
        (200, {"max_epochs": 0}, ""),
        (25, {"max_epochs": 0}, "Every label is seen 73 times, and so learned by heart"),
        (0, {}, ""),
    ],
)
def test_few_labels_are_not_learned_by_heart(lab, labels, changes, words):
    told = training.estimate(lab, "train-lrm", from_preset(LRMConfig, "scenes", **changes), labels=labels)
    assert words in told and ("label" in told) == bool(words)
    seconds = training.estimate(lab, "train-lrm", from_preset(LRMConfig, "scenes", steps=14))
    assert (told.split(" on")[0] == seconds.split(" on")[0]) == words.startswith("14")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (lpo_rows(kept=0.3), None),
        (lpo_rows(kept=0.01), "Only 1.0% of the pairs are kept"),
        (lpo_rows(kept=0.97), "97% of the pairs are kept"),
        (lpo_rows(n=2, kept=0.97), None),
        (lpo_rows(clamp_fraction=0.8), "at the clamp"),
    ],
)
def test_warnings_are_plain_sentences(rows, words):
    found = training.warnings("train-lpo", rows)
    assert [w for w in found if words and words in w] if words else not found


def test_a_falling_held_out_reward_points_to_an_earlier_checkpoint():
    rows = [{"step": i, "heldout_reward": r} for i, r in enumerate([3.0, 3.5, 3.4, 3.2])]
    assert "earlier checkpoint" in training.warnings("train-lpo", rows)[0]


def test_an_lrm_no_better_than_guessing_is_called_that():
    result = {"heldout": {"decided": 20, "accuracy": {"value": 0.6, "low": 0.4, "high": 0.8}}}
    assert "not yet surely better than guessing" in training.outcome("train-lrm", result)
    result["heldout"]["accuracy"] = {"value": 0.6, "low": 0.55, "high": 0.65}  # a bootstrap that is too sure
    assert "95% interval 39% to 78%" in training.outcome("train-lrm", result)  # Wilson's, from its table: 12 of 20
    result["heldout"]["accuracy"] = {"value": 0.8, "low": 0.62, "high": 0.93}
    assert training.outcome("train-lrm", result).endswith("then train an adapter with it (2 · Adapter).")
    assert "nobody knows how good" in training.outcome("train-lrm", {"heldout": None})


def test_reward_against_drift_starts_at_the_reference():
    figure = training_figures.lpo(lpo_rows())["figure"]
    assert figure["layout"]["xaxis2"]["nticks"] == 4  # of more, the numbers of a short training lie on each other
    data = figure["data"]
    path = next(d for d in data if d["mode"] == "lines+markers+text")
    assert (path["x"][0], path["y"][0], path["text"][0]) == (0.0, 3.0, "step 0")
    assert path["text"][-1] == "step 10"
    assert path["x"][1:] == [0.05, 0.1]


def test_lrm_figures_gain_timesteps_when_the_result_is_there():
    rows = [{"step": i, "loss": 0.6, "accuracy": 0.7} for i in range(1, 5)]
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8}
    result = {"heldout_by_timestep": [{"t": t, "accuracy": estimate, "ece": estimate} for t in (1, 501)]}
    assert len(training_figures.lrm(rows, None)["figure"]["data"]) == 2
    with_result = training_figures.lrm(rows, result)["figure"]
    assert [d["error_y"]["array"] for d in with_result["data"] if "error_y" in d] == [pytest.approx([0.1, 0.1])] * 2
    assert with_result["layout"]["xaxis3"]["range"] == [1000, 0]
    clipped = [name for name, axis in with_result["layout"].items() if "autorangeoptions" in str(axis)]
    assert clipped == ["yaxis2", "yaxis3", "yaxis4"]  # the shares; the loss has no bounds


def test_the_queue_shows_what_is_needed_and_escapes_what_others_wrote(lab):
    first = write_run(lab, "train-lrm", [], result={"heldout": None})
    second = write_run(lab, "train-lpo", lpo_rows(kept=0.97))
    rows = jobs.list_jobs(lab, lane="training")
    html = training_html.list_html(lab, rows, second)
    assert html.count("data-job=") == 2
    assert "LRM 3" in html
    assert "waiting" in html
    head = training_html.head_html(lab, {**jobs.describe(lab, first), "state": "failed", "error": "<b>no</b>"})
    assert "&lt;b&gt;no&lt;/b&gt;" in head
    head = training_html.head_html(lab, jobs.describe(lab, second))
    assert "97% of the pairs" in head and "started with --no-workers" in head


def test_samples_are_a_grid_of_prompts_and_steps(lab):
    job_id = write_run(lab, "train-lpo", lpo_rows())
    folder = jobs.run_dir(lab, job_id)
    (folder / "eval_prompts.json").write_text(json.dumps(["a <red> star", "a moon"]))
    for step in (10, 20):
        for prompt in (0, 1):
            path = folder / "samples" / f"step_{step:06d}" / f"prompt{prompt}_seed0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    html = training_html.pictures_html(jobs.describe(lab, job_id))
    assert html.count("<img") == 4
    assert "a &lt;red&gt; star · seed 0" in html
    assert html.index("step 10") < html.index("step 20")


def test_a_finished_training_leads_to_its_curves(lab):
    job_id = write_run(lab, "train-lrm", [], result={})
    study = lab.current_study().id
    for name, final in (("LRM 3, step 100", False), ("LRM 3", True)):
        checkpoints.add_checkpoint(
            lab.store, kind="lrm", name=name, path=f"/runs/{name}", study_id=study, job_id=job_id, meta={"final": final}
        )
    train_queue.to_curves(lab, job_id)
    chosen = curves.last_choice(lab)
    assert choices.lrm(lab, chosen["lrms"][0]) == "/runs/LRM 3"
    assert chosen["go"] is True


def test_an_adapter_on_top_of_another_brings_it_along(lab):
    first = checkpoints.add_checkpoint(
        lab.store, kind="adapter", name="LPO 1", path="/a", meta={"policy": {"base": "scenes", "adapters": []}}
    )
    below = choices.policy(lab, str(first.id))
    second = checkpoints.add_checkpoint(lab.store, kind="adapter", name="LPO 2", path="/b", meta={"policy": below})
    policy = choices.policy(lab, str(second.id), 0.5)
    assert [(a["path"], a["strength"]) for a in policy["adapters"]] == [("/a", 1.0), ("/b", 0.5)]
    with pytest.raises(ValueError, match="is gone; choose another"):
        choices.policy(lab, "999")


def test_compare_with_the_base_means_the_training_that_is_looked_at(lab):
    job_id = write_run(lab, "train-lpo", lpo_rows(), result={})
    meta = {"final": True, "policy": {"base": "scenes", "adapters": []}}
    study = lab.current_study().id
    row = checkpoints.add_checkpoint(
        lab.store, kind="adapter", name="LPO 1", path="/a", study_id=study, job_id=job_id, meta=meta
    )
    checkpoints.add_checkpoint(lab.store, kind="adapter", name="LPO 2, newer", path="/b", study_id=study, meta=meta)
    train_queue.to_compare(lab, job_id)
    assert compare_form.asked(lab) == str(row.id)
    assert compare_form.asked(lab) is None  # once: the next look at the tab is as it was left


def test_the_labels_are_counted_once_when_the_tab_is_opened(lab, labelled_study, monkeypatch):
    counted, count = [], train.numbers.counts
    monkeypatch.setattr(train.numbers, "counts", lambda *study: counted.append(study) or count(*study))
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Train"):
        train.build(lab)
    handlers = list(blocks.fns.values())
    enter = next(handler for handler in handlers if handler.name == "enter")
    said, usable, *_ = enter.fn(*(each.value for each in enter.inputs))
    assert "**1 usable label**" in said and usable == 1
    for tell in [handler for handler in handlers if handler.name == "tell"]:
        _, *settings = [each.value for each in tell.inputs]
        assert "About" in tell.fn(usable, *settings)[0]
    assert len(counted) == 1


def test_nobody_trains_on_the_labels_of_a_study_that_the_tab_does_not_show(lab, labelled_study):
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Train"):
        train.build(lab)
    handlers = list(blocks.fns.values())
    enter = next(handler for handler in handlers if handler.name == "enter")
    begin = next(handler for handler in handlers if handler.name == "begin")
    place = next(i for i, each in enumerate(enter.outputs) if each is begin.inputs[1])

    def press(study):
        values = [each.value for each in begin.inputs]
        return begin.fn(values[0], study, *values[2:])[0]

    def shown():
        return enter.fn(*(each.value for each in enter.inputs))[place]

    before = shown()
    other = storage.labels.create_study(lab.store, "Mine <b>", base="scenes")
    lab.choose_study(other.id)  # on another page
    assert "the study “Mine &lt;b&gt;” was chosen" in press(before)
    assert "no label to train on yet" in press(shown())
    lab.choose_study(labelled_study.id)
    assert "in the queue" in press(before) and "in the queue" in press(None)


def test_a_training_without_a_step_shows_a_sentence_for_plots(lab):
    value = train_queue.figure(jobs.describe(lab, write_run(lab, "train-lpo", [])))
    assert value["figure"]["data"] == [] and "before the first step" in value["note"]
    value = train_queue.figure(jobs.describe(lab, write_run(lab, "train-lpo", lpo_rows())))
    assert value["figure"]["data"] and not value["note"]


def test_what_a_training_saves_while_its_exports_are_looked_at_is_offered(lab):
    job_id = write_run(lab, "train-lpo", lpo_rows())
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Train"):
        train.build(lab)
    handlers = {handler.name: handler for handler in blocks.fns.values()}
    draw, fill = handlers["draw"], handlers["fill"]
    watched = [draw.outputs.index(blocks.blocks[block]) for block, event in fill.targets if event == "change"]
    before = draw.fn(job_id, None)
    row = checkpoints.add_checkpoint(lab.store, kind="adapter", name="LPO 1", path="a", job_id=job_id)
    after = draw.fn(job_id, None)
    assert [before[place] for place in watched] != [after[place] for place in watched]
    assert fill.fn(job_id, None, None)[0].value == row.id


def test_what_the_button_said_is_seen_without_scrolling_and_goes_with_the_next_change(start_server, page, tmp_path):
    server = start_server("--no-workers")
    page.goto(server.url)
    page.click("#tab-train-button")
    page.click("#train-lrm-start")
    told = page.locator("#train-lrm-told")
    expect(told).to_contain_text("no label to train on yet")
    page.screenshot(path=tmp_path / "train.png")
    assert told.bounding_box()["y"] + told.bounding_box()["height"] < 720
    page.locator("#train-lrm").get_by_label("steps", exact=True).fill("-3")
    expect(told).not_to_contain_text("no label")
    expect(page.locator("#train-lrm-cost")).to_contain_text("steps is -3, but must be between 1 and 10,000,000.")
    page.click("#train-lrm-start")
    expect(told).to_contain_text("Nothing was started")


def test_the_command_line_of_several_devices():
    line = training.command("train-lpo", "scenes", from_preset(LPOConfig, "scenes"), 4)
    assert line.startswith("accelerate launch --multi_gpu --num_processes 4 -m lpo train-lpo --preset scenes ")


def test_devices_are_offered_where_there_are_several(start_server, page, tmp_path):
    server = start_server("--no-workers")
    store = storage.open(server.data_dir)

    def started() -> dict:
        page.click("#train-lpo-start")
        expect(page.locator("#train-lpo-told")).to_contain_text("in the queue")
        return queue.list_jobs(store, kinds=("train-lpo",), limit=1)[0].config

    def enter():
        page.goto(server.url)
        page.click("#tab-train-button")
        page.get_by_role("tab", name="2 · Adapter (LPO)").click()
        expect(page.locator("#train-lpo-cost")).to_contain_text("About")

    enter()
    assert started()["processes"] == 1
    expect(page.locator("#train-lpo-devices")).to_have_count(0)  # one device: there is nothing to choose
    checkpoints.set_setting(store, "devices", 2)
    enter()
    page.locator("#train-lpo-devices input").click()
    page.get_by_role("option", name="2").click()
    page.screenshot(path=tmp_path / "train.png")
    assert started()["processes"] == 2
    store.close()


def test_an_lrm_that_is_finished_while_the_tab_is_open_becomes_the_judge(start_server, page):
    server = start_server("--no-workers")
    store = storage.open(server.data_dir)
    page.goto(server.url)
    page.click("#tab-train-button")
    adapter, judge = page.get_by_role("tab", name="2 · Adapter (LPO)"), page.locator("#train-lpo-judge input")
    adapter.click()
    expect(judge).to_have_value("Scenes, as shipped")
    page.get_by_role("tab", name="1 · Reward model (LRM)").click()
    study = storage.labels.list_studies(store)[0]
    checkpoints.add_checkpoint(store, kind="lrm", name="LRM 1", path="runs/1/checkpoints/final", study_id=study.id)
    adapter.click()
    expect(judge).to_have_value("LRM 1")
    store.close()
