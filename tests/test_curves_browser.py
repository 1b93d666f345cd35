"""The Curves and Train tabs in a real browser, on a lab whose traces and runs were made by hand: no worker needed."""

import csv
import io
import json
import re

import pytest
from conftest import unfold
from PIL import Image
from playwright.sync_api import expect

import storage
from app import traces
from app.lab import Lab, Settings
from app.tabs import curves
from lpo.config import LPOConfig, LRMConfig, TraceConfig, from_preset, to_dict
from storage import jobs as queue
from storage import traces as stored

SCORES = [1.0, 1.5, 1.2, 2.0, 2.5]
COLORS = [(40 * i, 90, 160) for i in range(5)]
PROMPT = "a red star"


@pytest.fixture
def page_of(start_server, tmp_path, page):
    """Opens a tab of a running lab that `make(lab)` filled."""

    def open_tab(make, tab):
        store = storage.open(tmp_path / "lab")
        lab = Lab(store, Settings(data_dir=store.data_dir, workers=False))
        make(lab)
        store.close()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(start_server("--no-workers").url)
        page.click(f"#tab-{tab}-button")
        return page, errors

    return open_tab


def make_trace(lab):
    """Two seeds of a trace of four steps, pictures and siblings included, as the worker leaves them."""
    config = from_preset(TraceConfig, "scenes", siblings=4, steps=4, prompt=PROMPT, seeds=[0, 7])
    policy = {"base": "scenes", "adapters": []}
    planned = traces.plan([("base", policy)], config)
    job = queue.submit(
        lab.store,
        "trace",
        "interactive",
        {"traces": planned, "lrms": [["Scenes, as shipped", "scenes"]], "total": 4},
        study_id=lab.current_study().id,
    )
    for offset, item in enumerate(planned):
        folder = traces.folder(lab.store, item["key"])
        (folder / "x0").mkdir(parents=True)
        for step, color in enumerate(COLORS):
            Image.new("RGB", (64, 64), color).save(folder / "x0" / f"step_{step:02d}.webp", lossless=True)
        row = stored.add_trace(lab.store, key=item["key"], path=folder, prompt=PROMPT, seed=0, policy=policy, config={})
        steps = [
            {"step": i, "t": (751, 501, 251, 1, 0)[i], "score": s + offset}
            | ({"low": s + offset - 1, "high": s + offset + 1, "threshold": 0.5} if i else {})
            for i, s in enumerate(SCORES)
        ]
        stored.save_scores(lab.store, row.id, "scenes", steps)
    queue.finish(lab.store, queue.claim(lab.store, "interactive", "test").id, "test")
    choice = {"prompt": PROMPT, "seeds": "0 7", "policies": ["base"], "lrms": ["scenes"]}
    curves.remember(lab, {**choice, "request": {"job": job.id, **job.config}})


