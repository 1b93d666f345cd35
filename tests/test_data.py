"""Pairs files are checked line by line with one clear sentence each; latents are encoded once and keyed by content."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lpo.data import DataError, LatentCache, load_picture, normalise_prompt, prompt_hash, read_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def line(**changes: object) -> dict[str, object]:
    return {"id": "1", "prompt": "a red star", "first": "a.png", "second": "b.png", "target": 1.0, "weight": 2.0,
            "split": "train"} | changes


def write(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_reads_relative_and_absolute_paths_and_skips_blank_lines(folder: Path) -> None:
    path = write(folder, line(), "", line(id=2, first=str(folder / "b.png"), target=0.5, split="heldout", prompt="x"))
    first, second = read_pairs(path)
    assert first.first == folder / "a.png" and first.weight == 2.0 and first.target == 1.0
    assert second.id == "2" and second.first == folder / "b.png" and second.split == "heldout"


def test_weight_and_split_have_defaults_and_extra_keys_may_ride_along(folder: Path) -> None:
    row = line(votes=3)
    del row["weight"], row["split"]
    (pair,) = read_pairs(write(folder, row))
    assert pair.weight == 1.0 and pair.split == "train"


@pytest.mark.parametrize("row, words", [
    ("{", "not valid JSON"),
    ([1], "a list where a JSON object is wanted"),
    ({"id": "1"}, "'prompt' is missing"),
    (line(prompt="  "), "must be a text that is not empty"),
    (line(target=1.5), "'target' is 1.5"),
    (line(target=True), "'target' is True"),
    (line(target=float("nan")), "'target' is nan"),
    (line(weight=0), "'weight' is 0"),
    (line(weight="1"), "'weight' is '1'"),
    (line(split="test"), "must be 'train' or 'heldout'"),
    (line(first="gone.png"), "'gone.png' does not exist"),
    (line(first=7), "must be the path of a picture"),
    (line(wieght=2), "did you mean 'weight'"),
])
def test_a_bad_line_is_named_in_one_sentence(folder: Path, row: object, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(write(folder, line(id="0"), row))
    message = str(caught.value)
    assert message.startswith("pairs.jsonl, line 2: ") and words in message and message[-1] in ".?"
    assert "\n" not in message


def test_bad_files_and_contradictions_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(folder / "none.jsonl")
    with pytest.raises(DataError, match="has no pairs"):
        read_pairs(write(folder, ""))
    with pytest.raises(DataError, match=r"line 2.*already used in line 1"):
        read_pairs(write(folder, line(), line()))
    with pytest.raises(DataError, match="one prompt belongs to one split"):
        read_pairs(write(folder, line(), line(id="2", prompt="A  red star.", split="heldout")))
    (folder / "pairs.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_pairs(folder / "pairs.jsonl")


def test_spellings_of_one_prompt_share_a_hash() -> None:
    assert normalise_prompt("  A\u00a0Red\n STAR. ") == "a red star"
    assert prompt_hash("A red star.") == prompt_hash("a  red star") != prompt_hash("a red ball")
    assert len(prompt_hash("x")) == 16


def test_pictures_are_scaled_cropped_and_in_range(folder: Path) -> None:
    Image.new("RGBA", (40, 16), (255, 0, 128, 255)).save(folder / "wide.png")
    picture = load_picture(folder / "wide.png", (8, 8))
    assert picture.shape == (3, 8, 8)
    assert picture[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, 128 / 127.5 - 1], abs=1e-6)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"bad\.png cannot be read"):
        load_picture(folder / "bad.png", (8, 8))
    (folder / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be read"):
        load_picture(folder / "text.png", (8, 8))


def test_latents_are_encoded_once_and_keyed_by_content_encoder_and_size(folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(pictures))
        return pictures.mean(dim=(2, 3), keepdim=True), torch.full((len(pictures), 3, 1, 1), 0.5)

    def latents(encoder: str, side: int, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
        cache = LatentCache(tmp_path / "latents", encode, encoder, (side, side))
        paths = [cache.path(folder / name) for name in names]
        cache.fill({path: folder / name for path, name in zip(paths, names, strict=True)})
        return cache.load(paths)

    Image.open(folder / "a.png").save(folder / "same.png")
    mean, std = latents("vae1", 8, "b.png", "a.png", "same.png")
    assert mean.shape == (3, 3, 1, 1) and (std == 0.5).all()
    assert mean[0].flatten().tolist() == [-1, -1, 1] and mean[1].flatten().tolist() == [1, -1, -1]
    assert torch.equal(mean[1], mean[2]) and sum(calls) == 2
    again, _ = latents("vae1", 8, "b.png")
    assert torch.equal(again[0], mean[0]) and sum(calls) == 2
    latents("vae2", 8, "b.png")
    latents("vae1", 4, "b.png")
    assert sum(calls) == 4
    LatentCache(tmp_path / "latents", encode, "vae1", (8, 8)).path(folder / "a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="delete that file"):
        latents("vae1", 8, "a.png")
