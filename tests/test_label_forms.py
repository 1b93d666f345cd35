"""The folded forms of the Label tab: pairs for own prompts, new studies, and the sentences for what is wrong."""

import gradio as gr
import pytest

from app import choices, pairs
from app.tabs import label
from storage import jobs as queue
from storage import labels

SAMPLER = {"steps": 20, "guidance_scale": 5.0, "eta": 0.0}


@pytest.fixture
def study(lab):
    made = labels.create_study(lab.store, "Tastes")
    lab.choose_study(made.id)
    return made


def test_a_job_for_own_prompts_and_every_refusal(lab, study):
    job_id, count = pairs.generate(lab, " a red  ball\n\na blue star\na red ball", 3, "base", "base", SAMPLER)
    job = queue.get(lab.store, job_id)
    assert count == 6 and (job.kind, job.lane, job.study_id) == ("pairs", "interactive", study.id)
    assert job.config == {
        "prompts": ["a red ball", "a blue star"], "count": 6, "policies": [{"base": "scenes", "adapters": []}],
        "origin": "form", "sampler": SAMPLER,
    }  # fmt: skip
    assert pairs.job_line(lab, job_id) == "6 pairs are waiting to be drawn."
    assert pairs.job_line(lab, None) == "" and pairs.job_line(lab, "gone") == ""
    refusals = [
        ("", 2, "base", SAMPLER, "no prompt yet"),
        ("a ball", None, "base", SAMPLER, "Pairs per prompt"),
        ("a ball", 1.5, "base", SAMPLER, "whole number"),
        ("a ball", 51, "base", SAMPLER, "1 to 50"),
        ("\n".join(map(str, range(1001))), 2, "base", SAMPLER, "at most 2000"),
        ("a ball", 2, "77", SAMPLER, "gone"),
        ("a ball", 2, "base", {**SAMPLER, "steps": None}, "steps is empty"),
        ("a ball", 2, "base", {**SAMPLER, "steps": 0}, "steps"),
        ("a ball", 2, "base", {**SAMPLER, "eta": 7.0}, "eta"),
        ("x" * 2001, 2, "base", SAMPLER, "2000 characters"),
    ]
    for text, each, policy, sampler, words in refusals:
        with pytest.raises(ValueError, match=words):
            pairs.generate(lab, text, each, "base", policy, sampler)
    assert len(queue.list_jobs(lab.store)) == 1
    assert [value for _, value in choices.policies(lab)] == ["base"]
    single, _ = pairs.generate(lab, "a ball", 1, "base", "base", SAMPLER)
    assert pairs.job_line(lab, single) == "1 pair is waiting to be drawn."


def test_no_pairs_are_made_for_a_study_that_the_page_does_not_show(lab, study):
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Label"):
        label.build(lab)
    make = next(handler for handler in blocks.fns.values() if handler.name == "make")
    settings = "a ball", 1, "base", "base", *SAMPLER.values()
    other = labels.create_study(lab.store, "Mine", base="scenes")
    lab.choose_study(other.id)  # on another page
    assert "the study “Mine”" in make.fn({"study": study.id}, *settings)[2]
    assert queue.list_jobs(lab.store) == []
    assert make.fn({"study": other.id}, *settings)[2] == ""
    assert queue.list_jobs(lab.store)[0].study_id == other.id


def test_a_new_study_and_every_refusal(lab, study, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {number}" for number in range(60)))
    made, train, heldout = pairs.new_study(lab, "Mine", "scenes", "Which  one?", "a ball\nprompt 3", str(file))
    texts = [row.text for row in labels.study_prompts(lab.store, made.id)]
    assert (made.question, train + heldout, sorted(texts)) == (
        "Which one?", 61, sorted(["a ball", *(f"prompt {number}" for number in range(60))]),
    )  # fmt: skip
    assert heldout == sum(labels.split_of(text, made.salt) == "heldout" for text in texts) and 3 <= heldout <= 25
    assert lab.current_study().id == made.id
    (tmp_path / "broken.json").write_text("{")
    refusals = [
        ("", "scenes", "Q?", "a ball", None, "no name"),
        ("Mine", "scenes", "Q?", "a ball", None, "already a study"),
        ("New", "scenes", " ", "a ball", None, "question is empty"),
        ("New", "scenes", "Q?", " \n", None, "no prompt yet"),
        ("New", "", "Q?", "a ball", None, "base is empty"),
        ("New", "/no/such/model", "Q?", "a ball", None, "no model at /no/such/model"),
        ("New", "scenes", "Q?", "", str(tmp_path / "broken.json"), "prompt file"),
        ("New", "scenes", "Q?", "x" * 2001, None, "2000"),
    ]
    for *given, words in refusals:
        with pytest.raises(ValueError, match=words):
            pairs.new_study(lab, *given)
    assert [row.name for row in lab.studies()] == ["Tastes", "Mine"]