def test_curves_come_back_and_hovering_shows_the_predicted_picture(page_of):
    page, errors = page_of(make_trace, "curves")
    page.wait_for_selector("#curves-plot .rp-card img")
    expect(page.locator("#curves-prompt textarea, #curves-prompt input")).to_have_value(PROMPT)
    expect(page.locator("#curves-plot .rp-head").first).to_have_text("The pictures")
    box = page.locator("#curves-plot .nsewdrag").first.bounding_box()
    at = {"x": box["x"] + box["width"] * (1000 - 501) / 1000, "y": box["y"] + box["height"] * 0.4}
    page.mouse.move(at["x"] - 5, at["y"])
    page.mouse.move(at["x"], at["y"])
    page.wait_for_function("document.querySelector('#curves-plot .rp-head').textContent === 't = 501 · step 2 of 4'")
    page.wait_for_function(
        """() => { const image = document.querySelector('#curves-plot .rp-card img');
        const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
        const context = canvas.getContext('2d'); context.drawImage(image, 0, 0, 1, 1);
        const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
        return Math.abs(r - 40) < 9 && Math.abs(g - 90) < 9 && Math.abs(b - 160) < 9; }"""
    )
    page.mouse.click(at["x"], at["y"])
    page.wait_for_selector("#curves-plot dialog[open] figure:nth-child(2) img")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "document.querySelector('#curves-plot dialog .rp-head').textContent === 't = 251 · step 3 of 4'"
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("#curves-plot dialog", state="hidden")

    page.check("#curves-siblings input")
    page.wait_for_function("document.querySelector('#curves-plot .rp-card').textContent.includes('kept')")

    with page.expect_download() as download:
        page.click("#curves-plot [data-export=csv]")
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    assert [float(r["score"]) for r in rows if r["seed"] == "0"] == SCORES
    assert download.value.suggested_filename == "reward-curves.csv"
    with page.expect_download() as download:
        page.click("#curves-plot [data-export=svg]")
    assert "<svg" in download.value.path().read_text()
    with page.expect_download() as download:
        page.click("#curves-plot [data-export=html]")
    text = download.value.path().read_text()
    assert "Plotly.newPlot" in text
    assert "src=" not in text.split("<script>")[0]

    page.set_viewport_size({"width": 390, "height": 844})  # a phone: one column, and nothing written beyond its edge
    page.wait_for_function("document.querySelector('#curves-prompt').offsetWidth > 340")
    page.wait_for_function(
        """[...document.querySelectorAll('#curves-plot text')].every(e => e.getBoundingClientRect().right <= 390)"""
    )

    page.fill("#curves-seeds textarea, #curves-seeds input", "a b")
    page.click("#curves-trace")
    page.wait_for_selector("#curves-status :text('Seeds are')")
    assert not errors


def test_a_search_becomes_a_policy_and_bad_settings_are_told(page_of, tmp_path):
    page, errors = page_of(make_trace, "curves")
    page.wait_for_selector("#curves-plot .rp-card img")
    unfold(page.locator("#curves-search button").first)
    page.fill("#curves-search-candidates input", "65")
    page.click("#curves-search-add")
    page.wait_for_selector("#curves-search-told :text('candidates is 65')")
    page.fill("#curves-search-candidates input", "3")
    page.click("#curves-search-add")
    page.wait_for_selector("#curves-search-told :text('base + best of 3 (Scenes, as shipped)')")
    page.click("#curves-trace")
    page.wait_for_selector("#curves-status :text('Waiting for a lab that runs with its workers')")
    store = storage.open(tmp_path / "lab")
    job = queue.list_jobs(store, kinds=("trace",), states=("queued",))[0]
    store.close()
    assert [(policy.get("search") or {}).get("candidates") for policy in job.config["policies"]] == [None, 3]
    page.reload()  # the list keeps it
    page.click("#tab-curves-button")
    page.wait_for_selector("#curves-status :text('Waiting for a lab that runs with its workers')")
    expect(page.locator("text=base + best of 3 (Scenes, as shipped)").first).to_be_attached()
    assert not errors


def make_runs(lab):
    """A finished LRM, and an LPO run that was stopped."""
    study = lab.current_study().id
    estimate = {"value": 0.8, "low": 0.7, "high": 0.9}
    result = {
        "heldout": {"decided": 40, "accuracy": estimate},
        "heldout_by_timestep": [{"t": t, "accuracy": estimate, "ece": estimate} for t in (1, 501, 951)],
    }
    rows = [
        {"step": i, "total": 10, "seconds": i, "left_s": 10 - i, "loss": 0.6, "accuracy": 0.7} for i in range(1, 11)
    ]
    first = queue.submit(lab.store, "train-lrm", "training", to_dict(from_preset(LRMConfig, "scenes")), study_id=study)
    write(lab, first.id, rows)
    queue.finish(lab.store, queue.claim(lab.store, "training", "test").id, "test", result)
    second = queue.submit(lab.store, "train-lpo", "training", to_dict(from_preset(LPOConfig, "scenes")), study_id=study)
    lpo = [{"step": i, "total": 60, "seconds": i, "left_s": 9, "reward": i, "kept_fraction": 0.97} for i in range(1, 6)]
    folder = write(lab, second.id, lpo)
    (folder / "samples" / "step_000005").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "samples" / "step_000005" / "prompt0_seed0.png")
    queue.claim(lab.store, "training", "test")
    queue.stopped(lab.store, second.id, "test")


def write(lab, job_id, rows):
    folder = lab.store.runs_dir / job_id
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"number": 4, "threads": 1}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    return folder


