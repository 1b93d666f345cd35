"""The loop as a person walks it, up to the adapter and its curves: the real server, an empty data folder, real keys in
headless Chromium, real diffusion and real training on the embedded model, only shorter than a person would choose.
The blind vote after it is under test in test_compare_browser.py.
"""

import sqlite3

from conftest import wait_for

LABELS = 14
SECONDS = 240_000  # milliseconds that a step may take on a busy machine


def rows(server, query: str) -> list[tuple]:
    with sqlite3.connect(f"file:{server.data_dir / 'lab.sqlite'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchall()


def fill(page, area: str, **values: object) -> None:
    """Types numbers into the form of `area` by the labels that a person reads."""
    for label, value in values.items():
        box = page.locator(area).get_by_label(label.replace("_", " "), exact=True)
        box.fill(str(value))
        box.press("Tab")


def vote(page, server, picker: str, key: str) -> None:
    """One answer with a real key, once the picker is armed; then waits until it has become a row."""
    before = rows(server, "select count(*) from preference")
    page.wait_for_selector(f'{picker} .pp[data-armed="yes"]', timeout=SECONDS)
    page.wait_for_timeout(150)  # a person is not faster; the picker ignores the second half of a double press
    page.keyboard.press(key)
    wait_for(lambda: rows(server, "select count(*) from preference") != before, what=f"the answer of {key}")


def wait_for_job(page, server, kind: str, words: str) -> None:
    """Waits until the page says `words` of the job, then makes sure that the job did end well."""
    page.wait_for_function(
        "words => document.querySelector('#train-head')?.innerText.match(words)", arg=words, timeout=SECONDS
    )
    assert ("done", kind) in rows(server, "select state, kind from job")


def test_label_train_look_and_align(server, page):
    page.set_default_timeout(SECONDS)
    page.goto(server.url)

    for i in range(LABELS):
        vote(page, server, "#label-picker", "ArrowLeft" if i % 3 else "ArrowRight")
    vote(page, server, "#label-picker", "u")
    vote(page, server, "#label-picker", "ArrowDown")
    page.wait_for_function("/saved/i.test(document.querySelector('#label-picker .pp-saved-text').textContent)")
    choices = [choice for (choice,) in rows(server, "select choice from preference")]
    assert len(choices) == LABELS + 2
    assert {"first", "second", "tie"} <= set(choices)

    page.click("#tab-train-button")
    fill(page, "#train-lrm", steps=6, batch_size=8)
    page.click("#train-lrm-start")
    wait_for_job(page, server, "train-lrm", "The LRM is ready")

    page.get_by_role("tab", name="2 · Adapter (LPO)").click()
    fill(page, "#train-lpo", iterations=2)
    page.click("#train-lpo-start")
    wait_for_job(page, server, "train-lpo", "The adapter is ready|The reward on held-out")

    page.click("#tab-curves-button")
    page.wait_for_function("document.querySelector('#curves-prompt textarea, #curves-prompt input').value")
    page.wait_for_timeout(2000)  # the lists of checkpoints arrive
    page.click("#curves-trace")
    wait_for(lambda: ("trace",) in rows(server, "select kind from job"), what="a trace job")
    page.wait_for_selector("#curves-plot .rp-card img")
    wait_for(lambda: rows(server, "select count(*) from trace_score")[0][0] > 0, 240, "a stored score")
