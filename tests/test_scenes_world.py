"""The Scenes world: deterministic pictures, captions that say what is drawn, and an honest split."""

from __future__ import annotations

import json
import unicodedata
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pytest

from lpo.scenes import world
from lpo.scenes.judge import compare, truth
from lpo.scenes.world import (
    HELD_OUT_PAIRS,
    caption,
    hard_negative,
    parse_caption,
    prompts,
    render,
    sample_scene,
    split_of,
)

PROMPTS = json.loads((Path(world.__file__).parents[1] / "prompts.json").read_text())


def scenes(count: int, seed: int = 0, **options) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(count)]


def test_the_same_seed_draws_the_same_picture() -> None:
    for first, again in zip(scenes(12), scenes(12), strict=True):
        assert first == again
        picture = render(first)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert picture.tobytes() == render(again).tobytes()
    assert render(scenes(1)[0], size=32).size == (32, 32)


def test_the_world_is_the_one_that_the_shipped_model_was_trained_on() -> None:
    """Hashes taken before the world was split into files: scenes, captions and prompts, then pictures."""
    rng = np.random.default_rng(11)
    words, pictures = sha256(), sha256()
    for i in range(300):
        scene = sample_scene(rng, held_out_pairs=i % 10 == 0)
        other = hard_negative(scene, rng)
        words.update(repr((scene, other, caption(scene, rng), caption(other, rng))).encode())
        if i < 60:
            pictures.update(render(scene).tobytes() + render(other, size=32).tobytes())
    for split in ("train", "heldout", "composition"):
        words.update("\n".join(prompts(split, 100, seed=1)).encode())
    assert words.hexdigest() == "f225ef1ba790ab10c5c9c2ad6dbdf45b8d8f4ea651c36ebbf795165461916f12"
    assert pictures.hexdigest() == "b968d5fe57f753e93dffa9a5ac78e495dc77cd7001ab5325d4249aefb503f22a"


def test_scenes_are_balanced_and_apart() -> None:
    many = scenes(3000)
    singles = np.mean([len(s.objects) == 1 for s in many])
    assert 0.52 < singles < 0.58
    assert not {(o.shape, o.colour) for s in many for o in s.objects} & set(HELD_OUT_PAIRS)
    for scene in many:
        assert 0 <= scene.style <= 1
        for thing in scene.objects:
            assert 1.2 * thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)  # inside the picture
        if scene.relation:
            a, b = scene.objects
            gap = abs(a.x - b.x) if scene.relation in ("left of", "right of") else abs(a.y - b.y)
            assert gap > 1.15 * (a.radius + b.radius)
            assert (a.shape, a.colour) != (b.shape, b.colour)
    held = scenes(50, held_out_pairs=True)
    assert all((s.objects[0].shape, s.objects[0].colour) in HELD_OUT_PAIRS for s in held)


def test_captions_parse_back_to_the_scene() -> None:
    rng = np.random.default_rng(3)
    silent = {"size": 0, "relation": 0, "background": 0}
    for scene in scenes(800, seed=3):
        claims = parse_caption(caption(scene, rng).upper() + ".")
        assert [(c.shape, c.colour) for c in claims.objects] == [(o.shape, o.colour) for o in scene.objects]
        for claim, thing in zip(claims.objects, scene.objects, strict=True):
            assert claim.size in (None, thing.size)
            silent["size"] += claim.size is None
        assert claims.relation in (None, scene.relation)
        assert claims.background in (None, scene.background)
        silent["background"] += claims.background is None
        verdict = compare(claims, truth(scene))
        assert verdict.score == 1 and not verdict.unreadable
    assert 0.02 < silent["background"] / 800 < 0.15 and silent["size"] > 100


def test_prompts_outside_the_world_are_refused_in_one_sentence() -> None:
    for text in ("", "a castle in the clouds", "a red ball, a blue ball and a green ball"):
        with pytest.raises(ValueError, match="a Scenes prompt names one or two of: ball, square"):
            parse_caption(text)
    assert parse_caption("heart").objects == (world.Claim("heart"),)


def test_hard_negatives_change_objects_only() -> None:
    rng = np.random.default_rng(5)
    for scene in scenes(400, seed=5):
        other = hard_negative(scene, rng)
        assert (other.background, other.relation, other.style, other.seed) == (
            scene.background, scene.relation, scene.style, scene.seed,
        )  # fmt: skip
        assert [(o.x, o.y) for o in other.objects] == [(o.x, o.y) for o in scene.objects]
        assert truth(other) != truth(scene)
        assert not {(o.shape, o.colour) for o in other.objects} & set(HELD_OUT_PAIRS)


def test_the_split_rule() -> None:
    def independent(text: str, salt: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        text = text[:-1] if text.endswith(".") else text
        value = blake2b((salt + "\n" + text).encode("utf-8"), digest_size=8).digest()
        return "heldout" if int.from_bytes(value, "big") < 0.2 * 2**64 else "train"

    for text in [*PROMPTS["train"][:50], *PROMPTS["heldout"][:50], "A  Red Ball.", "ＡＢＣ"]:
        for salt in ("scenes", "other"):
            assert split_of(text, salt) == independent(text, salt)
    assert split_of("A  red BALL. ") == split_of("a red ball")


def test_committed_prompts_are_of_their_split() -> None:
    assert len(PROMPTS["train"]) == 600 and len(PROMPTS["heldout"]) == 300
    for split, texts in PROMPTS.items():
        assert len({world.normalise(t) for t in texts}) == len(texts)
        assert all(split_of(t) == split for t in texts)
        assert texts == prompts(split, len(texts))
    pairs = {(c.shape, c.colour) for t in PROMPTS["train"] + PROMPTS["heldout"] for c in parse_caption(t).objects}
    assert not pairs & set(HELD_OUT_PAIRS)
    for text in prompts("composition", 30):
        first = parse_caption(text).objects[0]
        assert (first.shape, first.colour) in HELD_OUT_PAIRS and split_of(text) == "heldout"
    with pytest.raises(ValueError, match="unknown split"):
        prompts("all", 3)
