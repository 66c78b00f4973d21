"""The number that the learner minimises, reduced once and by counts of the whole mini-batch.

``prepare`` sees a whole mini-batch, ``loss`` any part of it: the parts' losses, and so their gradients, add up to
those of the whole, however rows are split, ordered or padded. Positions outside the loss mask contribute exactly 0,
whatever they hold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from alignment.algorithms.aggregations import Aggregation, TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.corrections import Correction
from alignment.algorithms.demonstrations import is_demonstration, is_imitated
from alignment.algorithms.entropy_controls import EntropyControl
from alignment.algorithms.kl_penalties import KLPenalty, k3_estimate
from alignment.algorithms.policy_losses import PolicyLoss, Reinforce, log_ratio
from alignment.algorithms.state import needs_of
from alignment.types import RATIO_BASES, SOURCES, Batch


@dataclass(frozen=True)
class Objective:
    """``sum_{i,t} scale (weight w loss + c_kl kl + sum penalties) + c_nll nll`` over trained tokens.

    ``weight`` comes from mixers and entropy controls and ``w`` from the correction; both multiply the policy loss
    alone. ``scale`` is the aggregation's, of imitated rows apart: the loss is that of the rollouts plus that of the
    demonstrations, each a mean of its own. ``w`` and ``kl``, which presume tokens drawn from the policy, leave
    demonstrations out. ``nll`` is the mean negative log-likelihood of the tokens of rollouts that are correct by
    the first reward component (a value of at least 1): positive-example language modelling of VAPO (arXiv
    2504.05118).
    """

    policy_loss: PolicyLoss
    aggregation: Aggregation
    kl: KLPenalty | None = None
    kl_coefficient: float = 0.0
    """Of the KL in the loss; 0 when it is in the reward, where :func:`credit` put it."""
    entropy_controls: tuple[tuple[EntropyControl, Any], ...] = ()
    """Each control with its state."""
    correction: Correction | None = None
    positive_nll: float = 0.0
    """``c_nll``."""
    epochs: int = 1
    minibatches: int = 1
    lr_factor: float = 1.0
    """Multiplies the learning rate of the update."""
    update_norm: bool = False
    """Whether somebody asks how far the update moves the weights."""
    imitate: bool = False
    """Every row is a demonstration: advantage 1 and ratio base ``self``, whatever the batch says."""

    @classmethod
    def of(cls, algorithm: Algorithm, states: Mapping[str, Any]) -> Self:
        """The objective of ``algorithm`` with its components in ``states``."""
        kl = algorithm.kl
        in_loss = kl is not None and kl.apply_to == "loss"
        controls = enumerate(algorithm.entropy_controls)
        lr_factor = getattr(algorithm.weighting, "lr_factor", None)
        return cls(
            policy_loss=algorithm.policy_loss,
            aggregation=algorithm.aggregation,
            kl=kl,
            kl_coefficient=kl.coefficient_now(states.get("kl")) if kl is not None and in_loss else 0.0,
            entropy_controls=tuple((c, states.get(f"entropy_controls.{i}")) for i, c in controls),
            correction=algorithm.correction,
            positive_nll=algorithm.positive_nll,
            epochs=algorithm.epochs,
            minibatches=algorithm.minibatches,
            lr_factor=1.0 if lr_factor is None else lr_factor(states.get("weighting")),
            update_norm="update_norm" in algorithm.needs,
        )

    @classmethod
    def supervised(cls, aggregation: Aggregation = TokenMean()) -> Self:  # noqa: B008 - frozen
        """Negative log-likelihood of the trained tokens: REINFORCE at advantage 1 and ratio base ``self``."""
        return cls(policy_loss=Reinforce(), aggregation=aggregation, imitate=True)

    def needs(self, *, staleness: int = 0) -> frozenset[str]:
        """What must be annotated before :meth:`prepare`.

        ``old_logp`` when a component asks for it, when the policy moves between the updates of one batch, or when
        batches may be up to ``staleness`` > 0 policy versions old; otherwise the policy before the update is the one
        that :meth:`loss` is given, and a pass for it would compute the same numbers twice.
        """
        controls = [control for control, _ in self.entropy_controls]
        parts = [self.policy_loss, self.aggregation, self.kl, self.correction, *controls]
        asked = {need for part in parts for need in needs_of(part)}
        return frozenset(asked | {"old_logp"} if self.epochs * self.minibatches > 1 or staleness > 0 else asked)

    @property
    def wants_entropy_grad(self) -> bool:
        """Whether :meth:`loss` must be given entropies that carry a gradient."""
        return any(getattr(control, "penalises", False) for control, _ in self.entropy_controls)

    @torch.no_grad()
    def prepare(self, minibatch: Batch) -> Batch:
        """``minibatch`` with ``scale_BT`` and ``weight_BT``, which need all of it, and 0 outside the loss mask."""
        if self.imitate:
            minibatch = _imitation(minibatch)
        minibatch = _masked(minibatch)
        weight_BT = minibatch.weight_BT
        for control, state in self.entropy_controls:
            extra_BT = control.prepare(state, minibatch)
            if extra_BT is not None:
                weight_BT = extra_BT if weight_BT is None else weight_BT * extra_BT
        return replace(
            minibatch, scale_BT=self._scale(minibatch), weight_BT=weight_BT, nll_scale_BT=self._nll_scale(minibatch)
        )

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that the rows of ``micro`` make, and what :meth:`finish` needs to report on it.

        Args:
            logp_BT: Log-probabilities of the batch's tokens under the policy, in nats, with gradient.
            entropy_BT: Entropies at the same positions, in nats, with gradient if :attr:`wants_entropy_grad`; None
                where nobody computed them.
            micro: Rows of a batch that :meth:`prepare` returned.

        Returns:
            A scalar, and detached scalar sums by name: to be added over the parts of a mini-batch, or, where the
            name ends in ``_max``, combined by the maximum.
        """
        assert micro.scale_BT is not None, "prepare the whole mini-batch first"
        mask_BT, scale_BT = micro.loss_mask_BT, micro.scale_BT
        logp_BT = torch.where(mask_BT, logp_BT, 0.0)
        sampled_BT = mask_BT & ~is_demonstration(micro)[:, None]
        metrics: dict[str, Tensor] = {"ratio": log_ratio(logp_BT.detach(), micro).exp()}
        loss_BT, policy_metrics = self.policy_loss(logp_BT, micro)
        metrics |= policy_metrics
        if micro.weight_BT is not None:
            loss_BT = micro.weight_BT * loss_BT
        correction_BT, sampled_metrics = self._mismatch(logp_BT.detach(), micro, sampled_BT)
        if correction_BT is not None:
            loss_BT = correction_BT * loss_BT
        if micro.ref_logp_BT is not None:
            sampled_metrics["kl"] = k3_estimate(logp_BT.detach(), micro.ref_logp_BT)
        if self.kl_coefficient:
            assert self.kl is not None and micro.ref_logp_BT is not None, "a KL in the loss needs 'reference'"
            kl_BT = torch.where(sampled_BT, self.kl(logp_BT, micro.ref_logp_BT), 0.0)
            loss_BT = loss_BT + self.kl_coefficient * kl_BT
        if entropy_BT is not None:
            entropy_BT = torch.where(mask_BT, entropy_BT, 0.0)
            metrics["entropy"] = entropy_BT
            loss_BT = loss_BT + self._penalties(entropy_BT)
        else:
            assert not self.wants_entropy_grad, "an entropy control's penalty needs entropies"
        loss = (scale_BT * torch.where(mask_BT, loss_BT, 0.0)).sum()
        if micro.nll_scale_BT is not None:
            loss = loss - self.positive_nll * (micro.nll_scale_BT * logp_BT).sum()
        counts = {"loss": loss.detach(), "tokens": mask_BT.sum(), "sampled_tokens": sampled_BT.sum()}
        return loss, counts | _sums(metrics, mask_BT) | _sums(sampled_metrics, sampled_BT)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a mini-batch from the combined sums of its parts.

        Means per token: per sampled token for ``kl``, ``mismatch_*`` and ``correction_*`` (left out where there is
        none), per trained token for the others. ``loss`` and token counts are totals, ``*_max`` maxima.
        """
        totals = {name: float(value) for name, value in sums.items()}
        plain = ("loss", "tokens", "sampled_tokens")
        metrics = {name: totals[name] for name in plain}
        for name, total in totals.items():
            of_sampled = name == "kl" or name.startswith(("mismatch_", "correction_"))
            count = totals["sampled_tokens"] if of_sampled else totals["tokens"]
            if name not in plain and count > 0:
                metrics[name] = total if name.endswith("_max") else total / count
        return metrics

    def _scale(self, minibatch: Batch) -> Tensor:
        """The aggregation's scales: those of imitated rows apart, so that neither kind dilutes the other."""
        mask_BT, imitated_B1 = minibatch.loss_mask_BT, is_imitated(minibatch)[:, None]
        return self.aggregation.scale(mask_BT & ~imitated_B1) + self.aggregation.scale(mask_BT & imitated_B1)

    def _nll_scale(self, minibatch: Batch) -> Tensor | None:
        """One over the number of tokens of correct rollouts, at those tokens."""
        if not self.positive_nll:
            return None
        correct_B = (minibatch.rewards_BK[:, 0] >= 1) & ~is_demonstration(minibatch)
        correct_BT = minibatch.loss_mask_BT & correct_B[:, None]
        return correct_BT.float() / correct_BT.sum().clamp(min=1)

    def _mismatch(self, logp_BT: Tensor, micro: Batch, sampled_BT: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The correction's weights, and metrics of how far sampler and learner are apart on sampled tokens."""
        old_BT = logp_BT if micro.old_logp_BT is None else micro.old_logp_BT
        behaviour_BT = micro.behaviour_logp_BT
        metrics = {
            "mismatch_kl": k3_estimate(behaviour_BT, old_BT),
            "mismatch_abs_max": (old_BT - behaviour_BT).abs(),
        }
        if self.correction is None:
            return None, metrics
        weight_BT, of_correction = self.correction.weights(old_BT, behaviour_BT, sampled_BT)
        metrics |= {f"correction_{name}": value_BT for name, value_BT in of_correction.items()}
        return torch.where(sampled_BT, weight_BT.detach(), 1.0), metrics

    def _penalties(self, entropy_BT: Tensor) -> Tensor:
        total_BT = torch.zeros_like(entropy_BT)
        for control, state in self.entropy_controls:
            penalty_BT = control.penalty(state, entropy_BT)
            if penalty_BT is not None:
                name = type(control).__name__
                assert getattr(control, "penalises", False), f"{name} gives a penalty, so its 'penalises' must be True"
                total_BT = total_BT + penalty_BT
        return total_BT


def combine(sums: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of two disjoint parts of a mini-batch as those of both together."""
    assert not sums or sums.keys() == more.keys(), "parts of one mini-batch report the same names"
    join = {True: torch.maximum, False: torch.add}
    return {name: join[name.endswith("_max")](sums[name], value) if sums else value for name, value in more.items()}


def _imitation(batch: Batch) -> Batch:
    return replace(
        batch,
        adv_BT=batch.loss_mask_BT.float(),
        source_B=torch.full_like(batch.source_B, SOURCES.index("demonstration")),
        ratio_base_B=torch.full_like(batch.ratio_base_B, RATIO_BASES.index("self")),
    )


def _masked(batch: Batch) -> Batch:
    """``batch`` with 0 outside the loss mask, where NaN or infinity would survive a multiplication by 0."""
    mask_BT = batch.loss_mask_BT
    names = [f.name for f in fields(batch) if f.name.endswith("_BT")]
    tensors = {name: v for name in names if isinstance(v := getattr(batch, name), Tensor) and v.is_floating_point()}
    clean = {
        name: torch.where(mask_BT if value.dim() == 2 else mask_BT[..., None], value, 0.0)
        for name, value in tensors.items()
    }
    return replace(batch, **clean)


def _sums(metrics: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    """The sum of each metric over the mask, or its maximum where the name ends in ``_max``."""

    def reduce(name: str, value_BT: Tensor) -> Tensor:
        if name.endswith("_max"):
            return torch.where(mask_BT, value_BT.detach(), -math.inf).max()
        return torch.where(mask_BT, value_BT.detach(), 0.0).sum()

    return {name: reduce(name, value_BT) for name, value_BT in metrics.items()}
