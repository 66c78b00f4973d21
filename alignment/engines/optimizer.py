"""AdamW with a schedule, clipping and a guard against numbers that are not finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignment.engines.learner_config import LearnerOptions
from alignment.errors import UserError
from alignment.tensorfile import read_tensors, write_tensors


def lr_at(update: int, config: LearnerOptions, total: int) -> float:
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


HEAD = "value_head."
"""How names of parameters begin that belong to a value head on the policy."""


def adamw_over(
    parameters: Mapping[str, nn.Parameter], config: LearnerOptions, head_lr_ratio: float = 1.0
) -> torch.optim.AdamW:
    """AdamW whose weight decay acts on parameters of two or more dimensions; a value head's have another rate."""
    groups: list[dict[str, Any]] = []
    for head, ratio in ((False, 1.0), (True, head_lr_ratio)):
        own = [p for name, p in parameters.items() if name.startswith(HEAD) == head]
        groups.append(
            {"params": [p for p in own if p.ndim >= 2], "weight_decay": config.weight_decay, "lr_ratio": ratio}
        )
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, "lr_ratio": ratio})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(adamw: torch.optim.AdamW, lr: float) -> None:
    """Sets the learning rate; a value head's is its own share of it."""
    for group in adamw.param_groups:
        group["lr"] = lr * group["lr_ratio"]


@dataclass
class StepCounts:
    """Where a slot is. ``updates`` drives the schedule."""

    begun: int = 0
    """Updates begun, those without a step included: it keys the dropout of each."""
    updates: int = 0
    """Those that took a step: one whose steps were all skipped holds the schedule."""
    steps: int = 0
    steps_before_moments: int = 0
    """Those that were taken before the moments began: others were in their place until an adapter was merged."""
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Tried:
    """What came of an attempt to step."""

    loss: float
    norm: float
    """The global gradient norm before clipping."""
    not_finite: str | None = None
    """None where the step was taken. Otherwise what is not finite, or "" if no more than these two is known."""


class Stepper(Protocol):
    """Moments over the trained parameters, and how a step on them is taken."""

    adamw: torch.optim.AdamW

    def begin(self, lr: float) -> None:
        """The next steps are taken with these moments, at this rate; gradients are cleared."""
        ...

    def step(self, loss: Tensor) -> Tried:
        """Clips and steps if ``loss`` and the gradients are finite, on every rank alike; clears the gradients."""
        ...

    def save(self, stem: Path) -> None:
        """Writes the moments to files whose names begin with ``stem``."""
        ...

    def restore(self, stem: Path, steps: int) -> None:
        """Takes back what :meth:`save` wrote after ``steps`` steps with these moments."""
        ...


