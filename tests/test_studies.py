"""A study on another base than Scenes: what it is offered, what it refuses to mix, what Train begins with."""

import re
from pathlib import Path

import gradio as gr
import pytest
from conftest import unfold
from playwright.sync_api import expect

import storage
from app import choices, comparisons, jobs, pairs
from app.choices import WARM_LRM
from app.comparisons import Side
from app.lab import CURRENT_STUDY
from app.tabs import curves, train_queue
from lpo.config import ConfigError, LPOConfig, LRMConfig, Policy, from_preset, to_dict
from lpo.preflight import family, fits, require_startable
from storage import checkpoints, studies
from storage import jobs as queue

GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = str(GOLDEN / "tiny_sd15")
SAMPLER = {"steps": 2, "guidance_scale": 5.0, "eta": 0.0}


def on_scenes(lab) -> str:
    """What a Scenes study has made: an LRM, and an adapter with its finished job, whose id is returned."""
    study = lab.current_study().id
    job = jobs.submit(lab, "train-lpo", to_dict(from_preset(LPOConfig, "scenes")), study)
    queue.finish(lab.store, queue.claim(lab.store, "training", "w").id, "w", {})
    add = {"study_id": study, "meta": {"final": True, "policy": {"base": "scenes", "adapters": []}}}
    checkpoints.add_checkpoint(lab.store, kind="adapter", name="LPO 1", path="/a", job_id=job, **add)
    checkpoints.add_checkpoint(lab.store, kind="lrm", name="LRM 1", path=f"{WARM_LRM}/.", study_id=study)
    return job


def test_only_what_fits_the_base_is_offered_and_nothing_is_mixed(lab):
    scenes, job = lab.current_study(), on_scenes(lab)
    value = choices.adapters(lab)[0][1]
    tiny = studies.create_study(lab.store, "Tiny", base=TINY)
    studies.add_prompts(lab.store, tiny.id, [f"a red ball number {i}" for i in range(40)])
    lab.choose_study(tiny.id)
    assert (choices.policies(lab), choices.adapters(lab), choices.lrms(lab)) == ([("base", "base")], [], [])
    refused = r"LPO 1 belongs to the base scenes, but the study's base is .*tiny_sd15: choose another one"
    with pytest.raises(ValueError, match=refused):
        comparisons.create(lab, Side("base"), Side(value), count=2)
    with pytest.raises(ValueError, match=refused):
        comparisons.create(lab, Side("base"), Side("base", more=value), count=2)
    with pytest.raises(ValueError, match=refused):
        pairs.generate(lab, "a cat", 1, "base", value, SAMPLER)
    with pytest.raises(ValueError, match="A chosen LRM is gone, or of another base than the study's"):
        choices.named_lrms(lab, ["scenes"])
    for hand_over in (train_queue.to_compare, train_queue.to_curves):
        with pytest.raises(ValueError, match="LPO 1 belongs to another base than the study's"):
            hand_over(lab, job)
    assert len(queue.list_jobs(lab.store)) == 1

    # another study on the same base by another name; an LRM of another base, but of the same latent space
    meta = {"policy": {"base": f"{GOLDEN}/../golden/tiny_sd15", "adapters": []}}
    mine = checkpoints.add_checkpoint(lab.store, kind="adapter", name="LPO 2", path="/b", meta=meta)
    judge = checkpoints.add_checkpoint(lab.store, kind="lrm", name="LRM 2", path=str(GOLDEN / "lrm_sd15"))
    assert (choices.adapters(lab), choices.lrms(lab)) == ([("LPO 2", str(mine.id))], [("LRM 2", str(judge.id))])
    assert choices.policy(lab, str(mine.id)) == {"base": TINY, "adapters": [{"path": "/b", "strength": 1.0}]}
    lab.choose_study(scenes.id)
    assert choices.adapters(lab) == [("LPO 1", value)]
    assert [studies.has_prompts(lab.store, tiny.id, split) for split in ("train", "heldout")] == [True, True]
    assert not studies.has_prompts(lab.store, studies.create_study(lab.store, "Empty").id, "heldout")
    assert [name for name, _ in choices.lrms(lab)] == ["LRM 2", "LRM 1", "Scenes, as shipped"]


def test_a_file_that_is_no_model_is_refused_without_a_word_of_it(lab, tmp_path):
    """docs/architecture.md: where a model is expected any path may be named, and nothing else is read out."""
    secret = tmp_path / "secret.safetensors"
    for content in (b"hunter2 hunter2 hunter2", (14).to_bytes(8, "little") + b'{"hunter2": 1}', b'{"hunter2": 1}'):
        secret.write_bytes(content)
        (tmp_path / "model_index.json").write_bytes(content)
        (tmp_path / "lrm.json").write_bytes(content)
        for refused in (
            LRMConfig(base=str(secret), init="base"),
            LRMConfig(base=TINY, init="base", text_projection=str(secret)),
            LRMConfig(base=TINY, init="base", text_projection=str(tmp_path)),
            LPOConfig(policy=Policy(unet=str(tmp_path))),
        ):
            with pytest.raises(ConfigError) as caught:
                require_startable(refused)
            assert "hunter2" not in str(caught.value)
        assert family(str(tmp_path)) == family(str(secret)) == "sd15" and fits(str(tmp_path), TINY)


