"""Latent preference optimisation: sample, score, select, loss, step. `for metrics in trainer.train(): ...`

Round by round a few prompts are sampled with the current policy; at every step the LRM picks the best and the worst of
K siblings; a LoRA is trained to make the best likelier than the reference does. Every metric is explained in
docs/metrics.md.

Several ranks (lpo/ranks.py) share out the prompts of a round, then the rows of every minibatch. In between all kept
pairs go to every rank, so minibatches are the same as those of one process and a stopped run resumes with any number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lpo import rng
from lpo.backbones import Conditioning, load_policy
from lpo.backbones.latent_space import require_same
from lpo.config import ConfigError, LPOConfig, to_dict
from lpo.data import normalise_prompt
from lpo.diffusion import log_prob
from lpo.evaluation import HeldOut
from lpo.losses import lpo_loss
from lpo.lpo_metrics import iteration_metrics, update_metrics
from lpo.lrm_files import latent_space
from lpo.prompts import read_prompts
from lpo.ranks import ALONE, Ranks, portions
from lpo.reward_model import LatentRewardModel
from lpo.rollout import Pair, plan, rollout
from lpo.run_dir import Run, write_json


class LPOTrainer:
    """Holds the policy, its trainable adapter, the LRM and the place in the run. Protocol: lpo/training.py."""

    def __init__(self, config: LPOConfig, run: Run, ranks: Ranks = ALONE):
        self.config, self.run, self.ranks = config, run, ranks
        self.prompts = read_prompts(config.prompts)
        heldout = read_prompts(config.eval_prompts) if config.eval_prompts else []
        shared = {normalise_prompt(p) for p in self.prompts} & {normalise_prompt(p) for p in heldout}
        if shared:
            raise ConfigError(f"{len(shared)} prompts, such as {min(shared)!r}, are both trained on and held out.")
        self.policy = load_policy(config.policy, config.device, config.dtype, config.allow_latent_mismatch)
        self.policy.latent_shape(config.height, config.width)  # refuses a size that does not fit
        self.policy.tune(config)  # before the LRM comes: what rests on the CPU makes room for it
        self.lrm = LatentRewardModel.from_pretrained(
            config.lrm, base=config.policy.base, device=config.device, dtype=config.dtype
        )
        self.lrm.tune(config)
        space = latent_space(self.lrm, config.policy.base)
        require_same(
            space, self.policy.fingerprint(), config.lrm, config.policy.base, config.allow_latent_mismatch
        )
        self.policy.add_trainable_adapter(config.lora_rank, config.lora_targets, config.seed)
        if config.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        own = -(-config.train_batch_size // ranks.count)  # pairs of a full minibatch that are this rank's
        self.portion = min(config.micro_batch_size or own, own)
        self.weights = self.policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.lr, weight_decay=config.weight_decay)
        self.plan = plan(self.policy, config)
        if not any(step.branched for step in self.plan):
            raise ConfigError(
                f"No step between t_min {config.t_min} and t_max {config.t_max} has noise: there is nothing to compare."
            )
        self.step_weights = self._step_weights()
        self.heldout = HeldOut(self.policy, self.lrm, heldout, config, ranks)
        self.step = 0  # finished iterations
        self.updates = 0  # optimiser steps
        self.pending: list[Pair] | None = None  # once sampled: the iteration's kept pairs, in training order
        self.trained = 0  # how many of them have been
        self.sums: dict = {}  # what the iteration's metrics are made from
        self.last: dict = {}

    def train(self) -> Iterator[dict | None]:
        """Yields the metrics of each iteration, and None wherever a stop loses nothing."""
        config = self.config
        if self.step == 0 and self.pending is None and not self.heldout.reference:
            yield from self.heldout.measure_reference()
        while self.step < config.iterations:
            prompts, conditioning = self._iteration_prompts()
            if self.pending is None:
                yield from self._sample(prompts, conditioning)
            while self.trained < len(self.pending):
                batch = self.pending[self.trained : self.trained + config.train_batch_size]
                self._update(batch, conditioning)
                self.trained += len(batch)
                if self.trained < len(self.pending):
                    yield None
            metrics = {"step": self.step + 1, "total": config.iterations, **iteration_metrics(self.sums)}
            if "warning" in metrics:
                self.run.log(f"warning: {metrics['warning']}")
            if (self.step + 1) % config.eval_every == 0 or self.step + 1 == config.iterations:
                yield from self.heldout.measure(self.run.samples / f"step_{self.step + 1:06d}")
                metrics |= self.heldout.result()
            self.step, self.pending, self.trained, self.sums = self.step + 1, None, 0, {}
            self.last = metrics
            yield metrics

    def _iteration_prompts(self) -> tuple[list[str], Conditioning]:
        """The prompts of this iteration: a new keyed order every epoch, taken through without a gap."""
        count, n = self.config.prompts_per_iteration, len(self.prompts)
        places = [divmod(self.step * count + i, n) for i in range(count)]
        orders = {epoch: rng.permutation(n, self.config.seed, "prompts", epoch) for epoch, _ in places}
        prompts = [self.prompts[orders[epoch][place]] for epoch, place in places]
        return prompts, self.policy.encode_prompts(prompts)

    def _sample(self, prompts: Sequence[str], conditioning: Conditioning) -> Iterator[None]:
        """Sample, score, select. Leaves the kept pairs in `pending`, shuffled. Redone from the start after a stop:
        the keys give the same again, for the policy has not moved."""
        n, kept, scores, gaps = len(prompts), [], [], []
        share = self.ranks.share(n)
        own, texts = conditioning.rows(share.rows), [prompts[row] for row in share.rows]
        for branching in rollout(self.policy, self.lrm, texts, own, self.config, self.step, self.plan, share.first):
            yield None
            if branching is not None:
                kept += [pair for pair in branching.pairs if pair.row < n]  # the others are padding
                scores.append(branching.scores.T)
                gaps.append(branching.gap)
        kept = self._exchange(kept)
        scores = self.ranks.gather(torch.stack(scores, dim=1), n).permute(1, 2, 0).contiguous()  # (steps, K, B)
        gaps = self.ranks.gather(torch.stack(gaps, dim=1), n).T.contiguous()  # (steps, B)
        order = rng.permutation(len(kept), self.config.seed, "pairs", self.step)
        self.pending, self.trained = [kept[i] for i in order], 0
        branched = [step.t for step in self.plan if step.branched]
        self.sums = {
            "kept": {t: (sum(pair.t == t for pair in kept), n) for t in branched},
            "reward": float(torch.stack([step.mean() for step in scores]).mean()),
            "gap": float(torch.stack([step.mean() for step in gaps]).mean()),
            "updates": [],
            "drift": [],
        }

    def _exchange(self, kept: list[Pair]) -> list[Pair]:
        """Every rank's kept pairs, to every rank, ordered by step and row: the order in which one process keeps them.
        They wait for their minibatch on the CPU."""
        index = {step.t: i for i, step in enumerate(self.plan)}
        shape = self.policy.latent_shape(self.config.height, self.config.width)
        latents = [torch.stack([pair.x_t, pair.winner, pair.loser]) for pair in kept]
        packed = torch.stack(latents).float().cpu() if kept else torch.zeros(0, 3, *shape)
        packed = self.ranks.gather_uneven(packed)  # (N, 3, C, H, W)
        places = torch.tensor([(index[p.t], p.row) for p in kept], dtype=torch.long).view(-1, 2)
        places = self.ranks.gather_uneven(places).tolist()
        found = []
        for (step, row), (x_t, winner, loser) in sorted(zip(places, packed, strict=True), key=lambda pair: pair[0]):
            found.append(Pair(x_t, winner, loser, self.plan[step].t, self.plan[step].prev_t, row))
        return found

    def _update(self, batch: Sequence[Pair], conditioning: Conditioning) -> None:
        """One optimiser step. The n pairs of `batch` are those of all ranks; this one takes its share in portions."""
        config, n = self.config, len(batch)
        share, columns = self.ranks.share(n), []
        self.optimizer.zero_grad(set_to_none=True)
        for part in portions(share, self.portion, config.compile):
            columns.append(self._backward([batch[row] for row in part.rows], part.weights, n, conditioning))
        columns = torch.cat(columns)[: len(share.rows)]
        self.ranks.add(weight.grad for weight in self.weights.values() if weight.grad is not None)
        bound = config.max_grad_norm or math.inf  # an infinite bound measures only
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), bound))
        columns = self.ranks.gather(columns, n)
        row = update_metrics(columns, grad_norm)
        if not math.isfinite(row["loss"]) or not math.isfinite(grad_norm):
            raise ConfigError(f"The loss is not finite in iteration {self.step + 1}: lower lr, or use float32.")
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, self.updates / max(config.lr_warmup_steps, 1))
        self.optimizer.step()
        self.sums["updates"].append(row)
        self.sums["drift"] += [[pair.t, drift] for pair, drift in zip(batch, columns[:, 4].tolist(), strict=True)]

    def _backward(
        self, batch: Sequence[Pair], shares: Sequence[float], n: int, conditioning: Conditioning
    ) -> Tensor:
        """Adds the gradients of B pairs, each counting 0 or 1 of n. Winner and loser share one policy and one reference
        forward of their x_t. Returns (B, 5): weighted loss, margin, unclamped margin, share clamped, drift."""
        config, device = self.config, self.policy.device
        x_t = torch.stack([p.x_t for p in batch]).to(device)  # (B, C, H, W)
        winner = torch.stack([p.winner for p in batch]).to(device)
        loser = torch.stack([p.loser for p in batch]).to(device)
        t = torch.tensor([p.t for p in batch], device=device)  # (B,)
        prev_t = torch.tensor([p.prev_t for p in batch], device=device)
        rows = conditioning.rows([p.row for p in batch])

        with torch.no_grad(), self.policy.reference():
            reference = self.policy.predict(x_t, t, rows, config.guidance_scale)
            _, mean_reference, std = self.policy.transition(x_t, reference, t, prev_t, config.eta)
        prediction = self.policy.predict(x_t, t, rows, config.guidance_scale)
        _, mean, _ = self.policy.transition(x_t, prediction, t, prev_t, config.eta)
        log_ratio_winner = log_prob(winner, mean, std) - log_prob(winner, mean_reference, std)
        log_ratio_loser = log_prob(loser, mean, std) - log_prob(loser, mean_reference, std)
        beta = config.beta * (x_t[0].numel() if config.beta_unit == "nat" else 1)
        terms = lpo_loss(log_ratio_winner, log_ratio_loser, beta, config.clamp)
        weights = [self.step_weights[p.t] * share for p, share in zip(batch, shares, strict=True)]
        weighted = terms.loss * torch.tensor(weights, device=device)
        (weighted.sum() / n).backward()

        drift = (mean.detach() - mean_reference).pow(2).mean(dim=(1, 2, 3)).sqrt() / std
        log_ratios = log_ratio_winner.detach() - log_ratio_loser.detach()
        clamped = (terms.clamped_winner.float() + terms.clamped_loser.float()) / 2
        return torch.stack([weighted.detach(), terms.margin.detach(), log_ratios, clamped, drift], dim=1)

    def _step_weights(self) -> dict[float, float]:
        """Loss weight of every branched step: 1, or for 'equal' the inverse of its gradient weight, with mean 1."""
        steps = [step for step in self.plan if step.branched]
        if self.config.timestep_weighting == "none":
            return {step.t: 1.0 for step in steps}
        eta = self.config.eta
        inverse = {step.t: 1 / float(self.policy.step_sensitivity(step.t, step.prev_t, eta)) for step in steps}
        mean = sum(inverse.values()) / len(inverse)
        return {t: weight / mean for t, weight in inverse.items()}

    def save(self, path: Path) -> None:
        """A checkpoint: the adapter in diffusers layout, and adapter.json with where it comes from."""
        if not self.ranks.main:
            return
        self.policy.save_adapter(path)
        config = to_dict(self.config)
        numbers = {k: v for k, v in self.last.items() if isinstance(v, (int, float))}
        write_json(
            path / "adapter.json",
            {
                "format_version": 1,
                "base": self.config.policy.base,
                "adapters": config["policy"]["adapters"],  # frozen ones it was trained on top of
                "rank": self.config.lora_rank,
                "step": self.step,
                "fingerprint": self.policy.fingerprint(),
                "config": config,
                "metrics": numbers,
            },
        )

    def result(self) -> dict:
        """Iterations, optimiser steps, and the last iteration's metrics."""
        return {"step": self.step, "updates": self.updates, "metrics": self.last}

    # Stop and resume
    def save_state(self, path: Path) -> None:
        """Everything that --resume needs, whole or not at all; kept pairs not yet trained included."""
        if not self.ranks.main:
            return
        pending = None if self.pending is None else [vars(pair) for pair in self.pending]
        state = {
            "step": self.step,
            "updates": self.updates,
            "weights": {name: w.detach().cpu() for name, w in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "pending": pending,
            "trained": self.trained,
            "sums": self.sums,
            "last": self.last,
            "reference": self.heldout.reference,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load_state(self, path: Path) -> None:
        """What `save_state` wrote; another file raises one of many errors (lpo/training.py makes a sentence of it)."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.updates, self.trained = state["step"], state["updates"], state["trained"]
        self.sums, self.last, self.heldout.reference = state["sums"], state["last"], state["reference"]
        if state["pending"] is not None:
            self.pending = [Pair(**pair) for pair in state["pending"]]
