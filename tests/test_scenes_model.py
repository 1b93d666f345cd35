"""The embedded model: a true diffusers folder, small, and drawing what the judge can read; its training resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from lpo.scenes import train
from lpo.scenes.evaluate import generated, reconstructions
from lpo.scenes.judge import judge
from lpo.scenes.text import build_tokenizer, encode, layout_targets
from lpo.scenes.world import parse_caption, prompts, sample_scene, train_caption

WEIGHTS = Path(train.__file__).parent / "weights"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(WEIGHTS / "model", dtype=torch.float32, local_files_only=True)


def test_structure_and_schedule_are_those_of_sd15(pipeline: StableDiffusionPipeline) -> None:
    unet, vae, scheduler = pipeline.unet.config, pipeline.vae, pipeline.scheduler
    assert unet.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert pipeline.vae_scale_factor == 4 and vae.config.latent_channels == 4 and unet.sample_size == 16
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "epsilon"
    assert torch.allclose(scheduler.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert type(pipeline.tokenizer).__name__ == "CLIPTokenizer"
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"


def test_latents_have_unit_variance(pipeline: StableDiffusionPipeline) -> None:
    from lpo.scenes.world import render

    rng = np.random.default_rng(8)
    pixels = np.stack([np.asarray(render(sample_scene(rng))) for _ in range(64)]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.from_numpy(pixels) / 127.5 - 1).latent_dist.sample()
    assert float((latents * pipeline.vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.1)


def test_files_are_small_fp16_safetensors() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(p.stat().st_size for p in files) <= 32 * 2**20
    assert sum(p.stat().st_size for p in (WEIGHTS / "model").rglob("*") if p.is_file()) <= 20 * 2**20
    from safetensors import safe_open

    for path in (WEIGHTS / "model").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(k).get_dtype() for k in list(file.keys())}
        assert kinds <= {"F16", "I64"}, (path, kinds)


def test_generated_pictures_can_be_read() -> None:
    texts = prompts("heldout", 12, seed=3)
    scores = [judge(p, texts[i]).score for i, _, p in generated(WEIGHTS / "model", texts, [0], 20, 5.0)]
    assert np.mean(scores) >= 0.7


def test_reconstructions_can_be_read() -> None:
    report = reconstructions(WEIGHTS / "model", 60)
    assert report["all"][0] >= 0.95 and report["psnr"] > 25


def test_the_record_of_the_run_is_there() -> None:
    lines = [json.loads(line) for line in (WEIGHTS / "train_log.jsonl").read_text().splitlines()]
    assert {"start", "vae", "text", "unet", "export", "finished"} <= {line["stage"] for line in lines}
    assert (WEIGHTS / "train_log.jsonl").stat().st_size < 200_000
    assert "heldout" in (WEIGHTS / "model" / "README.md").read_text()


def test_tokenizer_takes_any_text_and_keeps_captions_short(pipeline: StableDiffusionPipeline) -> None:
    rng = np.random.default_rng(2)
    captions = [train_caption(sample_scene(rng), rng) for _ in range(200)]
    tokenizer = pipeline.tokenizer
    assert max(len(tokenizer(c).input_ids) for c in captions) <= 28 < tokenizer.model_max_length
    ids = encode(tokenizer, ["Ein Schloß – 42!", ""], "cpu")
    assert ids.shape == (2, 32) and int(ids.max()) < len(tokenizer) == pipeline.text_encoder.config.vocab_size
    rebuilt = build_tokenizer()
    assert torch.equal(encode(rebuilt, captions, "cpu"), encode(tokenizer, captions, "cpu"))


def test_layout_targets_say_what_the_caption_says() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        scene = sample_scene(rng)
        text = train_caption(scene, rng)
        row, claims = layout_targets(scene, text), parse_caption(text)
        places = np.array(row[:15]).reshape(5, 3)
        if len(scene.objects) == 2 and claims.relation is None:
            assert (places[1:] == -100).all()
            continue
        filled = [i for i, (shape, _, _) in enumerate(places) if shape < 5]
        assert len(filled) == len(scene.objects)
        wanted = {None: [0], "left of": [1, 2], "right of": [1, 2], "above": [3, 4], "below": [3, 4]}[scene.relation]
        assert filled == wanted
        by_place = sorted(scene.objects, key=lambda o: (o.x, o.y) if wanted == [1, 2] else (o.y, o.x))
        assert [places[i][0] for i in filled] == [train_shapes().index(o.shape) for o in by_place]


def train_shapes() -> tuple[str, ...]:
    from lpo.scenes.world import SHAPES

    return SHAPES


def test_training_runs_and_resumes(tmp_path: Path) -> None:
    quick = ["--out", str(tmp_path), "--scenes", "96", "--threads", "1", "--batch", "4", "--vae-minutes", "0.03"]
    quick += ["--text-minutes", "0.03", "--export-minutes", "1"]
    train.main([*quick, "--unet-minutes", "0.03"])
    with pytest.raises(SystemExit, match="--resume"):
        train.main([*quick, "--unet-minutes", "0.03"])
    train.main([*quick, "--unet-minutes", "0.06", "--resume"])
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "unet"]
    assert steps[-1] > steps[0] >= 1
    assert len([line for line in lines if line["stage"] == "finished"]) == 2
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert loaded.unet.config.cross_attention_dim == 128
