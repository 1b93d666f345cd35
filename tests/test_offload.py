"""Text encoders and VAE that rest in main memory: nothing is computed with them there, and no number changes."""

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from test_speed import BASE, GOLDEN, lpo_run, lrm_run
from tiny_models import write_sdxl

from benchmarks import models, work
from lpo.__main__ import main
from lpo.backbones import load_policy, placement
from lpo.backbones.text_memory import TextMemory
from lpo.config import Policy, SampleConfig
from lpo.reward_model import LatentRewardModel


class Elsewhere:
    """The second device, played on one: what rests holds no numbers, so whatever is computed with it shows."""

    def __init__(self, monkeypatch):
        self.resting: dict[torch.Tensor, torch.Tensor] = {}
        self.visits = 0
        monkeypatch.setattr(placement, "rest", self.rest)
        monkeypatch.setattr(placement, "at_work", self.at_work)

    def rest(self, parts):
        for tensor in placement.tensors(*parts):
            self.resting.setdefault(tensor, tensor.data.clone())
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)

    @contextlib.contextmanager
    def at_work(self, device, *parts):
        own = [tensor for tensor in placement.tensors(*parts) if tensor in self.resting]
        self.visits += bool(own)
        for tensor in own:
            tensor.data.copy_(self.resting[tensor])
        yield
        for tensor in own:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)


@pytest.fixture
def elsewhere(monkeypatch):
    return Elsewhere(monkeypatch)


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_visit_takes_all_of_a_network_along_and_leaves_it_as_it_was(dtype):
    policy = load_policy(Policy(BASE), "cpu", dtype)
    before = [(t, t.data_ptr(), t.detach().clone()) for t in placement.tensors(*policy.text_encoders, policy.vae)]
    with placement.at_work(torch.device("meta"), *policy.text_encoders, policy.vae):
        assert {t.device.type for t in placement.tensors(*policy.text_encoders, policy.vae)} == {"meta"}
        ids = torch.zeros(1, 77, dtype=torch.long, device="meta")
        assert policy.text_encoder(ids)[0].device.type == "meta"  # nothing was left behind
    with pytest.raises(RuntimeError, match="full"), placement.at_work(torch.device("meta"), policy.vae):
        raise RuntimeError("full")
    for now, (tensor, place, value) in zip(placement.tensors(*policy.text_encoders, policy.vae), before, strict=True):
        assert now is tensor and now.data_ptr() == place and torch.equal(now, value)


def test_what_the_setting_means(monkeypatch):
    rested, cuda, mps, cpu = [], torch.device("cuda"), torch.device("mps"), torch.device("cpu")
    monkeypatch.setattr(placement, "rest", lambda parts: rested.append(len(parts)))
    for device, offload in itertools.product((cuda, mps, cpu), ("auto", "on", "off")):
        part = torch.nn.Identity()  # no weights: nothing needs a GPU to be moved there
        before = len(rested)
        placement.place([part], device, offload)
        assert (len(rested) > before) == (offload == "on" or (offload == "auto" and device == cuda)), (device, offload)


def prepared(folder: Path, base: str) -> dict:
    """Settings of a run whose evaluations make pictures too."""
    (folder / "heldout.json").write_text(json.dumps(["a", "the hill"]))
    settings = {"eval_prompts": str(folder / "heldout.json"), "eval_seeds": 1, "steps": 2}
    if base == "tiny":  # as the benchmarks make it
        path = models.base_of("tiny", folder, "float32", "cpu")
        return settings | {"policy": Policy(path), "lrm": models.lrm_of("tiny", path, folder, "float32", "cpu")}
    path = write_sdxl(folder / "sdxl")
    LatentRewardModel.from_base(path, device="cpu", dtype="float32", seed=1).save(folder / "lrm")
    return settings | {"policy": Policy(path), "lrm": str(folder / "lrm")}


