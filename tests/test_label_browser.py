"""The Label tab in headless Chromium: real keys, a real server, and everything that can come between key and row.

The keys and the time to the next pair are tested in the lab itself; a dying server, a lost cookie, two windows, the
phone and the blind mode on a bare page with the same component and routes (fakes/label_page.py), which starts faster.
"""

import signal
from pathlib import Path

import pytest
from conftest import SECONDS, Server, unfold, wait_for
from PIL import Image
from playwright.sync_api import Page, expect
from sqlmodel import select
from storage_lab import add_pairs

import storage
from benchmarks import labelling
from storage import comparisons, labels, media
from storage.models import Annotator, Preference

HOSTILE = "<img src=x onerror=\"document.title='broken'\"> a red circle"
BARE = Path(__file__).parent / "fakes" / "label_page.py"
PICKER = "#label-picker .pp"


@pytest.fixture
def filled(tmp_path):
    """A data folder with a study of 16 pairs, the first of which has a hostile prompt; open beside the server."""
    store = storage.open(tmp_path / "lab")
    study = labels.create_study(store, "Tastes", question="Which one?")
    prompt = labels.add_prompts(store, study.id, [HOSTILE])[0]
    sides = [
        media.add_picture(store, Image.new("RGB", (64, 64), c), prompt_id=prompt.id, provenance={})
        for c in ("red", "blue")
    ]
    labels.add_pair(store, study.id, prompt.id, sides[0].id, sides[1].id, "queue")
    add_pairs(store, study, 15)
    yield store
    store.close()


def rows(store) -> list[Preference]:
    with store.reader() as session:
        return list(session.exec(select(Preference).order_by(Preference.id)).all())


def open_tab(page: Page, url: str) -> None:
    page.set_default_timeout(SECONDS)
    page.goto(url)


def loaded(page: Page) -> None:
    """Waits until the pairs ahead are there with their pictures (of a bare page, which then asks for nothing more)."""
    page.wait_for_load_state("networkidle")


def armed(page: Page) -> None:
    """Waits until an answer would be taken, and a little longer: not yet is part of the design."""
    page.wait_for_selector(f"{PICKER}[data-armed=yes]")
    page.wait_for_timeout(120)


def press(page: Page, key: str) -> None:
    armed(page)
    page.keyboard.press(key)


def shown(page: Page) -> list[str]:
    """The hashes on screen, left and right."""
    sources = page.eval_on_selector_all(f"{PICKER} .pp-slot img", "images => images.map(image => image.src)")
    return [source.rsplit("/", 1)[1] for source in sources]


def hashes(store, pair_id: int) -> dict[str, str]:
    with store.reader() as session:
        row = session.get(storage.models.Pair, pair_id)
        ids = {"first": row.first_id, "second": row.second_id}
        return {side: session.get(storage.models.Picture, picture).hash for side, picture in ids.items()}


def saved(page: Page) -> None:
    expect(page.locator(".pp-saved").first).to_have_attribute("data-state", "saved")


