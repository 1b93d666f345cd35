"""The loop as the official code runs it, for comparison only: same maths and same results as lpo/rollout.py and
lpo/lpo_trainer.py, more work.

What it does that ours does not: it encodes the prompts anew for every sibling and step, scores sibling by sibling, runs
winner and loser through policy and reference apart (four forwards a pair where two are enough), keeps the reference as
a deep copy, and keeps the LRM's up blocks and a second VAE in memory. Layers are laid out as diffusers loads them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Meter
from lpo import rng
from lpo.backbones import Conditioning, load_policy
from lpo.config import LPOConfig
from lpo.diffusion import log_prob
from lpo.reward_model import LatentRewardModel
from lpo.rollout import Pair, plan, sibling_noise
from lpo.selection import choose_pair


class Naive:
    """One LPO iteration of the naive pattern: `sample`, then `update` for each minibatch."""

    def __init__(self, config: LPOConfig, prompts: Sequence[str], meter: Meter):
        self.config, self.prompts, self.meter = config, list(prompts), meter
        self.policy = load_policy(config.policy, config.device, config.dtype)
        self.policy.unet.to(memory_format=torch.contiguous_format)
        self.reference = copy.copy(self.policy)
        self.reference.unet = copy.deepcopy(self.policy.unet)
        self.lrm = LatentRewardModel.from_pretrained(
            config.lrm, base=config.policy.base, device=config.device, dtype=config.dtype
        )
        self.lrm.trunk.parts["unet"].to(memory_format=torch.contiguous_format)
        self.never_used = copy.deepcopy(self.policy.unet.up_blocks), copy.deepcopy(self.policy.vae)
        self.policy.add_trainable_adapter(config.lora_rank, config.lora_targets, config.seed)
        self.weights = self.policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.lr, weight_decay=config.weight_decay)
        self.plan = plan(self.policy, config)
        meter.watch(self.policy.unet, "policy")
        meter.watch(self.reference.unet, "reference")
        meter.watch(self.lrm.trunk.parts["unet"], "LRM")

    @torch.no_grad()
    def sample(self, iteration: int) -> tuple[list[Pair], Conditioning]:
        """The kept pairs of one roll-out, shuffled as ours are."""
        config, policy, rows = self.config, self.policy, range(len(self.prompts))
        conditioning = policy.encode_prompts(self.prompts)
        shape = policy.latent_shape(config.height, config.width)
        x_t = torch.stack([rng.normal(shape, config.seed, "start", iteration, row) for row in rows]).to(policy.device)
        kept: list[Pair] = []
        for index, (t, prev_t, _branched, limit) in enumerate(self.plan):
            prediction = policy.predict(x_t, t, conditioning, config.guidance_scale)
            _, mean, std = policy.transition(x_t, prediction, t, prev_t, config.eta)
            noise = sibling_noise(config, iteration, list(rows), index, shape).to(x_t)
            siblings = [mean + std.view(-1, 1, 1, 1) * one for one in noise]
            scores = torch.stack([self._score(sibling, t) for sibling in siblings])  # (K, B)
            choice = choose_pair(scores, limit)
            for b in rows:
                if choice.kept[b]:
                    winner, loser = siblings[choice.winner[b]][b], siblings[choice.loser[b]][b]
                    kept.append(Pair(x_t[b], winner, loser, t, prev_t, b))
            onward = [
                int(rng.integers(len(siblings), (1,), config.seed, "continue", iteration, b, index)) for b in rows
            ]
            x_t = torch.stack([siblings[k][b] for b, k in enumerate(onward)])
        order = rng.permutation(len(kept), config.seed, "pairs", iteration)
        return [kept[i] for i in order], conditioning

    def _score(self, sibling: Tensor, t: int) -> Tensor:
        with self.meter("scoring"):
            self.lrm.forget_texts()
            return self.lrm.score(sibling, t, self.prompts)

    def update(self, batch: Sequence[Pair], conditioning: Conditioning) -> float:
        """One optimiser step; the loss."""
        config, device = self.config, self.policy.device
        x_t, winner, loser = (
            torch.stack([getattr(p, n) for p in batch]).to(device) for n in ("x_t", "winner", "loser")
        )
        t = torch.tensor([p.t for p in batch], device=device)
        prev_t = torch.tensor([p.prev_t for p in batch], device=device)
        rows = conditioning.rows([p.row for p in batch])

        def log_probability(model, sample: Tensor) -> Tensor:
            prediction = model.predict(x_t, t, rows, config.guidance_scale)
            _, mean, std = model.transition(x_t, prediction, t, prev_t, config.eta)
            return log_prob(sample, mean, std)

        with torch.no_grad():
            reference_winner = log_probability(self.reference, winner)
            reference_loser = log_probability(self.reference, loser)
        policy_winner, policy_loser = log_probability(self.policy, winner), log_probability(self.policy, loser)
        low, high = 1 - config.clamp, 1 + config.clamp
        ratio_winner = (policy_winner - reference_winner).exp().clamp(low, high)
        ratio_loser = (policy_loser - reference_loser).exp().clamp(low, high)
        loss = -F.logsigmoid(config.beta * (ratio_winner.log() - ratio_loser.log())).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
