"""The warm-up's pictures: captions that are wrong about each other's scene, never held out, made once and the same."""

from pathlib import Path

import pytest
import torch

from lpo.backbones import Conditioning
from lpo.diffusion import Diffusion
from lpo.scenes.world import Scene, Thing, parse_caption, split_of
from lpo.warmup_pictures import KINDS, ORDERED, contrast, make, pool, shows


class Toy:
    """A backbone whose noise prediction is a fixed function of text, so that guidance, steps and captions matter."""

    device = torch.device("cpu")
    process = Diffusion(torch.cat([torch.linspace(0.999, 0.01, 1000), torch.ones(1)]), "epsilon")

    def __init__(self) -> None:
        self.predictions = 0

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pictures, 16)
        return torch.cat([mean, mean[:, :1]], dim=1), torch.zeros(len(pictures), 4, 4, 4)

    def latent_shape(self) -> tuple[int, int, int]:
        return 4, 4, 4

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        codes = torch.tensor([[float(sum(map(ord, text)) % 97) / 97] for text in prompts])
        return Conditioning(codes, torch.zeros_like(codes))

    def timesteps(self, steps: int) -> list[int]:
        return [1 + 1000 // steps * k for k in range(steps)][::-1]

    def predict(self, x: torch.Tensor, t: int, conditioning: Conditioning, guidance_scale: float) -> torch.Tensor:
        self.predictions += 1
        return 0.5 * x + guidance_scale * conditioning.text.view(-1, 1, 1, 1) / 50

    def transition(self, x: torch.Tensor, prediction: torch.Tensor, t: int, prev_t: int, eta: float):
        return x, x - 0.1 * prediction, torch.zeros(len(x))


def thing(shape: str, colour: str, size: str = "large") -> Thing:
    return Thing(shape, colour, size, 0.5, 0.5, 0.2, 0.0)


def scene(*things: Thing, relation: str | None = None) -> Scene:
    return Scene("plain", things, relation, 0.5, 0)


@pytest.mark.parametrize("text, one, expected", [
    ("a red ball", scene(thing("ball", "red")), True),
    ("a red ball", scene(thing("ball", "blue")), False),
    ("a small red ball", scene(thing("ball", "red")), False),
    ("a red ball", scene(thing("ball", "red"), thing("star", "white"), relation="above"), False),
    ("a red ball above a white star", scene(thing("ball", "red"), thing("star", "white"), relation="above"), True),
    ("a red ball above a white star", scene(thing("star", "white"), thing("ball", "red"), relation="above"), False),
    ("a red ball and a white star", scene(thing("star", "white"), thing("ball", "red"), relation="above"), True),
    ("a red ball and a white star", scene(thing("star", "red"), thing("ball", "white"), relation="above"), False),
])
def test_shows_reads_objects_and_their_order(text: str, one: Scene, expected: bool) -> None:
    assert shows(parse_caption(text), one) is expected


def test_contrasts_differ_in_meaning_and_are_never_held_out() -> None:
    for k in range(150):
        (first, second), (one, two) = contrast(0, "test", k)
        claims = parse_caption(one), parse_caption(two)
        assert split_of(one) == split_of(two) == "train"
        assert not shows(claims[0], second) and not shows(claims[1], first)
        # silent sizes apart, each caption is true of its own scene
        assert shows(claims[0], first) and shows(claims[1], second)
        assert first.background == second.background and len(one.split()) == len(two.split())
    assert contrast(0, "test", 3) == contrast(0, "test", 3) != contrast(1, "test", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_same_whenever_they_are_made(kind: str) -> None:
    one, again, other = (make(Toy(), kind, 0, index, size=3) for index in (2, 2, 3))
    assert one.latents.shape == (3, 2, 4, 4, 4) and one.captions == again.captions != other.captions
    assert torch.equal(one.latents, again.latents)
    assert not torch.equal(one.latents[:, 0], one.latents[:, 1])
    assert all((first == second) == (kind in ORDERED) for first, second in one.captions)


def test_a_pool_is_made_once_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpo.warmup_pictures.make", lambda b, kind, seed, index: make(b, kind, seed, index, size=2))
    toy = Toy()
    first = pool(toy, tmp_path, "generated", 0, 2)
    made = toy.predictions
    again = pool(toy, tmp_path, "generated", 0, 3)
    assert toy.predictions == made * 3 // 2 and len(again) == 6
    assert torch.equal(again.latents[:4], first.latents) and again.captions[:4] == first.captions
