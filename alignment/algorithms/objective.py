"""The number that the learner minimises, reduced once and by counts of the whole mini-batch.

``prepare`` sees a whole mini-batch, ``loss`` any part of it: the parts' losses, and so their gradients, add up to
those of the whole, however rows are split, ordered or padded. Positions outside the loss mask contribute exactly 0,
whatever they hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from alignment.algorithms.aggregations import Aggregation, TokenMean
from alignment.algorithms.algorithm import Algorithm
from alignment.algorithms.corrections import Correction
from alignment.algorithms.demonstrations import is_demonstration, is_imitated
from alignment.algorithms.entropy_controls import EntropyControl, PenaltyView
from alignment.algorithms.kl_penalties import KLPenalty, k3_estimate
from alignment.algorithms.policy_losses import PolicyLoss, Reinforce, log_ratio, shaped
from alignment.algorithms.state import annotations, needs_of
from alignment.algorithms.steer import own_change
from alignment.types import RATIO_BASES, SOURCES, Batch


@dataclass(frozen=True)
class Objective:
    """``sum_{i,t} scale (weight w loss + c_kl kl + sum penalties) + c_nll nll`` over trained tokens.

    ``weight`` is the product of the mixer's and all entropy controls', and ``w`` is the correction's; both multiply
    the policy loss alone, after its clip. ``scale`` is the aggregation's, and that of imitated rows a token mean of
    their own: the loss is that of the rollouts plus that of the demonstrations, and neither dilutes the other. ``w``
    and ``kl``, which presume tokens drawn from the policy, leave demonstrations out. ``nll`` is the mean negative
    log-likelihood of the tokens of rollouts that are correct by the first reward component (a value of at least 1):
    positive-example language modelling of VAPO (arXiv 2504.05118).
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
    shaping: float | None = None
    """Of rows of ratio base ``one``: gamma of :func:`~alignment.algorithms.policy_losses.shaped`."""
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
            shaping=getattr(algorithm.mixer, "shaping", None),
        )

    @classmethod
    def supervised(
        cls,
        aggregation: Aggregation = TokenMean(),  # noqa: B008 - frozen
        policy_loss: PolicyLoss = Reinforce(),  # noqa: B008 - frozen
    ) -> Self:
        """Negative log-likelihood of the trained tokens: REINFORCE at advantage 1 and ratio base ``self``.

        Args:
            aggregation: Of tokens.
            policy_loss: Another loss of imitated tokens (:mod:`alignment.algorithms.imitations`).
        """
        return cls(policy_loss=policy_loss, aggregation=aggregation, imitate=True)

    def needs(self, *, staleness: int = 0) -> frozenset[str]:
        """What must be annotated before :meth:`prepare`.

        ``old_logp`` when a component asks for it, when the policy moves between the updates of one batch, or when
        batches may be up to ``staleness`` > 0 policy versions old; otherwise the policy before the update is the one
        that :meth:`loss` is given, and a pass for it would compute the same numbers twice.
        """
        controls = [control for control, _ in self.entropy_controls]
        parts = [self.policy_loss, self.aggregation, self.kl, self.correction, *controls]
        asked = annotations(parts)
        return asked | {"old_logp"} if self.epochs * self.minibatches > 1 or staleness > 0 else asked

    @property
    def entropies(self) -> Literal["none", "value", "gradient"]:
        """What :meth:`loss` is to be given: with a gradient where a control uses them, none where all is imitated."""
        if any(getattr(control, "entropy_gradient", False) for control, _ in self.entropy_controls):
            return "gradient"
        return "none" if self.imitate else "value"

    @property
    def wants_logp(self) -> bool:
        """Whether :meth:`prepare` must be given ``logp_BT`` of the policy before the mini-batch's step.

        Before the first step of a batch that is ``old_logp_BT``, which is taken where ``logp_BT`` is absent.
        """
        return any("logp" in needs_of(part) for part in (self.policy_loss, *(c for c, _ in self.entropy_controls)))

    @torch.no_grad()
    def prepare(self, minibatch: Batch) -> Batch:
        """``minibatch`` with what needs all of it, and 0 outside the loss mask.

        ``scale_BT``, ``nll_scale_BT``; ``control_weight_BT`` and ``marks_BTC`` of entropy controls; ``loss_stats_BTS``.
        """
        if self.imitate:
            minibatch = _imitation(minibatch)
        if self.wants_logp and minibatch.logp_BT is None:
            minibatch = replace(minibatch, logp_BT=minibatch.old_logp_BT)
        minibatch = _masked(minibatch)
        set_aside = getattr(self.policy_loss, "prepare", None)
        return replace(
            minibatch,
            scale_BT=self._scale(minibatch),
            nll_scale_BT=self._nll_scale(minibatch),
            control_weight_BT=self._control_weight(minibatch),
            marks_BTC=self._marks(minibatch),
            loss_stats_BTS=None if set_aside is None else set_aside(minibatch),
        )

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that the rows of ``micro`` make, and what :meth:`finish` needs to report on it.

        Args:
            logp_BT: Log-probabilities of the batch's tokens under the policy, in nats, with gradient.
            entropy_BT: Entropies at the same positions, in nats, as :attr:`entropies` says; None where nobody
                computed them.
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
        policy_BT, policy_metrics = self._policy(logp_BT, micro)
        correction_BT, sampled_metrics = self._mismatch(logp_BT.detach(), micro, sampled_BT)
        weights = [w for w in (micro.weight_BT, micro.control_weight_BT, correction_BT) if w is not None]
        loss_BT = _product(policy_BT, weights)
        metrics |= policy_metrics | _control_metrics(micro)
        if micro.ref_logp_BT is not None:
            sampled_metrics["kl"] = k3_estimate(logp_BT.detach(), micro.ref_logp_BT)
        if self.kl_coefficient:
            assert self.kl is not None and micro.ref_logp_BT is not None, "a KL in the loss needs 'reference'"
            kl_BT = torch.where(sampled_BT, self.kl(logp_BT, micro.ref_logp_BT), 0.0)
            loss_BT = loss_BT + self.kl_coefficient * kl_BT
        if entropy_BT is not None:
            entropy_BT = torch.where(mask_BT, entropy_BT, 0.0)
            pull_BT = _product(self._pull(logp_BT, micro), weights)
            metrics |= {"entropy": entropy_BT, "entropy_predicted": pull_BT * own_change(logp_BT, entropy_BT).detach()}
        else:
            assert self.entropies != "gradient", "an entropy control's penalty needs entropies"
        penalty_BT = self._penalties(logp_BT, entropy_BT, micro)
        if penalty_BT is not None:
            metrics["entropy_penalty"] = penalty_BT
            loss_BT = loss_BT + penalty_BT
        loss = (scale_BT * torch.where(mask_BT, loss_BT, 0.0)).sum()
        if micro.nll_scale_BT is not None:
            loss = loss - self.positive_nll * (micro.nll_scale_BT * logp_BT).sum()
        counts = {"loss": loss.detach(), "tokens": mask_BT.sum(), "sampled_tokens": sampled_BT.sum()}
        sums = counts | _sums(metrics, mask_BT) | _sums(sampled_metrics, sampled_BT)
        return loss, sums if entropy_BT is None else sums | _sums_by_sign(entropy_BT.detach(), micro)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a mini-batch from the combined sums of its parts.

        Means per token: per sampled token for ``kl``, ``mismatch_*`` and ``correction_*`` (left out where there is
        none), per token of positive or negative advantage for ``entropy_positive`` and ``entropy_negative``, per
        trained token for the others. ``loss`` and token counts are totals, ``*_max`` maxima.
        """
        totals = {name: float(value) for name, value in sums.items()}
        plain = ("loss", "tokens", "sampled_tokens")
        metrics = {name: totals[name] for name in plain}
        for name, total in totals.items():
            of_sampled = name == "kl" or name.startswith(("mismatch_", "correction_"))
            count = totals.get(f"{name}_tokens", totals["sampled_tokens"] if of_sampled else totals["tokens"])
            if name not in plain and not name.endswith("_tokens") and count > 0:
                metrics[name] = total if name.endswith("_max") else total / count
        return metrics

    def _scale(self, minibatch: Batch) -> Tensor:
        """The aggregation's scales, and a token mean over imitated rows, as in supervised fine-tuning."""
        if self.imitate:
            return self.aggregation.scale(minibatch.loss_mask_BT)
        mask_BT, imitated_B1 = minibatch.loss_mask_BT, is_imitated(minibatch)[:, None]
        return self.aggregation.scale(mask_BT & ~imitated_B1) + TokenMean().scale(mask_BT & imitated_B1)

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

    def _control_weight(self, minibatch: Batch) -> Tensor | None:
        """The product of the entropy controls' weights."""
        made = [control.prepare(state, minibatch) for control, state in self.entropy_controls]
        weights = [torch.where(minibatch.loss_mask_BT, weight_BT, 0.0) for weight_BT in made if weight_BT is not None]
        return _product(weights[0], weights[1:]) if weights else None

    def _marks(self, minibatch: Batch) -> Tensor | None:
        """What each control sets aside, in their order."""
        none_BT = torch.zeros(minibatch.loss_mask_BT.shape, device=minibatch.ids_BT.device)
        made = [
            control.mark(state, minibatch) if hasattr(control, "mark") else none_BT  # pyright: ignore[reportAttributeAccessIssue]
            for control, state in self.entropy_controls
        ]
        if all(mark_BT is none_BT for mark_BT in made):
            return None
        return torch.where(minibatch.loss_mask_BT[..., None], torch.stack(made, -1), 0.0)

    def _policy(self, logp_BT: Tensor, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss, shaped where the mixer asks."""
        loss_BT, metrics = self.policy_loss(logp_BT, micro)
        return (loss_BT if self.shaping is None else shaped(loss_BT, logp_BT, micro, self.shaping)), metrics

    def _pull(self, logp_BT: Tensor, micro: Batch) -> Tensor:
        """How hard the policy loss alone pulls each log-probability up: minus its derivative."""
        with torch.enable_grad():
            leaf_BT = logp_BT.detach().requires_grad_()
            return -torch.autograd.grad(self._policy(leaf_BT, micro)[0].sum(), leaf_BT)[0]

    def _penalties(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> Tensor | None:
        old_BT = logp_BT.detach() if micro.old_logp_BT is None else micro.old_logp_BT
        penalties = []
        for i, (control, state) in enumerate(self.entropy_controls):
            with_entropy = getattr(control, "entropy_gradient", False)
            mark_BT = None if micro.marks_BTC is None or not hasattr(control, "mark") else micro.marks_BTC[..., i]
            view = PenaltyView(logp_BT, old_BT, entropy_BT if with_entropy else None, mark_BT)
            penalty_BT = control.penalty(state, view)
            if penalty_BT is not None:
                penalties.append(penalty_BT)
        return torch.stack(penalties).sum(0) if penalties else None


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


def _product(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    for other in others:
        first = other * first
    return first


def _control_metrics(micro: Batch) -> dict[str, Tensor]:
    """``control_weight``, the mean over trained tokens, and ``control_dropped``, the share whose weight is 0."""
    weight_BT = micro.control_weight_BT
    return {} if weight_BT is None else {"control_weight": weight_BT, "control_dropped": (weight_BT == 0).float()}


def _sums_by_sign(entropy_BT: Tensor, micro: Batch) -> dict[str, Tensor]:
    """Sums of entropies, and counts, over the tokens of positive and of negative advantage."""
    assert micro.adv_BT is not None
    sums: dict[str, Tensor] = {}
    for name, of_BT in (("entropy_positive", micro.adv_BT > 0), ("entropy_negative", micro.adv_BT < 0)):
        sums |= {name: (entropy_BT * of_BT).sum(), f"{name}_tokens": (of_BT & micro.loss_mask_BT).sum()}
    return sums


def _sums(metrics: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    """The sum of each metric over the mask, or its maximum where the name ends in ``_max``."""

    def reduce(name: str, value_BT: Tensor) -> Tensor:
        if name.endswith("_max"):
            return torch.where(mask_BT, value_BT.detach(), -math.inf).max()
        return torch.where(mask_BT, value_BT.detach(), 0.0).sum()

    return {name: reduce(name, value_BT) for name, value_BT in metrics.items()}
