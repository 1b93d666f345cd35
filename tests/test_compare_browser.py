"""Comparing in a real browser: votes by key, nothing in page or responses that tells, then verdict and pictures."""

import json

import pytest
from conftest import unfold
from PIL import Image
from playwright.sync_api import expect

import storage
from storage import checkpoints, comparisons, jobs, studies

PROMPTS = ["a red ball", "a blue star", "a green heart"]


@pytest.fixture
def comparison(tmp_path):
    """A data folder whose newest comparison waits for votes; returns its picture hashes by policy."""
    store = storage.open(tmp_path / "lab")
    study = studies.create_study(store, "Scenes", salt="scenes")
    studies.add_prompts(store, study.id, PROMPTS)
    adapter = checkpoints.add_checkpoint(
        store, kind="adapter", name="LPO 7, step 40", path=tmp_path / "secret-adapter", study_id=study.id, step=40
    )
    policies = (
        {"base": "scenes", "adapters": []},
        {"base": "scenes", "adapters": [{"path": adapter.path, "strength": 1.0}]},
    )
    row = comparisons.create_comparison(store, study.id, *policies, prompts=PROMPTS, seeds=[5], votes=3)
    jobs.submit(store, "compare", "interactive", {"comparison_id": row.id}, study_id=study.id)
    made = {"a": set(), "b": set()}
    for number, prompt in enumerate(PROMPTS):
        pictures = [Image.new("RGB", (64, 64), (shade, 60 * number, 90)) for shade in (20, 230)]
        for side, picture in zip("ab", pictures, strict=True):
            made[side].add(store.media.put_image(picture)[0])
        origins = [{"policy": policy, "seed": 5} for policy in policies]
        comparisons.add_comparison_pair(store, row.id, prompt, 5, *pictures, *origins)
    comparisons.start_voting(store, row.id)
    store.close()
    return made


def test_vote_blind_then_see_the_verdict(comparison, start_server, page):
    server = start_server("--no-workers")
    finished = []
    page.on("requestfinished", lambda request: finished.append(request))
    page.goto(server.url)
    page.get_by_role("tab", name="Compare").click()
    picker = page.locator("#compare-picker .pp")
    page.wait_for_function("document.querySelector('#compare-picker .pp')?.dataset.armed === 'yes'")
    told = texts(finished)
    hashes = comparison["a"] | comparison["b"]
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        page.wait_for_function("document.querySelector('#compare-picker .pp').dataset.armed === 'yes'")
        page.wait_for_timeout(120)  # a key that comes sooner than anybody can look is ignored
        if key == "ArrowDown":
            told |= texts(finished)  # the last moment before the verdict
            html = page.content()
        page.keyboard.press(key)
    words = page.locator("#compare-words .vd")
    words.wait_for()
    assert "3 votes were fixed beforehand" in words.inner_text()
    assert "Too few to tell" in words.inner_text()
    rows = page.locator("#compare-pictures .ba-row")
    expect(rows).to_have_count(3)
    expect(picker).to_be_hidden()
    for side, cell in (("a", 0), ("b", 1)):  # what is called A was made by A
        shown = {rows.nth(i).locator("img").nth(cell).get_attribute("src").split("/")[-1] for i in range(3)}
        assert shown == comparison[side]
    page.locator("#compare-pictures .ba-range").fill("20")
    assert "80%" in page.locator("#compare-pictures .ba-a").evaluate("image => image.style.clipPath")
    # until then: no provenance, no path, no side; hashes only in the pairs, whose fields are these five
    assert "secret-adapter" not in html and "a_is" not in html
    for url, text in told.items():
        assert "secret-adapter" not in text and "a_is" not in text and '"provenance"' not in text, url
        if any(digest in text for digest in hashes):
            assert "/api/pairs/next" in url, url
            for pair in json.loads(text)["pairs"]:
                assert set(pair) == {"pair", "prompt", "left", "left_picture", "right_picture"}
    assert any("/api/pairs/next" in url for url in told)


@pytest.fixture
def ended(tmp_path):
    """A data folder whose newest comparison, of the base against a search, has ended; of three steps, to be quick."""
    store = storage.open(tmp_path / "lab")
    study = studies.create_study(store, "Scenes", salt="scenes")
    search = {"method": "steps", "lrm": "scenes", "candidates": 2, "t_min": 0, "t_max": 1000}
    policies = {"base": "scenes", "adapters": []}, {"base": "scenes", "adapters": [], "search": search}
    sampler = {"steps": 3, "guidance_scale": 2.0, "eta": 1.0}
    row = comparisons.create_comparison(
        store, study.id, *policies, prompts=PROMPTS[:1], seeds=[5, 6], votes=1, sampler=sampler
    )
    comparisons.abandon(store, row.id)
    store.close()


def test_trace_both_follows_both_policies_with_the_real_worker(ended, start_server, page, tmp_path):
    server = start_server()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_selector("#compare-title :text('base + steps × 2')")
    unfold(page.locator("#compare-curves button").first)
    expect(page.locator("#compare-curves-prompt input")).to_have_value(PROMPTS[0])  # what is traced has come
    expect(page.locator("#compare-curves .token")).to_have_count(1)
    page.click("#compare-curves-go")
    expect(page.locator("#compare-curves-plot .rp-card img")).to_have_count(4)
    expect(page.locator("#compare-curves-status")).to_have_text("")
    note = page.locator("#compare-curves-plot .rp-note")
    expect(note).to_contain_text("6 network evaluations (base)")
    expect(note).to_contain_text("6 network evaluations + 6 latents scored")
    names = ["base", "base + steps × 2"] * 2  # a row per seed, side by side
    expect(page.locator("#compare-curves-plot .rp-card b")).to_have_text(names)
    store = storage.open(tmp_path / "lab")
    job = jobs.list_jobs(store, kinds=("trace",))[0]
    store.close()
    assert job.state == "done" and job.supersedes.startswith("trace compare")
    assert not errors


def texts(finished) -> dict[str, str]:
    """The bodies of all finished responses that are text, by URL with a number in front."""
    found = {}
    for number, request in enumerate(list(finished)):
        response = request.response()
        kind = response.headers.get("content-type", "")
        if response.ok and ("json" in kind or "event-stream" in kind):
            found[f"{number} {request.url}"] = response.text()
    return found