def test_keys_choose_and_nothing_else_votes(filled, start_server, page):
    """From the first visit without a click: the keys, what they must ignore, undo, flicker, touch and double clicks."""
    server = start_server("--no-workers")
    open_tab(page, server.url)
    armed(page)
    expect(page.locator(f"{PICKER} .pp-prompt")).to_have_text(HOSTILE)
    assert page.title() == "Preference Lab"
    expect(page.locator(".pp-who-text").first).to_have_text("labelling as me")

    expected = []  # (choice key, hashes on screen)
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "x", "S"):
        armed(page)
        expected.append((key, shown(page)))
        page.keyboard.press(key)
    saved(page)
    given = rows(filled)
    assert len(given) == 5
    for (key, (left, right)), row in zip(expected, given, strict=True):
        files = hashes(filled, row.pair_id)
        assert files[row.left] == left and row.milliseconds >= 100
        if key.startswith("Arrow") and key != "ArrowDown":
            assert files[row.choice] == (left if key == "ArrowLeft" else right)
    assert [row.choice for row in given[2:]] == ["tie", "both_bad", "skip"]
    expect(page.locator(".pp-stats").first).to_contain_text("5 today · 5 in this study")

    armed(page)
    before = shown(page)
    for combination in ("Control+ArrowLeft", "Meta+x", "Alt+x", "q"):
        page.keyboard.press(combination)
    armed(page)
    page.evaluate(
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', repeat: true, bubbles: true}))"
    )
    unfold(page.get_by_text("Pairs for your own prompts"))
    page.locator("#label-prompts textarea").fill("")
    page.locator("#label-prompts textarea").press_sequentially("xsu x")
    page.keyboard.press("ArrowLeft")
    page.get_by_role("tab", name="Data").click()
    expect(page.locator(PICKER)).to_be_hidden()
    page.keyboard.press("x")
    page.get_by_role("tab", name="Label").click()
    armed(page)
    assert shown(page) == before and len(rows(filled)) == 5

    page.keyboard.down(" ")
    expect(page.locator(f"{PICKER}.pp-flicker")).to_have_count(1)
    faces = set()
    for _ in range(12):
        faces.add(page.eval_on_selector(PICKER, "root => root.dataset.face"))
        page.wait_for_timeout(100)
    page.keyboard.up(" ")
    assert faces == {"left", "right"}
    expect(page.locator(f"{PICKER}.pp-flicker")).to_have_count(0)

    page.keyboard.press("u")
    wait_for(lambda: len(rows(filled)) == 6, 60)
    assert (rows(filled)[5].revokes, rows(filled)[5].choice) == (given[4].id, None)
    wait_for(lambda: sorted(shown(page)) == sorted(hashes(filled, given[4].pair_id).values()), 60)
    armed(page)
    page.wait_for_timeout(300)
    page.locator(f"{PICKER} [data-choice=left]").dblclick()
    saved(page)
    page.wait_for_timeout(500)
    assert len(rows(filled)) == 7


def test_votes_wait_for_the_server_and_none_is_lost(filled, start_server, page):
    """kill -9 in the middle, a reload while votes wait, a lost cookie: every answer arrives exactly once."""
    server = start_server(script=BARE)
    open_tab(page, f"{server.url}/?study=1")
    loaded(page)  # what is not, the server cannot give any more
    press(page, "ArrowLeft")
    saved(page)
    server.stop(signal.SIGKILL)
    assert len(rows(filled)) == 1
    for key in ("x", "ArrowDown", "x"):
        press(page, key)
    expect(page.locator(".pp-saved-text").first).to_contain_text("3 votes waiting")
    expect(page.locator(".pp-saved").first).to_have_attribute("data-state", "waiting")
    again = Server(server.data_dir, "--port", str(server.port), script=BARE, wait=False)
    try:
        again.port, again.url = server.port, server.url
        again.wait()
        wait_for(lambda: len(rows(filled)) == 4, 90)
        saved(page)
        assert [row.choice for row in rows(filled)][1:] == ["both_bad", "tie", "both_bad"]

        # the answer to a vote is lost on its way: it is sent again, also after a reload, and is one row
        page.route("**/api/pairs/vote", lambda route: (route.fetch(), route.abort())[1])
        press(page, "ArrowDown")
        expect(page.locator(".pp-saved-text").first).to_contain_text("1 vote waiting")
        page.reload()
        expect(page.locator(".pp-saved-text").first).to_contain_text("1 vote waiting")
        page.unroute("**/api/pairs/vote")
        page.wait_for_function("() => Object.keys(localStorage).every(key => !key.startsWith('preference-lab.vote'))")
        assert len(rows(filled)) == 5

        # without the cookie the vote is kept until the name is known again
        armed(page)
        page.context.clear_cookies()
        page.keyboard.press("x")
        expect(page.locator(".pp-name-input").first).to_be_visible()
        expect(page.locator(".pp-saved-text").first).to_contain_text("1 vote waiting")
        assert len(rows(filled)) == 5
        page.locator(".pp-name-input").first.fill("me")
        page.keyboard.press("Enter")
        wait_for(lambda: len(rows(filled)) == 6, 60)
        saved(page)

        # another person: votes are kept apart by name, and pairs start anew
        page.locator(".pp-rename").first.click()
        page.locator(".pp-name-input").first.fill("Ada")
        page.keyboard.press("Enter")
        expect(page.locator(".pp-who-text").first).to_have_text("labelling as Ada")
        expect(page.locator(f"{PICKER} .pp-prompt")).to_have_text(HOSTILE)
        press(page, "ArrowLeft")
        wait_for(lambda: len(rows(filled)) == 7, 60)
        with filled.reader() as session:
            names = {row.id: row.name for row in session.exec(select(Annotator)).all()}
        assert [names[row.annotator_id] for row in rows(filled)] == ["me"] * 6 + ["Ada"]
        assert len({row.client_key for row in rows(filled)}) == 7
    finally:
        again.stop()