def test_nothing_is_traced_with_the_settings_of_another_base(lab):
    """And the refusal stands until the next press: neither a running trace nor the opening of the tab covers it."""
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Curves"):
        curves.build(lab)
    handlers = {handler.name: handler for handler in blocks.fns.values()}
    trace = handlers["trace"]
    on_the_page = [each.value for each in trace.inputs]
    lab.choose_study(studies.create_study(lab.store, "Tiny", base=TINY).id)  # on another page
    _, told, *_, refused = trace.fn(None, *on_the_page)
    assert told.startswith("⚠️ Nothing was traced: meanwhile the study is on another base")
    assert handlers["tick"].fn(None, False, refused)[0] == told
    assert handlers["look"].fn(None, False, refused)[1] == told
    assert handlers["tick"].fn(None, False, "")[0] == curves.HELLO
    for name in ("enter", "trace"):  # which end it
        assert handlers[name].outputs[-1] is handlers["tick"].inputs[-1]


SLOW_LINE = """() => {
  const send = window.fetch;
  window.fetch = (...request) => new Promise(done => setTimeout(() => done(send(...request)), 2000));
}"""


def test_forms_of_a_study_on_another_base(start_server, page):
    """Train begins with what fits the base, and so again with the next study, but for what has been typed since its tab
    was opened. In Label a refusal stands while a job tells how it goes."""
    server = start_server("--no-workers")
    store = storage.open(server.data_dir)
    scenes = studies.list_studies(store)[0]
    checkpoints.add_checkpoint(store, kind="lrm", name="LRM 1", path=f"{WARM_LRM}/.", study_id=scenes.id)
    tiny = studies.create_study(store, "Tiny", base=TINY)
    studies.add_prompts(store, tiny.id, ["a cat"])
    box = {name: page.locator(f"#train-{name} input") for name in ("lrm-preset", "lrm-init", "lpo-preset", "lpo-judge")}
    steps = page.locator("#train-lrm").get_by_role("spinbutton", name="steps", exact=True)
    beta, line = page.get_by_role("textbox", name="beta "), page.locator("#train-lrm-command textarea")
    fresh = "the base model: knows no reward yet"

    def choose(study):
        checkpoints.set_setting(store, CURRENT_STUDY, study.id)

    def shows(preset, init, lrm_steps):
        expect(box["lrm-preset"]).to_have_value(preset)
        expect(box["lrm-init"]).to_have_value(init)
        expect(steps).to_have_value(lrm_steps)

    choose(studies.create_study(store, "Large", base="nobody/an-sdxl"))
    page.goto(server.url)  # the server was started with another study, and knows no better
    page.click("#tab-curves-button")
    expect(page.locator("#curves-prompt textarea, #curves-prompt input")).not_to_have_value("")
    page.wait_for_timeout(1000)  # the tab has its answer, and its settings
    unfold(page.locator("button:visible", has_text="All other settings"))
    least = page.get_by_role("textbox", name="threshold min ")
    expect(least).to_have_value("0.45")
    choose(scenes)  # on another page
    page.click("#tab-label-button")
    page.click("#tab-curves-button")
    expect(least).to_have_value("0.08")

    choose(tiny)
    page.goto(server.url)
    unfold(page.get_by_role("button", name="Pairs for your own prompts"))
    page.fill("#label-prompts textarea", "a cat")
    page.click("#label-make")
    expect(page.locator("#label-told")).to_contain_text("2 pairs are waiting")
    page.fill("#label-prompts textarea", "")
    page.click("#label-make")
    expect(page.locator("#label-refused")).to_contain_text("There is no prompt yet")

    page.click("#tab-train-button")
    unfold(page.get_by_role("button", name="The same on the command line"))
    shows("sd15", fresh, "4000")
    expect(line).to_have_value(re.compile("--preset sd15 --pairs pairs.jsonl --base .*tiny_sd15 --run-dir"))
    page.get_by_role("tab", name="2 · Adapter (LPO)").click()
    expect(box["lpo-preset"]).to_have_value("sd15")
    expect(box["lpo-judge"]).to_have_value("")
    expect(beta).to_have_value("500")
    page.get_by_role("tab", name="1 · Reward model (LRM)").click()
    steps.fill("77")
    page.click("#tab-label-button")
    expect(page.locator("#label-told")).to_contain_text("2 pairs are waiting")
    expect(page.locator("#label-refused")).to_contain_text("There is no prompt yet")
    checkpoints.add_checkpoint(store, kind="lrm", name="LRM 2", path=str(GOLDEN / "lrm_sd15"))
    page.click("#tab-train-button")
    expect(box["lpo-judge"]).to_have_value("LRM 2")  # the tab has its answer
    expect(line).to_have_value(re.compile("--steps 77"))
    shows("sd15", fresh, "77")

    refusal = page.locator("#train-lrm-told", has_text="Nothing was started: the study is on another base")
    choose(scenes)  # on another page
    page.click("#train-lrm-start")
    expect(refusal).to_be_visible()
    shows("scenes", "Scenes, as shipped", "100")
    choose(tiny)
    page.click("#tab-label-button")
    page.evaluate(SLOW_LINE)
    page.click("#tab-train-button")
    page.wait_for_timeout(1000)  # a person needs as long from the tab to the field
    steps.fill("55")  # before the answer has come
    shows("sd15", fresh, "55")
    expect(line).to_have_value(re.compile("--preset sd15 .*--steps 55"))
    assert queue.list_jobs(store, kinds=("train-lrm",)) == []
    store.close()
