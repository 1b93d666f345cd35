"""Search against a loop written out by hand: what is drawn, what is scored, which candidate is kept, what it costs."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import write_sd21, write_sdxl
from tiny_sd3 import tiny_sd3

from lpo.__main__ import main
from lpo.backbones import load_policy
from lpo.config import Policy, Search
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.sampling import sample_latents
from lpo.search import costs, require_fit, search_latents
from lpo.search_costs import Costs
from lpo.trace import load_trace, replay, score_candidates, score_trace, trace

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE, LRM = str(GOLDEN / "tiny_sd15"), str(GOLDEN / "lrm_sd15")
ROWS = [(3, "the cat"), (4, "the cat"), (3, "on the hill")]
STEPS, GUIDANCE = 4, 2.0


@pytest.fixture(scope="module")
def policy():
    return load_policy(Policy(BASE), "cpu")


@pytest.fixture(scope="module")
def lrm():
    return LatentRewardModel.from_pretrained(LRM, BASE, "cpu")


def found(policy, lrm, search, eta=1.0, rows=ROWS, batch_size=16):
    return search_latents(policy, lrm, search, rows, policy.latent_shape(), STEPS, GUIDANCE, eta, "", batch_size)


def plain(policy, rows, eta=1.0):
    return sample_latents(policy, rows, policy.latent_shape(), STEPS, GUIDANCE, eta)


@torch.no_grad()
def by_hand(policy, lrm, seed, prompt, search):
    """One trajectory, one sibling at a time: no batches, no shared code but the model and the keys."""
    shape, conditioning = policy.latent_shape(), policy.encode_prompts([prompt])
    x_t = normal(shape, seed, "sample", prompt, "start")[None]
    timesteps = policy.timesteps(STEPS)
    for step, (t, after) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        _, mean, std = policy.transition(x_t, policy.predict(x_t, t, conditioning, GUIDANCE), t, after, 1.0)
        drawn = [mean + std * normal(shape, seed, "sample", prompt, step)]
        if search.t_min <= t <= search.t_max:
            drawn += [mean + std * normal(shape, seed, "sibling", prompt, step, k) for k in range(1, search.candidates)]
        scores = [lrm.score(x, max(after, 0), [prompt]).item() for x in drawn]
        x_t = drawn[scores.index(max(scores))]
    return x_t[0]


@pytest.mark.parametrize("window", [(0, 1000), (400, 800)])
def test_steps_go_on_from_the_best_sibling_inside_the_window_only(policy, lrm, window):
    search = Search("steps", LRM, 3, *window)
    got = found(policy, lrm, search).latents
    for row, (seed, prompt) in zip(got, ROWS, strict=True):
        torch.testing.assert_close(row, by_hand(policy, lrm, seed, prompt, search), rtol=1e-3, atol=1e-3)
    assert (got - plain(policy, ROWS)).abs().max() > 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_best_of_n_keeps_the_candidate_with_the_highest_score_and_candidate_0_is_plain(policy, lrm, eta):
    result = found(policy, lrm, Search("best-of-n", LRM, 3), eta)
    assert result.scores.shape == (3, 3)
    candidates = torch.stack([plain(policy, [(*row, k) for row in ROWS], eta) for k in range(3)])
    torch.testing.assert_close(candidates[0], plain(policy, ROWS, eta))
    assert (candidates[0] - candidates[1]).abs().max() > 0.1
    for b, (_, prompt) in enumerate(ROWS):
        with torch.no_grad():
            scores = torch.stack([lrm.score(candidates[k, b : b + 1], 0, [prompt])[0] for k in range(3)])
        torch.testing.assert_close(result.scores[:, b], scores, rtol=1e-3, atol=1e-3)
        assert result.chosen[b] == scores.argmax()
        torch.testing.assert_close(result.latents[b], candidates[scores.argmax(), b], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["steps", "best-of-n"])
def test_one_candidate_is_plain_sampling_and_batches_change_nothing(policy, lrm, method):
    assert torch.equal(found(policy, lrm, Search(method, LRM, 1)).latents, plain(policy, ROWS))
    whole = found(policy, lrm, Search(method, LRM, 3)).latents
    torch.testing.assert_close(
        found(policy, lrm, Search(method, LRM, 3), batch_size=2).latents, whole, rtol=1e-3, atol=1e-3
    )
    alone = found(policy, lrm, Search(method, LRM, 3), rows=ROWS[1:2]).latents
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-3, atol=1e-3)


def test_a_trace_may_go_through_the_network_in_parts(policy, lrm):
    for search in (None, Search("steps", LRM, 3), Search("best-of-n", LRM, 3)):
        whole, parts = (
            list(trace(policy, "and", (3, 4, 5), 3, GUIDANCE, search=search, lrm=lrm, batch_size=size))
            for size in (None, 2)
        )
        torch.testing.assert_close(parts[-1]["next"], whole[-1]["next"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("write", [write_sd21, write_sdxl, tiny_sd3])
def test_every_backbone_is_searched_as_by_hand(tmp_path, write):
    """v-prediction, two text encoders with sizes, flow matching with fractional timesteps: the search knows of none."""
    base = str(write(tmp_path / "base"))
    policy = load_policy(Policy(base), "cpu", "float32")
    lrm = LatentRewardModel.from_base(base, device="cpu", dtype="float32", seed=1, feature_layer=2)
    require_fit(lrm, Policy(base), policy)
    seed, prompt = row = ROWS[1]
    window = Search("steps", LRM, 2, 300, 1000)
    got, undisturbed = found(policy, lrm, window, rows=[row]).latents[0], plain(policy, [row])[0]
    torch.testing.assert_close(got, by_hand(policy, lrm, seed, prompt, window), rtol=1e-3, atol=1e-3)
    assert (got - undisturbed).abs().max() > 0.02  # an SD3 step at eta 1 forgets most of the choice
    result = found(policy, lrm, Search("best-of-n", LRM, 3), rows=[row])
    candidates = torch.stack([plain(policy, [(*row, k)])[0] for k in range(3)])
    with torch.no_grad():
        scores = lrm.score(candidates, 0, [prompt] * 3)
    torch.testing.assert_close(result.scores[:, 0], scores, rtol=1e-3, atol=1e-3)
    assert result.chosen.tolist() == [scores.argmax()] and scores.std() > 0.01
    torch.testing.assert_close(result.latents[0], candidates[scores.argmax()], rtol=1e-3, atol=1e-3)


class Counted:
    """A backbone or LRM that counts the rows of its calls."""

    def __init__(self, inner, name):
        self.inner, self.rows, self.name = inner, 0, name

    def __getattr__(self, name):
        called = getattr(self.inner, name)
        if name != self.name:
            return called

        def counted(latents, *args):
            self.rows += len(latents)
            return called(latents, *args)

        return counted


@pytest.mark.parametrize("search", [Search("steps", LRM, 3, 100, 800), Search("best-of-n", LRM, 5), None])
def test_costs_are_the_calls_that_are_made(policy, lrm, search):
    network, judge = Counted(policy, "predict"), Counted(lrm, "score")
    if search is None:
        sample_latents(network, ROWS[:1], policy.latent_shape(), STEPS, GUIDANCE, 1.0)
    else:
        found(network, judge, search, rows=ROWS[:1])
    told = costs(policy, search, STEPS, GUIDANCE, 1.0)
    assert told == Costs(2 * network.rows, judge.rows)
    assert costs(policy, search, STEPS, 1.0, 1.0).policy == network.rows  # without guidance one evaluation a step
    assert ("scored" in told.in_words()) == (search is not None)


COMMON = ["--base", BASE, "--steps", "3", "--seeds", "3", "4", "--device", "cpu"]
BEST = ["--search", "best-of-n", "--search_lrm", LRM, "--candidates", "3"]
STEPWISE = ["--search", "steps", "--search_lrm", LRM, "--candidates", "3", "--search_t_min", "300", "--eta", "1"]


@pytest.mark.parametrize("flags", [BEST, STEPWISE])
def test_the_commands_find_the_same_picture_and_say_how(tmp_path, flags):
    assert main(["sample", *COMMON, *flags, "--prompts", "and", "--run-dir", str(tmp_path / "s")]) == 0
    traced = ["trace", *COMMON, "--eta", "0" if flags is BEST else "1", *flags, "--prompt", "and", "--lrm", LRM]
    assert main([*traced, "--run-dir", str(tmp_path / "t")]) == 0
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert result["policy"]["search"]["lrm"] == LRM
    spent = result["evaluations_per_picture"]
    assert spent == ({"policy": 18, "lrm": 3} if flags is BEST else {"policy": 6, "lrm": 6})
    assert "latents scored" in (tmp_path / "s" / "log.txt").read_text()
    scores = json.loads((tmp_path / "t" / "scores.json").read_text())
    assert scores["evaluations_per_picture"] == spent
    judge = LatentRewardModel.from_pretrained(LRM, BASE, "cpu")
    for place, seed in enumerate((3, 4)):
        drawn = Image.open(tmp_path / "s" / "samples" / f"prompt0_seed{seed}.png").tobytes()
        followed = Image.open(tmp_path / "t" / "samples" / f"seed{seed}.png").tobytes()
        assert max(abs(a - b) for a, b in zip(drawn, followed, strict=True)) <= 1
        stored = load_trace(tmp_path / "t" / "traces" / f"seed{seed}.safetensors")
        ends = score_trace(judge, stored)
        assert stored.search.candidates == 3
        if flags is BEST:
            picture = result["pictures"][place]
            assert picture["score"] == pytest.approx(max(picture["candidates"])) == pytest.approx(ends[-1], abs=1e-3)
            among = score_candidates(judge, stored)
            assert [len(s) for s in among] == [3] * 4
            assert among[-1] == pytest.approx(picture["candidates"], abs=1e-2)
        else:
            searched = [scores["siblings"][LRM][step] for step in range(3)]
            assert [s is not None for s in searched] == [True, True, False]  # t = 667, 334, then 1
            assert max(s[place] for s in searched[0]["scores"]) == pytest.approx(ends[1], abs=1e-3)
            again = list(replay(load_policy(Policy(BASE), "cpu"), stored))
            assert [item["siblings"] is not None for item in again] == [True, True, False]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*STEPWISE, "--eta", "0"], "set eta above 0"),
        ([*BEST, "--candidates", "65"], "candidates is 65"),
        ([*BEST, "--search_lrm", str(GOLDEN)], "not an LRM folder"),
        ([*BEST, "--search_lrm", "scenes"], "does not share the latent space"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_one_sentence(tmp_path, capsys, flags, words):
    for command, prompt in (("sample", "--prompts"), ("trace", "--prompt")):
        code = main([command, *COMMON, *flags, prompt, "and", "--run-dir", str(tmp_path / command)])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and words in said and said.startswith("error: "), said
