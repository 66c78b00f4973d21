"""What the learner minimises on pairs. Reduced once, by counts of the whole mini-batch, as the policy objective is.

The rows of a batch say which side they are on (``side_B``): 1 is preferred, -1 is not, 0 is a prompt with another one's
completion, 2 a demonstration of the prompt. The two sides of a pair have one number in ``group_B``, and the learner
keeps rows of a group in one micro-batch. A completion that was judged by itself is of one side, and of no pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.algorithms.preferences import Masked, Pairs, PreferenceLoss, Rows, preference_losses
from alignment.algorithms.state import annotations, needs_of
from alignment.types import Batch

PER_TOKEN = ("entropy", "logp", "divergence", "sparsity/ratio", "sparsity/divergence")
CHOSEN, REJECTED, MISMATCHED, GROUND_TRUTH = 1, -1, 0, 2


@dataclass(frozen=True)
class PreferenceObjective:
    """``sum_k weight_k loss_k``, each a mean over pairs, over rows or over tokens of the mini-batch."""

    losses: Sequence[tuple[PreferenceLoss, Any]]
    """Each with its state."""
    epochs: int = 1
    minibatches: int = 1
    lr_factor: float = 1.0
    update_norm: bool = False
    entropies: Literal["none", "value"] = "none"
    """Whether those of the policy are reported, as of one that samples its own completions."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be annotated before :meth:`prepare`."""
        return annotations(loss for loss, _ in self.losses)

    @property
    def wants_logp(self) -> bool:
        """Whether :meth:`prepare` must be given log-probabilities of the policy before the mini-batch's step."""
        return any("logp" in needs_of(loss) for loss, _ in self.losses)

    @property
    def token_masks(self) -> Any:
        """Where the masks of tokens come from that a loss asks for; None where none does.

        :meth:`loss` then wants ``masks_BT2`` and ``divergence_BT`` in its rows.
        """
        asked = (getattr(loss, "token_masks", None) for loss, _ in self.losses)
        return next((masks for masks in asked if masks is not None), None)

    @torch.no_grad()
    def prepare(self, minibatch: Batch) -> Batch:
        """``minibatch`` with ``pair_scale_B``, ``row_scale_B``, ``shift_B`` and ``nll_scale_BT``.

        Rows of other prompts' completions have done their part then and are not trained on.
        """
        assert minibatch.side_B is not None, "rows of preferences say which side they are on"
        side_B = minibatch.side_B
        shift = self._shift(minibatch)
        wanted = {loss.of for loss, _ in self.losses if hasattr(loss, "token_loss")}  # pyright: ignore[reportAttributeAccessIssue]
        trained_B = (side_B.abs() == 1) | ((side_B == GROUND_TRUTH) & ("ground_truth" in wanted))
        mask_BT = minibatch.loss_mask_BT & trained_B[:, None]
        rows, pairs = mask_BT.any(1) & (side_B.abs() == 1), pairs_of(side_B, minibatch.group_B)[0]
        ones_B = torch.ones(len(minibatch), device=side_B.device)
        return replace(
            minibatch,
            loss_mask_BT=mask_BT,
            pair_scale_B=ones_B / max(1, len(pairs)),
            row_scale_B=ones_B / rows.sum().clamp(min=1),
            shift_B=ones_B * shift,
            nll_scale_BT=self._nll_scale(mask_BT, side_B),
        )

    def loss(self, logp_BT: Tensor, entropy_BT: Tensor | None, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that the rows of ``micro`` make, whole pairs, and sums for :meth:`finish`.

        Args:
            logp_BT: Log-probabilities of the tokens under the policy, in nats, with gradient.
            entropy_BT: As :attr:`entropies` says.
            micro: Rows of a batch that :meth:`prepare` returned.
        """
        assert micro.pair_scale_B is not None and micro.row_scale_B is not None, "prepare the whole mini-batch first"
        mask_BT = micro.loss_mask_BT
        logp_BT = torch.where(mask_BT, logp_BT, 0.0)
        rows, at = _rows(logp_BT, micro)
        pairs = _pairs(rows, micro, at)
        total, sums = logp_BT.sum() * 0.0, dict[str, Tensor]()
        for i, (loss, state) in enumerate(self.losses):
            part = self._part(i, loss, state, rows, pairs, logp_BT, micro)
            total = total + loss.weight * part
            sums[f"loss/{i}"] = part.detach()
        sums |= _pair_sums(pairs) | _side_sums(rows) | {"loss": total.detach(), "tokens": mask_BT.sum()}
        if entropy_BT is not None:
            sums["entropy"] = torch.where(mask_BT, entropy_BT, 0.0).detach().sum()
        sums |= {"logp": logp_BT.detach().sum()} | _mask_sums(micro)
        if micro.shift_B is not None and self.wants_logp:
            sums["shift_max"] = micro.shift_B.max()
        return total, sums

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a mini-batch from the combined sums of its parts.

        ``loss``, and of each loss ``loss/NAME``; counts ``pairs``, ``rows``, ``wanted`` of them, and ``tokens``; means
        per pair: ``accuracy/pairs`` (the share whose preferred completion has the higher implicit reward) and
        ``margin``; means per completion of a side: ``ratio/chosen`` and ``ratio/rejected`` (nats; without a reference
        log-probabilities per token), ``logp/...`` and ``length/...`` alike; ``logp`` and, if it was computed,
        ``entropy`` per trained token; ``kl_shift``, KTO's z. With masks of tokens ``divergence`` per token, before
        masking, and ``sparsity/ratio`` and ``sparsity/divergence``, the shares of tokens whose mask is 0.
        """
        totals = {name: float(value) for name, value in sums.items()}
        pairs, tokens = totals.pop("pairs"), totals.pop("tokens")
        rows = {side: totals.pop(f"rows/{side}") for side in ("chosen", "rejected")}
        found = {"loss": totals.pop("loss"), "pairs": pairs, "tokens": tokens}
        found |= {"rows": sum(rows.values()), "wanted": rows["chosen"]}
        for i, name in enumerate(self._names()):
            found[f"loss/{name}"] = totals.pop(f"loss/{i}")
        if "shift_max" in totals:
            found["kl_shift"] = totals.pop("shift_max")
        per_token = {name: totals.pop(name) / tokens for name in PER_TOKEN if name in totals and tokens}
        counts = {name: rows.get(name.rpartition("/")[2], pairs) for name in totals}
        return found | per_token | {name: total / counts[name] for name, total in totals.items() if counts[name]}

    def _names(self) -> list[str]:
        """Of the losses, told apart where one is there twice."""
        names = [preference_losses.name_of(loss) for loss, _ in self.losses]
        return [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]

    def _part(self, i: int, loss: Any, state: Any, rows: Rows, pairs: Pairs, logp_BT: Tensor, micro: Batch) -> Tensor:
        assert micro.pair_scale_B is not None and micro.row_scale_B is not None
        if hasattr(loss, "pair_loss"):
            return (micro.pair_scale_B[0] * loss.pair_loss(state, pairs)).sum()
        if hasattr(loss, "row_loss"):
            return (micro.row_scale_B[0] * loss.row_loss(state, rows)).sum()
        assert micro.nll_scale_BT is not None and micro.side_B is not None
        own_B = _of(loss, micro.side_B)
        return loss.token_loss(logp_BT, torch.where(own_B[:, None], micro.nll_scale_BT, 0.0))

    def _shift(self, minibatch: Batch) -> Tensor | float:
        """Mean ratio of rows with another one's completion, at least 0."""
        if not self.wants_logp:
            return 0.0
        assert minibatch.side_B is not None and minibatch.ref_logp_BT is not None
        logp_BT = minibatch.old_logp_BT if minibatch.logp_BT is None else minibatch.logp_BT
        assert logp_BT is not None, "it is annotated with log-probabilities"
        odd_B = minibatch.side_B == MISMATCHED
        ratio_BT = torch.where(minibatch.loss_mask_BT & odd_B[:, None], logp_BT - minibatch.ref_logp_BT, 0.0)
        return (ratio_BT.sum() / odd_B.sum().clamp(min=1)).clamp(min=0)

    def _nll_scale(self, mask_BT: Tensor, side_B: Tensor) -> Tensor | None:
        """What each token counts in the likelihood losses, of which there is one for each side."""
        found = None
        for loss, _ in self.losses:
            if hasattr(loss, "token_loss"):
                scale_BT = loss.scale(mask_BT & _of(loss, side_B)[:, None])  # pyright: ignore[reportAttributeAccessIssue]
                found = scale_BT if found is None else found + scale_BT
        return found


def _of(loss: Any, side_B: Tensor) -> Tensor:
    """The rows whose likelihood a loss is of."""
    return side_B == (CHOSEN if loss.of == "chosen" else GROUND_TRUTH)


def pairs_of(side_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the preferred and the other rows of all whole pairs, in the order of their groups."""
    found = []
    for side in (CHOSEN, REJECTED):
        index = (side_B == side).nonzero()[:, 0]
        found.append(index[group_B[index].argsort(stable=True)])
    chosen, rejected = found
    chosen = chosen[torch.isin(group_B[chosen], group_B[rejected])]
    rejected = rejected[torch.isin(group_B[rejected], group_B[chosen])]
    assert torch.equal(group_B[chosen], group_B[rejected]), "a pair has one preferred completion and one other"
    return chosen, rejected


def _rows(logp_BT: Tensor, micro: Batch) -> tuple[Rows, Tensor]:
    """The compared rows, and where each row of ``micro`` is among them (-1: nowhere)."""
    assert micro.side_B is not None and micro.shift_B is not None
    mask_BT = micro.loss_mask_BT
    index = (micro.side_B.abs() == 1).nonzero()[:, 0]
    at = torch.full((len(micro),), -1, device=index.device).index_put(
        (index,), torch.arange(len(index), device=index.device)
    )
    ref_BT = micro.ref_logp_BT
    ref_R = None if ref_BT is None else torch.where(mask_BT, ref_BT, 0.0).sum(1)[index]
    rows = Rows(
        logp_BT.sum(1)[index],
        ref_R,
        mask_BT.sum(1)[index].float(),
        micro.side_B[index] == CHOSEN,
        micro.shift_B[index],
        _masked(logp_BT, micro, index),
    )
    return rows, at


def _masked(logp_BT: Tensor, micro: Batch, index: Tensor) -> Masked | None:
    """What the masks of the rows ``index`` leave."""
    if micro.masks_BT2 is None:
        return None
    assert micro.divergence_BT is not None and micro.ref_logp_BT is not None, "masks come with divergences"
    masks_BT2 = torch.where(micro.loss_mask_BT[..., None], micro.masks_BT2, 0.0)
    ratio_BT, divergence_BT = logp_BT - micro.ref_logp_BT, micro.divergence_BT
    found_BT2 = masks_BT2 * torch.stack([ratio_BT, divergence_BT], -1)
    ratio_R, divergence_R = torch.where(micro.loss_mask_BT[..., None], found_BT2, 0.0).sum(1)[index].unbind(-1)
    return Masked(ratio_R, divergence_R, masks_BT2.sum(1)[index])


@torch.no_grad()
def _mask_sums(micro: Batch) -> dict[str, Tensor]:
    """Over tokens: the divergence, and how many masks are 0."""
    if micro.masks_BT2 is None or micro.divergence_BT is None:
        return {}
    zero_N2 = micro.masks_BT2[micro.loss_mask_BT] == 0
    ratio, divergence = zero_N2.sum(0).unbind()
    return {
        "divergence": micro.divergence_BT[micro.loss_mask_BT].sum(),
        "sparsity/ratio": ratio,
        "sparsity/divergence": divergence,
    }


def _pairs(rows: Rows, micro: Batch, at: Tensor) -> Pairs:
    assert micro.side_B is not None
    chosen, rejected = pairs_of(micro.side_B, micro.group_B)
    reward_B = torch.full_like(micro.temperature_B, torch.nan) if micro.reward_B is None else micro.reward_B
    return Pairs(rows.take(at[chosen]), rows.take(at[rejected]), reward_B[chosen] - reward_B[rejected])


def _implicit(side: Rows) -> Tensor:
    """The implicit reward of each completion; without a reference its log-probability per token."""
    return side.mean_logp_R if side.ref_logp_R is None else side.ratio_R


@torch.no_grad()
def _pair_sums(pairs: Pairs) -> dict[str, Tensor]:
    """Sums over pairs, and their number."""
    margin_P = _implicit(pairs.chosen) - _implicit(pairs.rejected)
    count = torch.tensor(float(len(margin_P)), device=margin_P.device)
    return {"pairs": count, "margin": margin_P.sum(), "accuracy/pairs": (margin_P > 0).float().sum()}


@torch.no_grad()
def _side_sums(rows: Rows) -> dict[str, Tensor]:
    """Sums over the completions of each side, and their number."""
    sums: dict[str, Tensor] = {}
    values = {"ratio": _implicit(rows), "logp": rows.logp_R, "length": rows.length_R}
    for side, own_R in {"chosen": rows.wanted_R, "rejected": ~rows.wanted_R}.items():
        sums |= {f"{name}/{side}": value_R[own_R].sum() for name, value_R in values.items()}
        sums[f"rows/{side}"] = own_R.sum()
    return sums
