"""What the Curves tab draws and asks for, without a browser: numbers against hand-made trajectories."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest

from app import choices, figures, reports, traces
from app.tabs import curves
from lpo.config import ConfigError, from_dict, from_preset, to_dict
from lpo.config import TraceConfig as Config
from storage import checkpoints
from storage import traces as stored


def curve(policy="base", seed=0, scores=(1.0, 2.0, 3.0), lrm="LRM 1", **siblings):
    steps = [{"step": i, "t": 900 - 450 * i, "score": s, **siblings} for i, s in enumerate(scores)]
    return {
        "trace": f"{policy}{seed}",
        "policy": policy,
        "seed": seed,
        "lrm": lrm,
        "total": 2,
        "pictures": 3,
        "steps": steps,
    }


ACCURACY = {
    "lrm": "LRM 1",
    "labels": True,
    "t": [900, 1],
    "accuracy": [0.5, 0.8],
    "low": [0.4, 0.7],
    "high": [0.6, 0.9],
}


def test_noise_is_at_the_left_and_both_plots_share_their_axis():
    value = figures.rewards([curve()], [ACCURACY])
    layout = value["figure"]["layout"]
    assert layout["xaxis"]["range"] == [1000, 0]
    assert layout["xaxis"]["anchor"] == "y2"
    assert layout["yaxis2"]["domain"][1] < layout["yaxis"]["domain"][0]
    errors = next(d["error_y"] for d in value["figure"]["data"] if "error_y" in d)
    assert errors["array"] == pytest.approx([0.1, 0.1])
    assert errors["arrayminus"] == pytest.approx([0.1, 0.1])
    assert "yaxis2" not in figures.rewards([curve()])["figure"]["layout"]


def test_one_policy_is_coloured_by_seed_several_by_policy():
    one = figures.names([curve(seed=0), curve(seed=1)])
    assert len({c["color"] for c in one}) == 2
    two = figures.names([curve(seed=0), curve(seed=1), curve("LPO 1", 0), curve("LPO 1", 1)])
    assert two[0]["color"] == two[1]["color"] != two[2]["color"] == two[3]["color"]
    by_lrm = figures.names([curve(), curve(lrm="LRM 2")])
    assert by_lrm[0]["dash"] != by_lrm[1]["dash"]


def test_direct_labels_never_cover_each_other_nor_leave_the_plot():
    value = figures.rewards([curve(seed=i, scores=(1.0, 2.0, 3.0 + i / 1000)) for i in range(6)], height=420)
    layout = value["figure"]["layout"]
    low, high = layout["yaxis"]["range"]
    places = sorted(a["y"] for a in layout["annotations"] if a.get("yref") == "y")
    assert len(places) == 6
    pixels = [(b - a) / (high - low) * 400 for a, b in pairwise(places)]
    assert min(pixels) > 12
    assert low <= places[0] <= places[-1] <= high


def test_the_margin_is_as_wide_as_the_labels_in_it():
    margins = [
        figures.rewards([curve(policy, seed) for policy in ("base", name) for seed in (0, 1)])["figure"]["layout"][
            "margin"
        ]["r"]
        for name in ("LPO 1", "LPO 1 + best of 16", "x" * 60)
    ]
    assert 30 < margins[0] < 60 < margins[1] < margins[2] < 160  # long names are cut


def test_thin_lines_and_bands_are_pale_without_opacity():
    """A trace of its own opacity darkens the whole box that it lies in, as one sees on a dark page."""
    curves_ = [curve(policy, low=0.5, high=3.5) for policy in ("base", "LPO 1")]
    lines = figures.rewards(curves_, siblings=True)["figure"]["data"]
    assert not any("opacity" in line for line in lines)
    assert [line["fillcolor"] for line in lines if "fillcolor" in line] == [
        "rgba(0,114,178,0.16)",
        "rgba(213,94,0,0.16)",
    ]


def test_the_mean_waits_until_all_seeds_have_come_that_far():
    curves_ = [curve(seed=0), curve(seed=1, scores=(3.0, 4.0)), curve("LPO 1"), curve("LPO 1", 1)]
    means = [d for d in figures.rewards(curves_)["figure"]["data"] if d["line"]["width"] > 3]
    assert means[0]["x"] == [900, 450]
    assert means[0]["y"] == [2.0, 3.0]


def test_the_bar_of_a_dropped_pair_is_the_spread_that_it_lacked():
    """A pair is kept if tanh(spread / 2) > threshold, so a bar of the drawn length would just be kept."""
    steps = curve(low=1.0, high=1.4, threshold=0.5, kept=False)
    data = figures.rewards([steps], siblings=True)["figure"]["data"]
    bar = next(d for d in data if d["line"].get("dash") == "dot")
    length = bar["y"][1] - bar["y"][0]
    assert math.tanh(length / 2) == pytest.approx(0.5)
    assert not any(d["line"].get("dash") == "dot" for d in figures.rewards([steps])["figure"]["data"])


def test_where_two_policies_part_is_told_in_words():
    text = figures.parting([curve(scores=(1.0, 1.0, 1.0)), curve("LPO 1", scores=(1.0, 1.1, 2.1))])
    assert text.startswith("LPO 1 ends 1.10 above base; they part fastest between t = 450 and 0.")
    assert figures.parting([curve()]) == ""
    half_way = [curve(scores=(1.0, 1.0, 1.0)), curve("LPO 1", scores=(1.0, 1.1, 2.1))]
    for c in half_way:
        c["steps"] = [{**s, "t": s["t"] + 50} for s in c["steps"]]  # the end, t = 0, is not there yet
    assert figures.parting(half_way) == ""


def test_candidates_of_a_best_of_n_search_are_a_band_without_pairs():
    steps = curve(low=0.5, high=3.5)
    data = figures.rewards([curve(), steps], siblings=True)["figure"]["data"]
    lines = [d for d in data if d.get("meta") == {"siblings": 1}]
    assert [len(d["x"]) for d in lines] == [6, 0, 0]
    assert figures.rows([steps])[0]["high"] == 3.5 and figures.rows([steps])[0]["kept"] is None


def test_names_are_short_where_one_lrm_does_all_the_searching():
    search = {"lrm": "scenes"}
    named = [
        ("base", {}),
        ("base + best of 4 (LRM 1)", {"search": search}),
        ("x + steps × 4 (LRM 1)", {"search": search}),
    ]
    assert [name for name, _ in choices.short_names(named)] == ["base", "base + best of 4", "x + steps × 4"]
    other = [*named, ("x + steps × 4 (LRM 2)", {"search": {"lrm": "other"}})]
    assert choices.short_names(other) == other


def test_the_table_has_a_row_per_step_and_empty_cells_for_what_was_not_measured():
    rows = figures.rows([curve(), curve("LPO 1")])
    assert len(rows) == 6
    assert rows[0] == {
        "policy": "base", "seed": 0, "lrm": "LRM 1", "trace": "base0", "step": 0, "t": 900, "score": 1.0,
        "low": None, "high": None, "gap": None, "threshold": None, "kept": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seeds"), [("0 1 2", (0, 1, 2)), ("5", (5,)), ("0-2, 7", (0, 1, 2, 7)), ("1;1, 2", (1, 2)), (" 3 ", (3,))]
)
def test_seeds_as_people_write_them(text, seeds):
    assert curves.read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a b", "-1", "1.5", "5-2", "0-1000", "1 2 x"])
def test_bad_seeds_are_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        curves.read_seeds(text)
    assert "\n" not in str(caught.value)


class Form:
    """A settings form at its defaults."""

    def read(self, values, **fixed):
        return from_dict(Config, {**to_dict(from_preset(Config, "scenes")), **fixed})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"policies": []}, "No policy is chosen"),
        ({"lrms": []}, "No LRM is chosen"),
        ({"policies": ["99"]}, "is gone"),
        ({"lrms": ["99"]}, "is gone"),
        ({"seeds": "0-23", "policies": ["base", "base"]}, "48 trajectories; choose at most 24"),
        ({"seeds": "x"}, "Seeds are 'x'"),
        ({"seeds": "0-2", "policies": ["base+best-of-n+scenes+64+0+1000"]}, "192 at once; choose fewer"),
    ],
)
def test_a_request_that_cannot_be_traced_is_one_sentence(lab, changes, sentence):
    asked = {"prompt": "a star", "seeds": "0 1", "policies": ["base"], "lrms": ["scenes"], **changes}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        curves.plan(lab, Form(), *asked.values(), (), "line")
    assert sentence in str(caught.value)


def test_a_request_becomes_one_job_and_is_remembered_for_its_study(lab):
    request = curves.plan(lab, Form(), " a star ", "0 1", ["base"], ["scenes"], (), "line")
    assert [t["seed"] for t in request["traces"]] == [0, 1]
    curves.remember(lab, {"request": request})
    assert curves.last_choice(lab)["request"] == request
    checkpoints.set_setting(lab.store, curves.LAST_CHOICE, {**curves.last_choice(lab), "study": 99})
    assert curves.last_choice(lab) == {}
    text, value, _ = curves.draw(lab, request, False)
    assert text == "Waiting for a lab that runs with its workers: this one was started with --no-workers."
    lab.settings = dataclasses.replace(lab.settings, workers=True)
    assert curves.draw(lab, request, False)[0] == "Waiting for the worker…"
    assert value["figure"]["data"][0]["x"] == []


@pytest.mark.filterwarnings("ignore:The value passed into")  # outside of a page Gradio thinks of one choice only
def test_the_first_lrm_of_a_study_is_chosen_when_the_tab_is_opened_again():
    offered = [("LRM 2", "2"), ("LRM 1", "1")]
    assert curves._still(offered, [], False).value == ["2"]
    assert curves._still(offered, ["1", "3"], False).value == ["1"]


def test_what_is_stored_already_asks_for_no_job(lab):
    request = curves.plan(lab, Form(), "a star", "0", ["base"], ["scenes"], (), "line")
    key = request["traces"][0]["key"]
    folder = traces.folder(lab.store, key)
    folder.mkdir()
    row = stored.add_trace(lab.store, key=key, path=folder, prompt="a star", seed=0, policy={}, config={})
    stored.save_scores(lab.store, row.id, "scenes", [{"step": 0, "t": 951, "score": 1.5}])
    again = curves.plan(lab, Form(), "a star", "0", ["base"], ["scenes"], (), "line")
    assert again["job"] is None
    _, value, timer = curves.draw(lab, again, False)
    assert value["rows"][0]["score"] == 1.5
    assert timer.active is False


def test_accuracy_comes_from_the_run_that_ended_in_the_folder(tmp_path):
    final = tmp_path / "checkpoints" / "final"
    final.mkdir(parents=True)
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8}
    rows = [{"t": t, "accuracy": estimate} for t in (1, 951)] + [{"t": 501, "accuracy": {"value": None}}]
    (tmp_path / "result.json").write_text(json.dumps({"heldout_by_timestep": rows}))
    got = reports.accuracy(final, "LRM 1")
    assert got == {
        "lrm": "LRM 1",
        "labels": True,
        "t": [951, 1],
        "accuracy": [0.7, 0.7],
        "low": [0.6, 0.6],
        "high": [0.8, 0.8],
    }
    assert reports.accuracy(tmp_path / "checkpoints" / "step-000100", "x") is None
    warm = tmp_path / "warm"
    warm.mkdir()
    (warm / "lrm.json").write_text(json.dumps({"meta": {"unseen_accuracy": {"generated": {"1": 0.8, "951": 0.5}}}}))
    got = reports.accuracy(warm, "warm")
    assert (got["labels"], got["t"], got["accuracy"]) == (False, [951, 1], [0.5, 0.8])
    assert "no labels" in json.dumps(figures.rewards([curve()], [got])["figure"]["layout"]["annotations"])
