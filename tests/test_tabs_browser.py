"""What late answers must not do: undo a choice, cover the answer to a later click, start a thing twice. What impatient
people do, behind a slow line; how the handlers are wired for it is read in test_tabs.py.
"""

import pytest
from conftest import unfold
from playwright.sync_api import Page, expect

import storage
from app.choices import WARM_LRM
from app.lab import CURRENT_STUDY
from lpo.config import LPOConfig, from_preset, to_dict
from storage import checkpoints, studies
from storage import jobs as queue

SLOW_LINE = """() => {
  const send = window.fetch;
  window.fetch = (...request) => new Promise(done => setTimeout(() => done(send(...request)), 300));
}"""


@pytest.fixture
def slow(start_server, page):
    """A store with three studies, an LRM, an adapter and three cancelled trainings, and a page that shows it."""
    server = start_server("--no-workers")
    store = storage.open(server.data_dir)
    study = storage.labels.list_studies(store)[0]
    for name in ("Second", "Third"):
        studies.create_study(store, name, question=f"{name} question?")
    checkpoints.add_checkpoint(store, kind="lrm", name="LRM 1", path=f"{WARM_LRM}/.", study_id=study.id)
    checkpoints.add_checkpoint(store, kind="adapter", name="LPO 1", path="/nowhere", study_id=study.id)
    for iterations in (11, 12, 13):
        config = to_dict(from_preset(LPOConfig, "scenes", iterations=iterations))
        job = queue.submit(store, "train-lpo", "training", config, study_id=study.id)
        queue.request_stop(store, job.id)
    page.goto(server.url)
    yield store, page
    store.close()


def choose(page: Page, box: str, name: str) -> None:
    page.click(f"{box} input")
    page.get_by_role("option", name=name, exact=True).click()


def test_what_was_clicked_and_typed_counts_behind_a_slow_line(slow):
    store, page = slow
    page.evaluate("window.quick = window.fetch")
    start_and_delete(store, page)
    page.evaluate("window.fetch = window.quick")
    type_and_choose(store, page)


def start_and_delete(store, page: Page) -> None:
    page.click("#tab-train-button")
    adapter = page.get_by_role("tab", name="2 · Adapter (LPO)")
    adapter.click()
    judge = page.locator("#train-lpo-judge input")
    expect(judge).to_have_value("LRM 1")
    expect(page.locator("#train-lpo-cost")).to_contain_text("About")
    page.dblclick("#train-lpo-start", delay=50)
    expect(page.locator("#train-lpo-told")).to_contain_text("in the queue")
    page.get_by_role("tab", name="1 · Reward model (LRM)").click()
    started = lambda: queue.list_jobs(store, kinds=("train-lpo",), states=("queued",))  # noqa: E731
    assert len(started()) == 1
    queue.request_stop(store, started()[0].id)  # nothing moves: no poll hides what follows

    page.evaluate(SLOW_LINE)
    adapter.click()
    choose(page, "#train-lpo-judge", "Scenes, as shipped")  # before the list has come anew
    choose(page, "#train-lpo-preset", "official")
    page.click("#train-lpo-start")
    expect(page.locator("#train-lpo-told")).to_contain_text("in the queue")
    expect(judge).to_have_value("Scenes, as shipped")
    (job,) = started()
    assert job.config["iterations"] == to_dict(from_preset(LPOConfig, "official"))["iterations"]
    assert job.config["lrm"] == "scenes"

    expect(page.locator("#train-list .tq-row")).to_have_count(5)  # the new one has come, and nothing moves any more
    # another training is clicked while the question stands: what was asked about is deleted, and the last click shown
    page.click("#train-list .tq-row:has-text('11 iterations')")
    expect(page.locator("#train-list .tq-row:has-text('11 iterations')")).to_have_attribute("aria-pressed", "true")
    page.click("#train-delete")
    page.locator("#train-delete-yes").wait_for()
    page.click("#train-list .tq-row:has-text('12 iterations')")
    page.click("#train-delete-yes")
    page.click("#train-list .tq-row:has-text('13 iterations')")
    expect(page.locator("#train-list .tq-row:has-text('11 iterations')")).to_have_count(0)
    expect(page.locator("#train-list .tq-row:has-text('13 iterations')")).to_have_attribute("aria-pressed", "true")
    assert len(queue.list_jobs(store, kinds=("train-lpo",), states=("cancelled",))) == 3


def type_and_choose(store, page: Page) -> None:
    page.click("#tab-compare-button")
    count, votes = page.locator("#compare-count input"), page.locator("#compare-votes input")
    expect(page.get_by_label("policy B")).to_have_value("LPO 1")  # the tab has its answer
    strength = page.get_by_label("number input for strength", exact=True).first
    strength.fill("99")
    expect(strength).to_have_value("2")
    page.click("#tab-curves-button")
    prompt = page.locator("#curves-prompt textarea, #curves-prompt input")
    expect(prompt).not_to_have_value("")
    prompt.fill("a blue moon")

    page.evaluate(SLOW_LINE)
    page.click("#tab-compare-button")
    count.fill("10")
    expect(votes).to_have_value("10")  # as many as pairs, said by the page itself
    votes.fill("5")
    page.click("#tab-curves-button")
    page.click("#tab-label-button")
    unfold(page.get_by_role("button", name="Studies"))
    choose(page, "#label-study", "Second")
    choose(page, "#label-study", "Third")
    expect(page.locator("#label-about")).to_contain_text("Third question?")
    expect(page.locator("#label-study input")).to_have_value("Third")
    assert checkpoints.get_setting(store, CURRENT_STUDY) == storage.labels.list_studies(store)[2].id
    expect(prompt).to_have_value("a blue moon")
    expect(votes).to_have_value("5")
