"""The official SDXL latent reward model once more, by straight calls of stock classes: an oracle for the parity tests.

It runs the whole UNet, up blocks and all, and reads the features with hooks: skips 2, 5 and 8 and the mid block.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@torch.no_grad()
def scores(lrm: Path, base: Path, latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Scores (N,) of latents (N, C, H, W) at timesteps (N,), guidance 7.5 on the mid feature only."""
    ids = []
    for name in ("tokenizer", "tokenizer_2"):
        one = CLIPTokenizer.from_pretrained(base / name)
        texts = [*prompts, *[""] * len(prompts)]
        ids.append(one(texts, padding="max_length", truncation=True, max_length=one.model_max_length,
                       return_tensors="pt").input_ids)  # fmt: skip
    return scores_of_ids(lrm, base, latents, timesteps, *ids)


@torch.no_grad()
def scores_of_ids(
    lrm: Path, base: Path, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, ids_2: torch.Tensor
) -> torch.Tensor:
    """ids, ids_2: 2 N rows, the prompts' and then as many of the empty prompt."""
    n = len(latents)
    one = CLIPTextModel.from_pretrained(lrm / "text_encoder")(ids, output_hidden_states=True)
    two = CLIPTextModelWithProjection.from_pretrained(lrm / "text_encoder_2")(ids_2, output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    pooled = two.text_embeds

    unet = UNet2DConditionModel.from_pretrained(lrm / "unet")
    own = UNet2DConditionModel.load_config(base / "unet")["sample_size"]
    vae = AutoencoderKL.load_config(base / "vae")
    side = own * 2 ** (len(vae["block_out_channels"]) - 1)
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=states.dtype).repeat(2 * n, 1)
    skips, mid = [], []
    unet.conv_in.register_forward_hook(lambda module, args, out: skips.append(out))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda module, args, out: skips.extend(out[1]))
    unet.mid_block.register_forward_hook(lambda module, args, out: mid.append(out))
    unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), states,
         added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids})  # fmt: skip

    down = [F.adaptive_avg_pool2d(skips[i], 1).flatten(1).chunk(2)[0] for i in (2, 5, 8)]
    text, unconditional = F.adaptive_avg_pool2d(mid[0], 1).flatten(1).chunk(2)
    heads = torch.load(lrm / "state_dict.pt", weights_only=True)
    image = torch.cat([*down, unconditional + 7.5 * (text - unconditional)], dim=-1)
    image = image @ heads["visual_projection"]["weight"].float().T
    cosine = F.cosine_similarity(image, pooled[:n], dim=-1)
    return torch.as_tensor(heads["logit_scale"]).float().exp() * cosine