@pytest.mark.parametrize("base", ["tiny", "sdxl"])
def test_a_training_is_the_same_and_holds_only_what_it_needs(tmp_path, elsewhere, base):
    settings = prepared(tmp_path, base)
    rows, weights, plain = lpo_run(tmp_path, "plain", **settings)
    assert not elsewhere.resting
    found, moved, trainer = lpo_run(tmp_path, "rested", offload="on", **settings)
    assert found == rows
    assert all(torch.equal(moved[name], weight) for name, weight in weights.items())
    shown = sorted(path.relative_to(plain.run.path) for path in plain.run.path.rglob("*.png"))
    assert len(shown) == 2
    for name in shown:
        assert (trainer.run.path / name).read_bytes() == (plain.run.path / name).read_bytes()
    everything = [trainer.policy.adapters.net, trainer.policy.vae, *trainer.policy.text_encoders, trainer.lrm]
    trained = [*placement.tensors(*trainer.lrm.heads()), trainer.lrm.logit_scale, *trainer.weights.values()]
    resident = bytes_of(placement.tensors(*everything)) - bytes_of([*elsewhere.resting.values(), *trained])
    networks = placement.tensors(trainer.policy.adapters.net, trainer.lrm.trunk.parts["unet"])
    assert resident == bytes_of(networks) - bytes_of(trainer.weights.values())
    if base == "tiny":  # what the benchmark counts, in half precision and GiB, is what is there
        counted = work.resident(work.measure_size("tiny", training=False)["millions"], naive=False) * 2**30
        assert counted == pytest.approx(resident / 2)
    # the fingerprint, pictures, and prompts of two iterations and an evaluation, by the policy and by the LRM
    assert elsewhere.visits <= 1 + 1 + 2 * 4
    visits, asked = elsewhere.visits, trainer._iteration_prompts()[0]
    trainer.policy.encode_prompts(asked)
    trainer.lrm.encode_text([*asked, ""])
    assert elsewhere.visits == visits, "a prompt that comes again needs no encoder"


@pytest.mark.parametrize(("changes", "rests"), [({"train": "heads"}, True), ({"train_text_encoder": True}, False)])
def test_only_a_frozen_text_encoder_of_a_trained_lrm_rests(tmp_path, elsewhere, changes, rests):
    rows, _ = lrm_run(tmp_path, "plain", **changes)
    found, trainer = lrm_run(tmp_path, "rested", offload="on", **changes)
    assert found == rows
    assert len(elsewhere.resting) == (len([*placement.tensors(trainer.lrm.text_encoder)]) if rests else 0)


def test_searched_pictures_and_traces_are_the_same(tmp_path, elsewhere):
    common = ["--base", BASE, "--steps", "2", "--seeds", "3", "--device", "cpu"]
    common += ["--search", "best-of-n", "--candidates", "2", "--search_lrm", str(GOLDEN / "lrm_sd15")]
    for name in ("off", "on"):
        sampled = ["sample", "--prompts", "and", "--negative_prompt", "on", "--run-dir", str(tmp_path / name)]
        assert main([*sampled, *common, "--offload", name]) == 0
        traced = ["trace", "--prompt", "and", "--lrm", str(GOLDEN / "lrm_sd15"), *common, "--offload", name]
        assert main([*traced, "--run-dir", str(tmp_path / f"t{name}")]) == 0
    assert elsewhere.visits
    off, on = ((tmp_path / n / "samples" / "prompt0_seed3.png").read_bytes() for n in ("off", "on"))
    assert off == on
    off, on = (json.loads((tmp_path / n / "scores.json").read_text()) for n in ("toff", "ton"))
    assert off == on


def test_memory_of_texts_is_bounded_and_asks_once():
    asked, memory = [], TextMemory(limit=3 * 4 * 2)

    def encode(texts):
        asked.append(list(texts))
        return [torch.tensor([[float(len(text)), 0.0] for text in texts])]

    def recall(*texts):
        return memory.recall(texts, encode, torch.device("cpu"))[0][:, 0].tolist()

    assert recall("aa", "b", "aa") == [2, 1, 2] and recall("b") == [1]
    assert recall("ccc", "dddd", "b") == [3, 4, 1]  # more than fits: all are given, the oldest is forgotten
    assert recall("dddd", "ccc", "b") == [4, 3, 1] and recall("aa") == [2]
    assert asked == [["aa", "b"], ["ccc", "dddd"], ["aa"]] and memory.bytes == 3 * 8


def test_a_prompt_is_encoded_alike_whatever_stands_beside_it_and_anew_after_adapters_change():
    prompts = ["the cat", "on the hill and then", "a"]
    together = load_policy(Policy(BASE), "cpu").encode_prompts(prompts, "and")
    policy = load_policy(Policy(BASE), "cpu")
    policy.tune(SampleConfig(offload="on"))
    for row, prompt in reversed([*enumerate(prompts)]):
        alone = policy.encode_prompts([prompt], "and")
        assert torch.equal(alone.text[0], together.text[row])
        assert torch.equal(alone.unconditional[0], together.unconditional[row])
    with torch.no_grad():
        for weight in policy.text_encoder.parameters():
            weight.add_(0.01)
    assert torch.equal(policy.encode_prompts(prompts).text, together.text)
    policy.set_adapters([])
    assert not torch.equal(policy.encode_prompts(prompts).text, together.text)
