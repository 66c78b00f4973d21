"""AdamW with a schedule, clipping and a guard against numbers that are not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.engines.learner_config import TorchLearnerConfig
from alignment.errors import UserError
from alignment.tensorfile import read_tensors, write_tensors


def lr_at(update: int, config: TorchLearnerConfig, total: int) -> float:
    """The learning rate of update ``update`` (from 0) out of ``total``.

    It rises linearly over ``warmup_steps``, reaching ``lr`` with the last of them. Then with ``x`` from 0 to 1 over
    what is left, ``linear`` is ``1 - x`` and ``cosine`` is ``(1 + cos(pi x)) / 2`` of the way from ``min_lr_ratio``
    to 1, times ``lr``; past ``total`` it stays there.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    x = min(1.0, (update - config.warmup_steps) / max(1, total - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1.0 - x, "cosine": 0.5 * (1.0 + math.cos(math.pi * x))}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * shape)


@dataclass
class StepCounts:
    """Where a slot is. ``updates`` drives the schedule."""

    begun: int = 0
    """Updates begun, those without a step included: it keys the dropout of each."""
    updates: int = 0
    """Those that took a step: one whose steps were all skipped holds the schedule."""
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Slot:
    """One optimizer over named parameters, with its own moments and place in the schedule.

    Several slots may train the same parameters: a step in one leaves the moments of the others untouched.

    Args:
        parameters: What is trained, by name.
        config: The learner's options; those of the optimizer are read.
        total_updates: Length of the schedule; an update takes any number of steps at one learning rate.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TorchLearnerConfig, total_updates: int) -> None:
        self.parameters, self.config, self.total_updates = dict(parameters), config, total_updates
        self.counts = StepCounts()
        self._moved = False
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    @property
    def lr(self) -> float:
        """The learning rate of the update that was begun last."""
        return self.adamw.param_groups[0]["lr"]

    def begin(self) -> None:
        """Begins an update: clears gradients and sets its learning rate."""
        self.adamw.zero_grad(set_to_none=True)
        for group in self.adamw.param_groups:
            group["lr"] = lr_at(self.counts.updates, self.config, self.total_updates)
        self.counts.begun += 1
        self._moved = False

    def step(self, loss: Tensor) -> tuple[float, float, bool]:
        """One optimizer step on the gradients that have been accumulated, which are cleared.

        Args:
            loss: What they are the gradient of, to be checked and reported.

        Returns:
            The loss, the global gradient norm before clipping, and whether a step was taken.

        Raises:
            FloatingPointError: ``max_skipped_steps`` steps in a row were skipped for numbers that are not finite.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        loss_now, norm_now = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if math.isfinite(loss_now) and math.isfinite(norm_now):
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
            self.adamw.step()
            self.counts.steps += 1
            self.counts.updates += not self._moved
            self._moved = True
            self.counts.skipped_in_a_row = 0
        else:
            self._skip(loss_now, norm_now)
        self.adamw.zero_grad(set_to_none=True)
        return loss_now, norm_now, self.counts.skipped_in_a_row == 0

    def _skip(self, loss: float, norm: float) -> None:
        self.counts.skipped += 1
        self.counts.skipped_in_a_row += 1
        if self.counts.skipped_in_a_row < self.config.max_skipped_steps:
            return
        bad = [n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        named = f"; not finite: the gradient of {', '.join(bad[:3])} ({len(bad)} parameters)" if bad else ""
        raise FloatingPointError(
            f"{self.counts.skipped_in_a_row} optimizer steps in a row had no finite numbers: the loss is {loss}, the "
            f"gradient norm {norm}{named}. Lower lr or max_grad_norm, or look at the rewards of the last batches"
        )

    def save(self, stem: Path) -> dict[str, Any]:
        """Writes the moments to ``stem`` + ``.safetensors``; the result is the JSON part."""
        state = {
            f"{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in self.adamw.state.get(p, {}).items()
        }
        write_tensors(stem.with_suffix(".safetensors"), state)
        return dict(vars(self.counts))

    def restore(self, stem: Path, counts: Mapping[str, Any]) -> None:
        """Takes back what :meth:`save` wrote and returned.

        Raises:
            UserError: The moments are of other parameters, or of other shapes.
        """
        path = stem.with_suffix(".safetensors")
        state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for full_name, value in read_tensors(path).items():
            name, _, key = full_name.rpartition(".")
            p = self.parameters.get(name)
            if p is None or (key != "step" and value.shape != p.shape):
                raise UserError(f"{path}: {full_name} {list(value.shape)} fits no parameter that is trained here")
            state.setdefault(p, {})[key] = value.to(p.device)
        self.adamw.state.clear()
        for p, moments in state.items():
            self.adamw.state[p] = moments
        self.counts = StepCounts(**counts)


__all__ = ["Slot", "StepCounts", "lr_at"]
