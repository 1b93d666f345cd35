"""Trains a latent reward model on preference pairs: `for metrics in trainer.train(): ...; trainer.save(path)`.

One step: draw pairs in a keyed order, one timestep per pair (the same for both pictures, or their scores could not be
compared), independent noise per picture, score both, pair loss, clip, step. Held-out lines never train. A share of the
training prompts is set aside for calibration: it chooses the checkpoint (keep "best") and fits the one temperature.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lpo import rng
from lpo.backbones import load_policy, pick_dtype
from lpo.calibration import describe, fit_temperature
from lpo.config import LRMConfig, Policy
from lpo.data import DataError, Pair, normalise_prompt, prompt_hash, read_pairs
from lpo.losses import pair_loss
from lpo.lrm_init import split_calibration, start_lrm
from lpo.lrm_start import fit_start
from lpo.noisy_pairs import NoisyPairs
from lpo.ranks import ALONE, Ranks, portions

HEADS = ("visual_projection", "text_projection", "logit_scale")
EVAL_PAIRS, EVAL_TIMESTEPS, EVAL_BATCH = 400, 10, 64
TEMPERATURE_PRIOR = 0.5  # of ln T, in pairs: ten calibration pairs move the temperature a little, hundreds decide it


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to change."""


class Stoppable(Protocol):
    """What the trainer needs of the run: where to put things and whether to stop."""

    path: Path
    stop_requested: bool

    def log(self, text: str) -> None: ...