class AdamW:
    """The moments of one process that holds all parameters and their gradients."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: LearnerOptions, head_lr_ratio: float = 1.0
    ) -> None:
        self.parameters, self.max_grad_norm = dict(parameters), config.max_grad_norm
        self.adamw = adamw_over(self.parameters, config, head_lr_ratio)

    def begin(self, lr: float) -> None:
        self.adamw.zero_grad(set_to_none=True)
        set_lr(self.adamw, lr)

    def step(self, loss: Tensor) -> Tried:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        loss_now, norm_now = torch.stack([loss.detach().float(), norm.float()]).tolist()
        bad: str | None = None
        if math.isfinite(loss_now) and math.isfinite(norm_now):
            if self.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
            self.adamw.step()
        else:
            names = [n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            bad = f"the gradient of {', '.join(names[:3])} ({len(names)} parameters)" if names else ""
        self.adamw.zero_grad(set_to_none=True)
        return Tried(loss_now, norm_now, bad)

    def save(self, stem: Path) -> None:
        state = {
            f"{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in self.adamw.state.get(p, {}).items()
        }
        write_tensors(stem.with_name(f"{stem.name}.safetensors"), state)

    def restore(self, stem: Path, steps: int) -> None:
        path = stem.with_name(f"{stem.name}.safetensors")
        if not path.is_file():
            raise UserError(
                f"{path.parent} has no moments that this learner reads ({path.name}): another learner wrote it. Go on"
                " with that one, or start a new run from its weights"
            )
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


class Slot:
    """One optimizer over some parameters, with its own moments and place in the schedule.

    Several slots may train the same parameters: a step in one leaves the moments of the others untouched.

    Args:
        config: The learner's options; those of the optimizer are read.
        total_updates: Length of the schedule; an update takes any number of steps at one learning rate.
        stepper: Takes the steps.
    """

    def __init__(self, config: LearnerOptions, total_updates: int, stepper: Stepper) -> None:
        self.config, self.total_updates, self.stepper = config, total_updates, stepper
        self.counts = StepCounts()
        self.lr = config.lr
        """The learning rate of the update that was begun last."""
        self._moved = False

    @property
    def adamw(self) -> torch.optim.AdamW:
        """PyTorch's optimizer underneath."""
        return self.stepper.adamw

    def follow(self, old: "Slot") -> "Slot":
        """Goes on in the schedule where ``old`` is, with moments that begin anew."""
        self.counts = replace(old.counts, steps_before_moments=old.counts.steps)
        return self

    def begin(self, lr_factor: float = 1.0) -> None:
        """Begins an update: clears gradients and sets its learning rate, ``lr_factor`` times that of the schedule."""
        self.lr = lr_factor * lr_at(self.counts.updates, self.config, self.total_updates)
        self.stepper.begin(self.lr)
        self.counts.begun += 1
        self._moved = False

    def step(self, loss: Tensor) -> tuple[float, float, bool]:
        """One optimizer step on the gradients that have been accumulated, which are cleared.

        Args:
            loss: What they are the gradient of, to be checked and reported; of several ranks, this one's part.

        Returns:
            The loss, the global gradient norm before clipping, and whether a step was taken.

        Raises:
            FloatingPointError: ``max_skipped_steps`` steps in a row were skipped for numbers that are not finite.
        """
        tried = self.stepper.step(loss)
        if tried.not_finite is None:
            self.counts.steps += 1
            self.counts.updates += not self._moved
            self._moved = True
            self.counts.skipped_in_a_row = 0
        else:
            self._skip(tried)
        return tried.loss, tried.norm, tried.not_finite is None

    def _skip(self, tried: Tried) -> None:
        self.counts.skipped += 1
        self.counts.skipped_in_a_row += 1
        if self.counts.skipped_in_a_row < self.config.max_skipped_steps:
            return
        named = f"; not finite: {tried.not_finite}" if tried.not_finite else ""
        raise FloatingPointError(
            f"{self.counts.skipped_in_a_row} optimizer steps in a row had no finite numbers: the loss is {tried.loss}, "
            f"the gradient norm {tried.norm}{named}. Lower lr or max_grad_norm, or look at the rewards of the last "
            "batches"
        )

    def save(self, stem: Path) -> dict[str, Any]:
        """Writes the moments to files that begin with ``stem``; the result is the JSON part."""
        self.stepper.save(stem)
        return dict(vars(self.counts))

    def restore(self, stem: Path, counts: Mapping[str, Any]) -> None:
        """Takes back what :meth:`save` wrote and returned.

        Raises:
            UserError: The moments are of other parameters, or of other shapes.
        """
        self.counts = StepCounts(**counts)
        self.stepper.restore(stem, self.counts.steps - self.counts.steps_before_moments)


def step_metrics(outcomes: Sequence[tuple[float, float, bool]]) -> dict[str, float]:
    """Of what :meth:`Slot.step` returned: means of ``loss`` and ``grad_norm`` over the steps that were taken, if any
    were, and ``optimizer_steps`` and ``skipped_steps``."""
    taken = [(loss, norm) for loss, norm, stepped in outcomes if stepped]
    found = {"optimizer_steps": float(len(taken)), "skipped_steps": float(len(outcomes) - len(taken))}
    if taken:
        found["loss"] = sum(loss for loss, _ in taken) / len(taken)
        found["grad_norm"] = sum(norm for _, norm in taken) / len(taken)
    return found


__all__ = ["AdamW", "Slot", "StepCounts", "Stepper", "Tried", "adamw_over", "lr_at", "step_metrics"]
