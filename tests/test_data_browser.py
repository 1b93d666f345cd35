"""The Data tab in a real browser: imported labels, their score gaps, the picture of what a rule does, and Apply."""

import pytest
from conftest import unfold
from playwright.sync_api import expect
from test_filters import imported, join, write_csv  # noqa: F401  (imported is a fixture)

from storage import filters, gaps, mpcf

SLOW_LINE = """() => {
  const send = window.fetch;
  window.fetch = (...request) => new Promise(done => setTimeout(() => done(send(...request)), 700));
}"""


@pytest.fixture
def prepared(store, tmp_path, imported):  # noqa: F811
    """(study, gap set id) in a data folder that no server has opened yet."""
    study, rows = imported
    return study, join(store, study, write_csv(tmp_path / "scores.csv", rows))["gap_set_id"]


def test_what_a_rule_keeps_is_seen_before_it_is_applied(start_server, page, store, prepared):
    study, gap_set = prepared
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(start_server("--no-workers", data_dir=store.data_dir).url)
    page.click("#tab-data-button", timeout=120_000)
    page.wait_for_selector("#data-numbers .st-number, #data-numbers b")
    unfold(page.locator("#data-filter > button, #data-filter .label-wrap").first)
    page.click("#filter-study input")
    page.click(f"ul[role=listbox] >> text={study.name}")
    rule = mpcf.PRESETS["MPCF rule 2"]
    told = filters.preview(gaps.load(store, gap_set), rule)
    page.wait_for_selector(f"#filter-state >> text={told['kept']} of {told['kept'] + told['dropped']} labels")
    expect(page.locator("#filter-state")).to_contain_text("No filter is on")
    page.wait_for_selector("#filter-plot .main-svg")
    drawn = "() => [...document.querySelectorAll('#filter-pairs img')].filter(i => i.naturalWidth > 0).length"
    page.wait_for_function(f"({drawn})() === {2 * (min(6, told['kept']) + min(6, told['dropped']))}")
    assert page.locator("#filter-pairs .fi-missed").count() > 0  # a dropped pair says which gate it missed
    stricter = filters.preview(gaps.load(store, gap_set), mpcf.PRESETS["MPCF rule 1"])
    page.click("#filter-preset >> text=MPCF rule 1")
    kept = rf"/\b{stricter['kept']} of {told['kept'] + told['dropped']} labels/"
    page.wait_for_selector(f"#filter-state >> text={kept}")
    assert filters.active(store, study.id) is None  # looking changes nothing
    page.click("#filter-apply")
    page.wait_for_selector("#filter-state >> text=MPCF rule 1 is on")
    assert (filters.active(store, study.id).name, filters.active(store, study.id).kept) == (
        "MPCF rule 1", stricter["kept"],
    )  # fmt: skip

    # Behind a slow line: what was clicked is what is applied, and no late preview covers the answer.
    page.evaluate(SLOW_LINE)
    page.click("#filter-preset >> text=MPCF rule 3")
    page.click("#filter-apply")
    page.wait_for_selector("#filter-state >> text=MPCF rule 3 is on")
    assert filters.active(store, study.id).name == "MPCF rule 3"
    page.click("#filter-clip-on input")
    expect(page.locator("#filter-name :is(input, textarea)")).to_have_value("my own rule")
    expect(page.locator("#filter-preset label.selected")).to_have_text("my own")
    assert errors == []