class LRMTrainer:
    """See the module's docstring. Raises DataError for unusable pairs; encodes all pictures when made."""

    def __init__(self, config: LRMConfig, run: Stoppable, ranks: Ranks = ALONE):
        self.config, self.run, self.ranks, self.step = config, run, ranks, 0
        pairs = read_pairs(config.pairs)
        self.heldout = [pair for pair in pairs if pair.split == "heldout"]
        self.pairs, self.aside = split_calibration([pair for pair in pairs if pair.split == "train"],
                                                   config.calibration, config.seed)
        if not self.pairs:
            raise DataError(f"{config.pairs} has no training pairs; label pairs of prompts that are not held out.")
        self.steps = config.planned_steps(len(self.pairs))
        self.warmup = config.warmup_steps * self.steps / config.steps
        backbone = load_policy(Policy(config.base), config.device, config.dtype)
        self.lrm = start_lrm(config, backbone)
        self._refuse_overlap()
        self.lrm.set_trainable(config.train, config.lora_rank, config.train_text_encoder, config.seed)
        if config.gradient_checkpointing:
            self.lrm.enable_gradient_checkpointing()
        dtype = pick_dtype(config.dtype, self.lrm.device)
        self.lrm.mixed_precision = dtype if dtype == torch.bfloat16 else None
        self.lrm.tune(config)
        own = -(-config.batch_size // ranks.count)  # pairs of a step that are this rank's
        self.portion = min(config.micro_batch_size or own, own)
        # without gradients twice as many fit
        self.scored = min(EVAL_BATCH, 2 * config.micro_batch_size) if config.micro_batch_size else EVAL_BATCH
        self.weights = self.lrm.trainable_parameters()
        self.initial = {name: weight.detach().clone() for name, weight in self.weights.items()} if config.anchor else {}
        heads = [weight for name, weight in self.weights.items() if name.startswith(HEADS)]
        others = [weight for name, weight in self.weights.items() if not name.startswith(HEADS)]
        peaks = (config.lr if config.heads_lr is None else config.heads_lr, config.lr)
        groups = [{"params": part, "peak": peak} for part, peak in zip((heads, others), peaks, strict=True) if part]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.due: dict[str, float] | None = None  # a step's metrics that still lack their evaluation
        self.best: dict[str, Any] = {"loss": math.inf, "step": 0, "weights": {}}
        self._fitted: tuple[int, float] | None = None  # (step, temperature): fitted once a checkpoint
        self.grid = config.grid()
        folder = Path(config.latent_cache) if config.latent_cache else run.path / "latents"
        run.log(f"{len(self.pairs)} pairs to train, {len(self.aside)} to calibrate, {len(self.heldout)} held out; "
                f"{self.steps} steps; latents of their pictures in {folder}")
        self.pictures = NoisyPairs(config, backbone, pairs, folder, ranks)
        if config.fit_start:
            self._fit_start()

    def _refuse_overlap(self) -> None:
        seen = set(self.lrm.meta.get("training_prompts", []))
        shared = sorted({pair.prompt for pair in self.heldout if prompt_hash(pair.prompt) in seen})
        if shared:
            raise DataError(f"{len(shared)} held-out prompts, such as {shared[0]!r}, trained the LRM that this run "
                            "starts from, so they cannot test it; start from another LRM or remove these pairs.")

    @torch.no_grad()
    def _fit_start(self) -> None:
        """See lpo/lrm_start.py; depends on the labels and the seed alone, so a resumed run does the same."""
        features, texts = [], []
        for start in range(0, len(self.pairs), self.scored):
            part, columns = self.pairs[start:start + self.scored], []
            text = self.lrm.encode_text([pair.prompt for pair in part] * 2)
            empty = self.lrm.encode_text([""])
            for t in self.grid[::4]:
                noise = [("lrm-start", t, pair.id) for pair in part]
                noisy, times = (x.to(self.lrm.device) for x in self.pictures.noised(part, [t] * len(part), noise))
                seen = self.lrm.guided(self.lrm.features(noisy, times, text, empty))
                columns.append(seen.view(2, len(part), -1).transpose(0, 1))
            features.append(torch.stack(columns, dim=1))
            texts.append(self.lrm.text_features(text.pooled[:len(part)]))
        target, weight = (torch.tensor(one) for one in zip(*((p.target, p.weight) for p in self.pairs), strict=True))
        prompts = [normalise_prompt(pair.prompt) for pair in self.pairs]
        found = fit_start(self.lrm, torch.cat(features), torch.cat(texts), target, weight, prompts, self.config.seed)
        self.run.log("start fitted to what chosen pictures have in common: {:g} of the earlier opinion kept, "
                     "{:g} embeddings along it, {:g} times as sure".format(*found))

    def margins(self, pairs: list[Pair], timesteps: list[int], draws: list[tuple[int | str, ...]]) -> torch.Tensor:
        """(N,) score of the first minus score of the second picture, both noised to the pair's timestep; `draws` are
        the keys of the noise, one a pair."""
        noisy, t = (part.to(self.lrm.device) for part in self.pictures.noised(pairs, timesteps, draws))
        first, second = self.lrm.score(noisy, t, [pair.prompt for pair in pairs] * 2).chunk(2)
        return first - second

    def train(self) -> Iterator[dict[str, float] | None]:
        """From the current step to `self.steps`, one dict of metrics a step (docs/metrics.md), or None if a stop cuts
        an evaluation short: it is done again when the run goes on."""
        config, n = self.config, len(self.pairs)
        self.lrm.eval()  # no dropout: a reward must be a function
        while self.step < self.steps or self.due:
            if self.due:
                found = self._evaluate_quickly()
                if found is None:
                    yield None
                    continue
                metrics, self.due = self.due | found, None
                yield metrics
                continue
            places = [divmod(self.step * config.batch_size + i, n) for i in range(config.batch_size)]
            order = {epoch: rng.permutation(n, config.seed, "lrm-order", epoch) for epoch in {e for e, _ in places}}
            batch = [self.pairs[order[epoch][place]] for epoch, place in places]
            lots = rng.integers(len(self.grid), (len(batch),), config.seed, "lrm-timestep", self.step).tolist()
            draws = [("lrm", self.step, i) for i in range(len(batch))]
            target = torch.tensor([pair.target for pair in batch], device=self.lrm.device)
            weight = torch.tensor([pair.weight for pair in batch], device=self.lrm.device)
            share, losses, parts = self.ranks.share(len(batch)), [], []
            self.optimizer.zero_grad(set_to_none=True)
            for part in portions(share, self.portion, config.compile):
                margins = self.margins(*([each[row] for row in part.rows]
                                         for each in (batch, [self.grid[lot] for lot in lots], draws)))
                own = weight[part.rows] * weight.new_tensor(part.weights)
                loss = pair_loss(margins, torch.zeros_like(margins), target[part.rows], own, weight.sum())
                loss.backward()
                losses.append(loss.detach())
                parts.append(margins.detach())
            loss = torch.stack(losses).sum()
            margins = self.ranks.gather(torch.cat(parts)[:len(share.rows)], len(batch))
            self.ranks.add([loss, *(w.grad for w in self.weights.values() if w.grad is not None)])
            # clip_grad_norm_ with an infinite bound measures only
            norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), config.max_grad_norm or math.inf)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise TrainingError(f"The loss or its gradient is not finite at step {self.step + 1}; "
                                    "choose a lower learning rate or float32.")
            rate = self._set_rate()
            self.optimizer.step()
            with torch.no_grad():
                for name, start in self.initial.items():
                    self.weights[name].lerp_(start, min(1.0, rate * config.anchor))
            self.step += 1
            decided = target != 0.5
            agree = ((margins > 0) == (target > 0.5))[decided].float().mean().item() if decided.any() else 0.5
            metrics = {"step": self.step, "total": self.steps, "epoch": self.step * config.batch_size / n,
                       "loss": loss.item(), "accuracy": agree, "margin": margins.abs().mean().item(),
                       "grad_norm": norm.item(), "lr": rate, "logit_scale": self.lrm.logit_scale.exp().item()}
            if self.step % config.eval_every == 0 or self.step == self.steps:
                self.due = metrics
            else:
                yield metrics

    def _set_rate(self) -> float:
        """Warm-up and decay, for every group. Returns the rate that the step takes where `heads_lr` changes nothing."""
        config = self.config
        factor = min(1.0, (self.step + 1) / (self.warmup + 1))
        if config.lr_decay == "cosine" and self.step >= self.warmup:
            done = (self.step - self.warmup) / max(1, self.steps - self.warmup)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return config.lr * factor

    def _evaluate_quickly(self) -> dict[str, float] | None:
        """Calibration and held-out accuracy and log-loss over a few timesteps; remembers the best checkpoint. None when
        asked to stop."""
        found: dict[str, float] = {}
        for name, pairs in (("calibration", self.aside), ("heldout", self.heldout[:EVAL_PAIRS // 2])):
            margins = self.score_pairs(pairs, self.grid[::4])
            if margins is None and pairs:
                return None
            if margins is None:
                continue
            losses = describe(*_columns(margins, pairs), resamples=0)
            found[f"{name}_log_loss"] = losses["log_loss"]["value"]
            if losses["accuracy"]["value"] is not None:
                found[f"{name}_accuracy"] = losses["accuracy"]["value"]
        loss = found.get("calibration_log_loss")
        if self.config.keep == "best" and loss is not None and loss < self.best["loss"]:
            weights = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}
            self.best = {"loss": loss, "step": self.step, "weights": weights}
        return found

    @torch.no_grad()
    def score_pairs(self, pairs: list[Pair], timesteps: list[int]) -> np.ndarray | None:
        """(N, T) margins of pairs at fixed timesteps with fixed noise; None without pairs or when asked to stop."""
        columns = []
        for t in timesteps if pairs else []:
            draws = [("lrm-eval", t, pair.id) for pair in pairs]
            parts = []
            for start in range(0, len(pairs), self.scored * self.ranks.count):
                if self.ranks.any(self.run.stop_requested):
                    return None
                rows = range(start, min(start + self.scored * self.ranks.count, len(pairs)))
                own = [rows[row] for row in self.ranks.share(len(rows)).rows]
                margins = self.margins([pairs[row] for row in own], [t] * len(own), [draws[row] for row in own])
                parts.append(self.ranks.gather(margins, len(rows)).float().cpu())
            columns.append(torch.cat(parts).numpy())
        return np.stack(columns, axis=1) if columns else None

    def temperature(self) -> float | None:
        """Fitted on the calibration pairs over the timestep grid; 1 without such pairs, None when asked to stop."""
        if self._fitted is not None and self._fitted[0] == self.step:
            return self._fitted[1]
        pairs = self.aside[:EVAL_PAIRS]
        margins = self.score_pairs(pairs, self.grid[::2])
        if margins is None:
            return None if pairs else 1.0
        targets = np.repeat([pair.target for pair in pairs], margins.shape[1])
        weights = np.repeat([pair.weight for pair in pairs], margins.shape[1]) / margins.shape[1]
        self._fitted = (self.step, fit_temperature(margins, targets, weights, prior=TEMPERATURE_PRIOR))
        return self._fitted[1]

    def result(self) -> dict[str, Any] | None:
        """Takes the kept checkpoint, fits the temperature and measures on held-out pairs; None when asked to stop."""
        if self.config.keep == "best" and self.best["weights"]:
            self._load_weights(self.best["weights"])
        temperature = self.temperature()
        pairs = self.heldout[:EVAL_PAIRS]
        timesteps = self.grid[::max(1, len(self.grid) // EVAL_TIMESTEPS)]
        margins = self.score_pairs(pairs, timesteps)
        if temperature is None or self.ranks.any(self.run.stop_requested):
            return None
        result = {"step": self.best["step"] if self.best["weights"] else self.step, "temperature": temperature,
                  "training_pairs": len(self.pairs), "calibration_pairs": len(self.aside), "heldout_pairs": len(pairs)}
        if margins is not None:
            result["heldout"] = describe(*_columns(margins, pairs), temperature)
            result["heldout_by_timestep"] = [{"t": t} | describe(*_columns(margins[:, k:k + 1], pairs), temperature)
                                             for k, t in enumerate(timesteps)]
        return result

    def save(self, path: str | Path) -> None:
        """The LRM as it is now, its LoRA folded in, calibrated, with the hashes of all prompts it was trained on."""
        known = self.lrm.meta.get("training_prompts", [])
        prompts = {prompt_hash(pair.prompt) for pair in [*self.pairs, *self.aside]} | set(known)
        meta = {"base": self.config.base, "init": self.config.init, "step": self.step, "pairs": len(self.pairs),
                "training_prompts": sorted(prompts)}
        temperature = self.temperature()
        if temperature is None or not self.ranks.main:
            return  # asked to stop: a checkpoint is calibrated or not there
        self.lrm.temperature = temperature
        self.lrm.save(path, meta)
        self.lrm.temperature = 1.0
        self.lrm.meta["training_prompts"] = known

    def save_state(self, path: str | Path) -> None:
        """Everything that --resume needs, in one file, whole or not at all."""
        if not self.ranks.main:
            return
        part = Path(path).with_suffix(".part")
        torch.save({"step": self.step, "due": self.due, "best": self.best, "optimizer": self.optimizer.state_dict(),
                    "weights": {name: weight.detach() for name, weight in self.weights.items()}}, part)
        part.replace(path)

    def load_state(self, path: str | Path) -> None:
        """What `save_state` wrote; another file raises one of many errors (lpo/training.py makes a sentence of it)."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.due = state["step"], state["best"], state.get("due")

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        self._fitted = None
        self.lrm.forget_texts()


def _columns(margins: np.ndarray, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """What `describe` takes: margins (N, T) as they are, targets (N,), weights (N,), and N normalised prompts."""
    return (margins, np.array([pair.target for pair in pairs]), np.array([pair.weight for pair in pairs]),
            [normalise_prompt(pair.prompt) for pair in pairs])
