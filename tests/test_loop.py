"""The whole loop as a person walks it, in one go: the real server, an empty data folder, real keys in a real browser,
real diffusion and real training on the embedded model, only shorter than a person would choose. Label, train an LRM and
an adapter (with the browser closed meanwhile), look at a curve, vote blindly on base against adapter, read the verdict,
find the votes again as labels.
"""

import sqlite3

import pytest
from conftest import unfold, wait_for
from playwright.sync_api import Page, expect

LABELS = 14
VOTES = 3
SECONDS = 240_000  # milliseconds that a step may take on a busy machine


@pytest.fixture
def quiet_page(page):
    """A page that must not throw and must not log an error, nor any other of its context; both are told at the end."""
    complaints = []
    page.context.on("weberror", lambda error: complaints.append(f"thrown: {error.error}"))
    page.context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.context.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    yield page
    assert complaints == []


def rows(server, query: str) -> list[tuple]:
    with sqlite3.connect(f"file:{server.data_dir / 'lab.sqlite'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchall()


def fill(page: Page, area: str, **values: object) -> None:
    """Types numbers into the form of `area` by the labels that a person reads. A slider has two inputs under its label,
    and both are named otherwise: the number is typed into the one for typing."""
    for label, value in values.items():
        words = label.replace("_", " ")
        place = page.locator(area)
        box = place.get_by_label(words, exact=True).or_(place.get_by_label(f"number input for {words}", exact=True))
        box.fill(str(value))
        box.press("Tab")


def vote(page: Page, server, picker: str, key: str) -> None:
    """One answer with a real key, once the picker is armed; then waits until it has become a row."""
    before = rows(server, "select count(*) from preference")
    page.wait_for_selector(f'{picker} .pp[data-armed="yes"]')
    page.wait_for_timeout(150)  # a person is not faster; the picker ignores the second half of a double press
    page.keyboard.press(key)
    wait_for(lambda: rows(server, "select count(*) from preference") != before, what=f"the answer of {key}")


def start(page: Page, kind: str) -> None:
    """Presses the button of a training."""
    page.click(f"#{kind}-start")
    expect(page.locator(f"#{kind}-told")).to_contain_text("in the queue")


def ended_well(page: Page, server, kind: str, words: str) -> None:
    """Waits until the page says `words` of a training."""
    page.wait_for_function("words => document.querySelector('#train-head')?.innerText.match(words)", arg=words)
    assert ("done", kind) in rows(server, "select state, kind from job")


def test_the_loop_from_an_empty_folder_to_a_verdict(server, quiet_page):
    page = quiet_page
    page.goto(server.url)
    label(page, server)
    train_lrm(page, server)
    page = train_lpo(page, server)
    look_at_curves(page, server)
    compare(page, server)
    find_the_votes(page, server)


def label(page: Page, server) -> None:
    for i in range(LABELS):
        vote(page, server, "#label-picker", "ArrowLeft" if i % 3 else "ArrowRight")
    vote(page, server, "#label-picker", "u")
    vote(page, server, "#label-picker", "ArrowDown")
    expect(page.locator("#label-picker .pp-saved")).to_have_attribute("data-state", "saved")
    choices = [choice for (choice,) in rows(server, "select choice from preference")]
    assert len(choices) == LABELS + 2
    assert {"first", "second", "tie"} <= set(choices)


def train_lrm(page: Page, server) -> None:
    unfold(page.locator("#tab-train-button"))
    fill(page, "#train-lrm", steps=6, batch_size=8)
    start(page, "train-lrm")
    ended_well(page, server, "train-lrm", "The LRM is ready")


def train_lpo(page: Page, server) -> Page:
    """The browser is closed while it trains; another window finds the training again."""
    page.get_by_role("tab", name="2 · Adapter (LPO)").click()
    unfold(page.locator("#train-lpo").get_by_text("All other settings"))
    fill(page, "#train-lpo", iterations=2, eval_count=2, eval_seeds=1, prompts_per_iteration=3)
    start(page, "train-lpo")
    context = page.context
    page.close()
    wait_for(lambda: ("train-lpo", "running") in rows(server, "select kind, state from job"), what="the training")
    page = context.new_page()
    page.goto(server.url)
    page.click("#tab-train-button")
    ended_well(page, server, "train-lpo", "The adapter is ready|The reward on held-out")
    return page


def look_at_curves(page: Page, server) -> None:
    page.click("#tab-curves-button")
    expect(page.locator("#curves-prompt textarea, #curves-prompt input")).not_to_have_value("")
    expect(page.locator(".token", has_text="LRM 1").first).to_be_visible()  # the lists of checkpoints are there
    page.click("#curves-trace")
    wait_for(lambda: ("trace",) in rows(server, "select kind from job"), what="a trace job")
    page.wait_for_selector("#curves-plot .rp-card img")
    wait_for(lambda: rows(server, "select count(*) from trace_score")[0][0] > 0, 240, "a stored score")


def compare(page: Page, server) -> None:
    """Base against the adapter that was just trained, which the form offers by itself."""
    page.click("#tab-compare-button")
    expect(page.get_by_label("policy A")).to_have_value("base")
    expect(page.get_by_label("policy B")).to_have_value("LPO 1")
    fill(page, "#compare-new", prompts=VOTES)
    expect(page.get_by_label("votes", exact=True)).to_have_value(str(VOTES))  # as many as pairs, unless told otherwise
    page.click("#compare-go")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        vote(page, server, "#compare-picker", key)
    words = page.locator("#compare-words .vd")
    words.wait_for()
    assert f"{VOTES} votes were fixed beforehand" in words.inner_text()
    assert "Too few to tell" in words.inner_text()
    expect(page.locator("#compare-pictures .ba-row")).to_have_count(VOTES)


def find_the_votes(page: Page, server) -> None:
    unfold(page.locator("#tab-data-button"))
    page.get_by_label("Labels", exact=True).check()
    expect(page.locator("#data-note")).to_have_text(f"{LABELS + 2 + VOTES} labels.")
    assert rows(server, "select count(*) from preference where comparison_id is not null") == [(VOTES,)]