def test_the_first_training_is_drawn_as_any_other(page_of, tmp_path):
    """Its plot lies in a column that was hidden when the page came: there Gradio forgets what a component was given
    beside its value."""
    page, errors = page_of(lambda lab: None, "train")
    expect(page.locator("#train-head")).to_contain_text("Nothing has been trained yet")
    store = storage.open(tmp_path / "lab")
    make_runs(Lab(store, Settings(data_dir=store.data_dir, workers=False)))
    store.close()
    page.click("#tab-label-button")
    page.click("#tab-train-button")
    page.wait_for_selector("#train-plot .main-svg")
    bottom = "e => e.getBoundingClientRect().bottom"
    drawn = max(svg.evaluate(bottom) for svg in page.locator("#train-plot .main-svg").all())
    assert page.locator("#train-plot .rp-export").evaluate("e => e.getBoundingClientRect().top") >= drawn
    expect(page.locator("#train-plot .rp-plot")).to_have_css("min-height", "370px")
    with page.expect_download() as download:
        page.click("#train-plot [data-export=csv]")
    assert download.value.suggested_filename == "training.csv"
    assert not errors


def test_trainings_are_shown_resumed_started_and_deleted(page_of, tmp_path):
    def with_store(act):
        store = storage.open(tmp_path / "lab")
        found = act(store)
        store.close()
        return found

    page, errors = page_of(make_runs, "train")
    page.wait_for_selector("#train-list .tq-row >> nth=1")
    expect(page.locator("#train-head")).to_contain_text("97% of the pairs are kept")
    expect(page.locator("#train-resume")).to_be_visible()
    expect(page.locator("#train-stop")).to_be_hidden()
    page.get_by_role("tab", name="Pictures").click()
    page.wait_for_selector("#train-pictures img")
    page.get_by_role("tab", name="Log").click()
    expect(page.locator("#train-log textarea")).to_have_value(re.compile(r"line 999$"))
    assert len(page.input_value("#train-log textarea").splitlines()) <= 200

    page.click("#train-list .tq-row:has-text('LRM 4')")
    page.wait_for_selector("#train-head :text('it agrees with 80% of 40 held-out labels')")
    page.get_by_role("tab", name="Plots").click()
    page.wait_for_selector("#train-plot .errorbar")

    page.click("#train-list .tq-row:has-text('LPO 4')")
    page.click("#train-resume")
    page.wait_for_selector("#train-list .tq-row:has-text('LPO 4'):has-text('waiting')")

    # the list is drawn anew, with one more, while a row is pressed: that row is chosen
    row = page.locator("#train-list .tq-row:has-text('LRM 4')")
    row.hover()
    page.mouse.down()
    other = to_dict(from_preset(LPOConfig, "scenes", iterations=9))
    with_store(lambda store: queue.submit(store, "train-lpo", "training", other))
    page.wait_for_selector("#train-list .tq-row:has-text(', 9 iterations')")
    page.mouse.up()
    expect(row).to_have_attribute("aria-pressed", "true")
    row = page.locator("#train-list .tq-row:has-text('LPO 4')")
    row.press("Enter")
    expect(row).to_have_attribute("aria-pressed", "true")

    unfold(page.get_by_role("tab", name="Adapter"))
    page.get_by_label("iterations").fill("-3")
    page.wait_for_selector("#train-lpo-cost :text('iterations is -3')")
    page.get_by_label("iterations").fill("7")
    page.click("#train-lpo-start")  # before the estimate has come
    page.wait_for_selector("#train-list .tq-row:has-text(', 7 iterations')")
    page.wait_for_selector("#train-lpo-cost :text('About')")
    page.wait_for_selector("#train-lpo-told :text('in the queue')")

    page.click("#train-list .tq-row:has-text('LRM 4')")
    page.wait_for_selector("#train-delete >> visible=true")
    page.click("#train-delete")
    page.click("#train-delete-yes")
    page.wait_for_selector("#train-list .tq-row:has-text('LRM 4')", state="detached")
    kinds = with_store(lambda store: [(job.kind, job.state) for job in queue.list_jobs(store)])
    assert kinds == [("train-lpo", "queued")] * 3
    assert not errors
