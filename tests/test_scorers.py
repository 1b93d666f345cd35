"""Local scorers on tiny CLIP models of the real classes: against transformers' own forward, and by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from lpo.config import ConfigError
from lpo.scorers import AestheticHead, Judges, load_judges

WORDS = ["<pad>", "<s>", "</s>", "a", "cat", "dog", "red", "blue", "<unk>"]
PROMPTS = ["a red cat", "a dog", "blue dog a cat"]


def tiny_clip(folder, seed: int, width: int = 16):
    """A folder as a real CLIP checkpoint has it: model, tokenizer, preprocessor."""
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two different tiny CLIP models: {name: (folder, model, tokenizer)}."""
    root = tmp_path_factory.mktemp("clips")
    return {name: (root / name, *tiny_clip(root / name, seed)) for seed, name in enumerate(("clip", "pick"))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    paths = []
    for number in range(3):
        pixels = draw.integers(0, 255, (40 + 8 * number, 48, 3), np.uint8)
        paths.append(root / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def own_logits(clip, prompts, paths) -> torch.Tensor:
    """(N,) logit_scale · cosine of each picture with its prompt, by transformers' own forward, one pair at a time."""
    folder, model, tokenizer = clip
    processor = CLIPImageProcessor.from_pretrained(folder)
    out = []
    for prompt, path in zip(prompts, paths, strict=True):
        pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
        tokens = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "pixel_values": pixels}
            out.append(model(**inputs).logits_per_image[0, 0])
    return torch.stack(out)


def test_scores_are_transformers_own(clips, pictures):
    judges = load_judges(clip=str(clips["clip"][0]), pick=str(clips["pick"][0]), device="cpu")
    assert judges.names == ["clip", "pick"]
    prompts = [prompt + " </s>" for prompt in PROMPTS]  # CLIP pools at the end token; a real tokenizer adds it
    scores = judges.score(prompts, pictures)
    scale = clips["clip"][1].logit_scale.exp()
    torch.testing.assert_close(scores["clip"], own_logits(clips["clip"], prompts, pictures) / scale.detach())
    torch.testing.assert_close(scores["pick"], own_logits(clips["pick"], prompts, pictures))
    assert scores["clip"].abs().max() <= 1


@pytest.mark.parametrize("prefix", ["layers.", ""])
def test_the_aesthetic_head_is_a_chain_of_linear_layers(clips, pictures, tmp_path, prefix):
    torch.manual_seed(5)
    chain = torch.nn.Sequential(
        torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    ).eval()  # numbered 0, 2, 3, as in the published file
    save_file({f"{prefix}{name}": value for name, value in chain.state_dict().items()}, tmp_path / "head.safetensors")
    torch.save({f"{prefix}{name}": value for name, value in chain.state_dict().items()}, tmp_path / "head.pth")
    folder, model, _ = clips["clip"]
    for name in ("head.safetensors", "head.pth"):
        judges = load_judges(aesthetic=str(tmp_path / name), aesthetic_clip=str(folder), device="cpu")
        scores = judges.score(PROMPTS, pictures)
        assert list(scores) == ["aesthetic"]
        processor = CLIPImageProcessor.from_pretrained(folder)
        pixels = processor(images=[Image.open(p).convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        with torch.no_grad():
            embedded = model.visual_projection(model.vision_model(pixels).pooler_output)
            wanted = chain(embedded / embedded.norm(dim=-1, keepdim=True))[:, 0]
        torch.testing.assert_close(scores["aesthetic"], wanted)


def test_gaps_are_chosen_minus_other_and_of_ties_first_minus_second(clips, pictures):
    judges = load_judges(clip=str(clips["clip"][0]), device="cpu")
    rows = [
        {"label": n, "choice": choice, "prompt": "a cat </s>", "first": pictures[0], "second": pictures[1]}
        for n, choice in enumerate(("first", "second", "tie"))
    ]
    first, second = judges.score(["a cat </s>"] * 2, pictures[:2])["clip"].tolist()
    found = judges.gaps(rows)
    assert [row["tie"] for row in found] == [False, False, True]
    wanted = [first - second, second - first, first - second]
    assert [row["clip"] for row in found] == pytest.approx(wanted, abs=1e-6) and abs(wanted[0]) > 1e-4
    assert isinstance(judges, Judges)


def test_bad_scorers_get_a_sentence(clips, tmp_path):
    folder = str(clips["clip"][0])
    head = tmp_path / "head.safetensors"
    for options, sentence in (
        ({}, "No scorer is named"),
        ({"clip": str(tmp_path / "gone")}, "has no config.json; give a local folder"),
        ({"aesthetic": "x"}, "needs the CLIP-L model"),
        ({"aesthetic": str(tmp_path / "gone.safetensors"), "clip": folder}, "cannot be read as an aesthetic head"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_judges(**options, device="cpu")
    save_file({"0.weight": torch.zeros(4, 16)}, head)
    with pytest.raises(ConfigError, match="is no aesthetic head"):
        AestheticHead(head)
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, head)
    with pytest.raises(ConfigError, match="takes embeddings of 768 numbers, this CLIP model gives 16"):
        load_judges(aesthetic=str(head), clip=folder, device="cpu")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (broken / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded as a CLIP model"):
        load_judges(clip=str(broken), device="cpu")


def test_the_command_line_writes_the_gaps_of_a_file_of_pairs_and_goes_on(clips, pictures, tmp_path, capsys):
    from lpo.__main__ import main

    targets = (1.0, 0.0, 0.5, 0.75)
    pairs = [{"id": str(n), "prompt": PROMPTS[n % 3], "first": str(pictures[n % 3]),
              "second": str(pictures[(n + 1) % 3]), "target": target} for n, target in enumerate(targets)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["gaps", "--pairs", str(tmp_path / "pairs.jsonl"), "--clip", str(clips["clip"][0]), "--pick",
               str(clips["pick"][0]), "--device", "cpu", "--out"]  # fmt: skip
    assert main([*command, str(tmp_path / "a.csv")]) == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["different_flag"] for row in rows] == ["1", "1", "0", "1"]
    judges = load_judges(clip=str(clips["clip"][0]), pick=str(clips["pick"][0]), device="cpu")
    for pair, row in zip(pairs, rows, strict=True):
        found = judges.score([pair["prompt"]] * 2, [pair["first"], pair["second"]])
        sign = -1 if pair["target"] < 0.5 else 1
        for name, column in (("clip", "clipscore_gap"), ("pick", "pickscore_gap")):
            assert float(row[column]) == pytest.approx(sign * float(found[name][0] - found[name][1]), abs=1e-5)
        assert row["aesthetic_gap"] == row["vqascore_gap"] == ""
    whole = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "b.csv").write_bytes(whole[: whole.rfind(b"\n", 0, -1) - 3])  # killed in the middle of a row
    assert main([*command, str(tmp_path / "b.csv")]) == 0
    with (tmp_path / "b.csv").open(newline="") as file:
        assert [row["different_flag"] for row in csv.DictReader(file)] == ["1", "1", "0", "1"]
    (tmp_path / "c.csv").write_text("my notes\n")
    assert main([*command, str(tmp_path / "c.csv")]) == 2 and "not an unfinished file" in capsys.readouterr().err
