"""A study on another base than Scenes: what it is offered, what it refuses to mix, what Train begins with."""

from pathlib import Path

import pytest

from app import choices, comparisons, jobs, pairs
from app.choices import WARM_LRM
from app.comparisons import Side
from app.tabs import train_queue
from lpo.config import LPOConfig, from_preset, to_dict
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
    assert [name for name, _ in choices.lrms(lab)] == ["LRM 2", "LRM 1", "Scenes, as shipped"]
