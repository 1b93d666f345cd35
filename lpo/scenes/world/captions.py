"""What is said about a scene: a grammar with several phrasings, its parser, and the split of its sentences."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from lpo.scenes.world.scene import COLOURS, SHAPES, Scene, Thing, sample_scene

SALT = "scenes"  # of the split: storage.split_of(text, "scenes") gives the same answer

PHRASES = {
    "night": ("at night", "under a starry sky"),
    "sunset": ("at sunset", "in front of a sunset"),
    "meadow": ("in a meadow", "in a green meadow"),
    "sea": ("by the sea", "over the sea"),
    "snow": ("in the snow", "in a snowy landscape"),
    "plain": ("on a plain background", "on a grey background"),
}
RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
OPENINGS = ("a picture of ", "a drawing of ")


@dataclass(frozen=True)
class Claim:
    """What a caption says about one object; None where it is silent."""

    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Attributes:
    """What a caption claims. `relation` reads objects[0] relation objects[1]."""

    objects: tuple[Claim, ...]
    relation: str | None = None
    background: str | None = None


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many phrasings of what is drawn; sizes in 80 %, relation in 93 %, background in 93 % of captions."""

    def noun(thing: Thing) -> str:
        words = [thing.colour, thing.shape]
        if rng.random() < 0.8:
            words.insert(0, SIZE_WORDS[thing.size][int(rng.random() < 0.2)])
        return "a " + " ".join(words)

    text = noun(scene.objects[0])
    if len(scene.objects) == 2:
        link = "and" if rng.random() < 0.07 else RELATION_PHRASES[scene.relation][int(rng.random() < 0.4)]
        text = f"{text} {link} {noun(scene.objects[1])}"
    lot, place = rng.random(), PHRASES[scene.background][int(rng.random() < 0.35)]
    if lot < 0.8:
        text = f"{text} {place}"
    elif lot < 0.93:
        text = f"{place}, {text}"
    if lot < 0.8 and rng.random() < 0.1:
        text = OPENINGS[int(rng.integers(len(OPENINGS)))] + text
    return text


_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_NOUN = re.compile(rf"(?:\b({'|'.join(_SIZE_OF)})\s+)?(?:\b({'|'.join(COLOURS)})\s+)?\b({'|'.join(SHAPES)})\b")
_RELATION_OF = [
    ("left of", "left of"),
    ("right of", "right of"),
    ("above", "above"),
    ("over", "above"),
    ("below", "below"),
    ("under", "below"),
]
_BACKGROUND_WORDS = {
    "night": ("night", "starry"),
    "sunset": ("sunset",),
    "meadow": ("meadow",),
    "sea": ("sea",),
    "snow": ("snow", "snowy"),
    "plain": ("plain", "grey"),
}


def parse_caption(text: str) -> Attributes:
    """What a caption claims; raises ValueError when it names no object of this world or more than two."""
    text = normalise(text)
    nouns = list(_NOUN.finditer(text))
    if not 1 <= len(nouns) <= 2:
        raise ValueError(
            f"The prompt {text!r} names {len(nouns)} objects; "
            f"a Scenes prompt names one or two of: {', '.join(SHAPES)} (for example 'a small red ball by the sea')."
        )
    claims = tuple(Claim(m[3], m[2], _SIZE_OF.get(m[1])) for m in nouns)
    relation = None
    if len(nouns) == 2:
        between = text[nouns[0].end() : nouns[1].start()]
        relation = next((name for words, name in _RELATION_OF if words in between), None)
    words = set(re.findall(r"[a-z]+", text))
    background = next((b for b, keys in _BACKGROUND_WORDS.items() if words & set(keys)), None)
    return Attributes(claims, relation, background)


def normalise(text: str) -> str:
    """NFKC, casefolded, single spaces, no full stop at the end: the text that the split hashes."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").strip()


def split_of(text: str, salt: str = SALT) -> str:
    """'heldout' for a fifth of all texts, by hash, else 'train'; storage has the same rule."""
    digest = blake2b(f"{salt}\n{normalise(text)}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") / 2**64 < 0.2 else "train"


def train_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the train split; nothing in this project is trained on another."""
    while True:
        text = caption(scene, rng)
        if split_of(text) == "train":
            return text


def prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` distinct captions of a split: 'train', 'heldout', or 'composition' (held out, with a held-out pair)."""
    if split not in ("train", "heldout", "composition"):
        raise ValueError(f"unknown split {split!r}: use 'train', 'heldout' or 'composition'")
    rng = np.random.default_rng(["train", "heldout", "composition"].index(split) + 10 * seed)
    found: dict[str, str] = {}
    while len(found) < count:
        text = caption(sample_scene(rng, held_out_pairs=split == "composition"), rng)
        if split_of(text) == ("train" if split == "train" else "heldout"):
            found.setdefault(normalise(text), text)
    return list(found.values())