def test_two_windows_never_ask_the_same_twice(filled, start_server, page):
    server = start_server(script=BARE)
    open_tab(page, f"{server.url}/?study=1")
    armed(page)
    other = page.context.new_page()
    open_tab(other, f"{server.url}/?study=1")
    armed(other)
    assert shown(page) == shown(other)
    press(other, "x")
    for window in (page, other, page, other):
        wait_for(lambda: shown(page) == shown(other), what="the answer to reach the other window")
        window.bring_to_front()
        press(window, "ArrowDown")
    wait_for(lambda: len(rows(filled)) == 5, 60)
    assert len({row.pair_id for row in rows(filled)}) == 5


def test_a_phone_shows_everything_at_once(filled, start_server, chromium):
    """390 x 844 without scrolling, large targets, a tap on a picture chooses it."""
    server = start_server(script=BARE)
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    try:
        page = context.new_page()
        open_tab(page, f"{server.url}/?study=1")
        armed(page)
        boxes = [page.locator(f"{PICKER} {what}").bounding_box() for what in (".pp-left", ".pp-right", ".pp-foot")]
        assert all(
            box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844 for box in boxes
        )
        assert boxes[0]["width"] >= 240 and boxes[0]["width"] == boxes[1]["width"]
        for button in page.locator(f"{PICKER} .pp-actions button").all():
            assert button.bounding_box()["height"] >= 44 and button.bounding_box()["width"] >= 40
        page.wait_for_timeout(400)
        left = shown(page)[0]
        page.locator(f"{PICKER} .pp-left").tap()
        wait_for(lambda: len(rows(filled)) == 1, 60)
        row = rows(filled)[0]
        assert hashes(filled, row.pair_id)[row.choice] == left
        expect(page.locator(".pp-saved-text")).to_have_text("saved · top chosen")
    finally:
        context.close()


def test_a_blind_comparison_ends_by_itself(filled, start_server, page):
    """The same keys in the blind mode; nothing on the page tells who made what; the end is told to Python."""
    policies = [
        {"base": "scenes", "adapters": []},
        {"base": "scenes", "adapters": [{"path": "secret", "strength": 1.0}]},
    ]
    prompts = [f"prompt number {number}" for number in range(3)]
    made = comparisons.create_comparison(filled, 1, *policies, prompts=prompts, seeds=[5], votes=2)
    for number, prompt in enumerate(prompts):
        sides = [Image.new("RGB", (16, 16), (number * 9, 5, shade)) for shade in (7, 90)]
        comparisons.add_comparison_pair(filled, made.id, prompt, 5, *sides, {"policy": "A"}, {"policy": "B"})
    comparisons.start_voting(filled, made.id)
    server = start_server(script=BARE)
    open_tab(page, f"{server.url}/?study=1&comparison={made.id}")
    press(page, "ArrowLeft")
    expect(page.locator(".pp-stats")).to_have_text("1 of 2 votes")
    press(page, "u")
    expect(page.locator(".pp-stats")).to_have_text("0 of 2 votes")
    press(page, "ArrowRight")
    expect(page.locator(".pp-stats")).to_have_text("1 of 2 votes")
    armed(page)
    assert not any(word in page.content() for word in ("secret", "policy", "adapter", "a_is"))
    page.keyboard.press("ArrowDown")
    expect(page.locator(".pp-empty-title")).to_have_text("All planned votes are in")
    assert page.evaluate("window.triggered") == [["submit", {"votes": 2}]]
    assert comparisons.complete(filled, made.id).state == "complete"


def test_the_next_pair_is_there_within_100_ms(filled, start_server, page, capsys):
    """p95 from key to next pair while a thread refills the queue; the best of up to four rounds. On a machine so loaded
    that a key which does nothing takes long to reach the screen, that time comes on top: it is not the page's.
    `python -m benchmarks.labelling` prints the same figures."""
    server = start_server("--no-workers")
    open_tab(page, server.url)
    study_id = labels.list_studies(filled)[0].id
    over = []
    for _ in range(4):
        times, idle = labelling.measure(page, filled, study_id, votes=25, size=64, pause=(0.1, 0.3))
        with capsys.disabled():
            print(f"\nlabelling: {labelling.summary(times, idle)}")
        over.append(labelling.p95(times) - 100 - max(0.0, labelling.p95(idle) - 40))
        if over[-1] <= 0:
            return
    assert min(over) <= 0
