"""Decodings: how the next token, or a whole completion, is chosen with the help of models beside the policy.

Those that change each token's distribution (``value_augmented``, ``emulated``) do so before temperature, top-k and
top-p, so at temperature T the policy's logits and what is added to them are both divided by T, and recorded
log-probabilities are those of the changed distribution. Those that choose among samples (``best_of_n``,
``chunk_rerank``) leave each sample's distribution as it is.

Suffixes beside the legend of :mod:`alignment.types`: M rows that are decoded, K candidates of each, J value models or
deltas, N things to choose from.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.registry import Registry, option


@runtime_checkable
class Decoding(Protocol):
    """What a decoding needs, by address, and how strongly it acts unless a request says otherwise."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Models beside the policy: folders, or whatever else opens one."""
        ...

    @property
    def tilt(self) -> tuple[float, ...]:
        """What :attr:`alignment.types.SamplingParams.tilt` is for a request that is decoded so."""
        ...


decodings: Registry[Decoding] = Registry("decodings", Decoding, "How tokens are chosen with models beside the policy")

Several = str | tuple[str, ...]
Beta = Annotated[float | None, option("values are divided by it and sampled from; 0 or null: the best", ge=0)]


def tilt_logits(
    logits_MV: Tensor, candidates_MK: Tensor, values_MKJ: Tensor, beta_MJ: Tensor, *, centre: bool = True
) -> Tensor:
    """Logits of value-augmented sampling: ``l'_a = l_a + sum_j beta_j (q_ja - mean_b q_jb)`` for each candidate a.

    Tokens that are no candidates keep their logit: with ``centre`` that is to give them the candidates' mean value,
    without it a value of 0. A row of zeros in ``beta_MJ`` comes back unchanged.

    Args:
        logits_MV: The policy's, before temperature.
        candidates_MK: int64, different tokens of each row.
        values_MKJ: Value of the state that each candidate leads to, by each of J models.
        beta_MJ: Multiplies values: larger is stronger, ``1 / beta`` is the weight of a KL penalty.
        centre: Whether the mean over a row's candidates is taken off.

    Returns:
        New logits, of the type of ``logits_MV``.
    """
    if centre:
        values_MKJ = values_MKJ - values_MKJ.mean(1, keepdim=True)
    tilt_MK = (values_MKJ * beta_MJ[:, None]).sum(-1)
    return logits_MV.scatter_add(1, candidates_MK, tilt_MK.to(logits_MV.dtype))


def emulate(
    logits_MV: Tensor, tuned_JMV: Tensor, base_JMV: Tensor, strength_MJ: Tensor, *, top_p: float = 1.0
) -> Tensor:
    """Logits of emulated fine-tuning: ``l_a + sum_j strength_j (log pi_tuned_ja - log pi_base_ja)``.

    Tokens that not all models have rows for, which no tokenizer has either, keep the policy's logits. Normalised token
    by token, which approximates the sequence-level rule. Unverified: that ``top_p`` in the source
    filters the distribution of the policy, as here, and not that of another model.

    Args:
        logits_MV: The policy's, before temperature.
        tuned_JMV: Logits of J tuned models.
        base_JMV: Logits of the models that these were tuned from.
        strength_MJ: Of each delta; a row of zeros comes back unchanged where ``top_p`` is 1.
        top_p: Tokens outside the policy's smallest set of this probability stay impossible, however large the ratio.
    """
    rows = min(logits_MV.shape[1], tuned_JMV.shape[2], base_JMV.shape[2])
    delta_JMV = tuned_JMV.log_softmax(-1)[..., :rows] - base_JMV.log_softmax(-1)[..., :rows]
    tilt_MV = (strength_MJ.T[:, :, None] * delta_JMV).sum(0)
    tilted_MV = logits_MV + nn.functional.pad(tilt_MV, (0, logits_MV.shape[1] - rows))
    if top_p == 1.0:
        return tilted_MV
    sorted_MV, order_MV = logits_MV.softmax(-1, dtype=torch.float64).sort(dim=1, descending=True, stable=True)
    beyond_MV = sorted_MV.cumsum(1) - sorted_MV >= top_p
    beyond_MV[:, 0] = False
    return tilted_MV.masked_fill(torch.zeros_like(beyond_MV).scatter(1, order_MV, beyond_MV), -torch.inf)


def choose(value_N: Tensor, beta: float | None, uniform: float) -> int:
    """Which of N candidates: drawn from ``softmax(value / beta)``, or the first of the best where beta is 0 or None.

    Here beta divides, as a temperature does: the other way round than in :func:`tilt_logits`.

    Args:
        value_N: One value each.
        beta: At least 0.
        uniform: In [0, 1); inverts the distribution function.
    """
    if not beta:
        return int(value_N.argmax())
    cdf_N = (value_N.double() / beta).softmax(0).cumsum(0)
    return min(int((cdf_N <= uniform * float(cdf_N[-1])).sum()), len(value_N) - 1)


def best_of_n_kl(n: int) -> float:
    """Upper bound of ``KL(best of n || policy)`` in nats: ``log n - (n - 1) / n``."""
    return math.log(n) - (n - 1) / n


@decodings.register("plain", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Plain:
    """The policy's own distribution, without any other model."""

    addresses = ()
    tilt = ()


@decodings.register(
    "value_augmented",
    source="Value Augmented Sampling for Language Model Alignment and Personalization (arXiv 2405.06639)",
    evidence="end to end",
)
@dataclass(frozen=True)
class ValueAugmented:
    """Adds to the logits of likely tokens the value of the state that each leads to, times ``beta``.

    ``pi(a|s)`` becomes proportional to ``pi(a|s) exp(beta Q(s, a))`` on the ``top_k`` most likely tokens, values taken
    relative to their mean; the tail is kept. Several models, one for each reward, add up, and a request may weigh them
    as it likes. ``beta`` multiplies: the weight of the KL penalty that this trades reward against is ``1 / beta``.

    A first-order rule, not an optimal one: with the values of the policy itself, as they are learnt from its samples,
    the exact solution would need ``log E[exp(beta R)] / beta`` in place of ``E[R]``. A token that leads to reward 1
    half of the time, and one that leads to 0.5 always, are alike to this rule and not to the exact one.

    Unverified: that several models are combined in the paper as they are here.
    """

    models: Annotated[Several, option("value models: folders, or one folder")]
    beta: Annotated[float | tuple[float, ...], option("strength of each model, or one number for all")] = 3.0
    top_k: Annotated[
        int, option("candidates, the most likely tokens; 0: all, for vocabulary-wide heads", unit="tokens", ge=0)
    ] = 20
    centre: Annotated[bool, option("values relative to the mean of the candidates, which the tail then has")] = True
    dtype: Annotated[Literal["float32", "bfloat16"], option("of the value models")] = "float32"

    def __post_init__(self) -> None:
        _check_strengths("beta", self.beta, "value models", len(self.addresses))

    @property
    def addresses(self) -> tuple[str, ...]:
        return _several(self.models)

    @property
    def tilt(self) -> tuple[float, ...]:
        return _one_each(self.beta, len(self.addresses))


@decodings.register(
    "emulated",
    source="An Emulator for Fine-Tuning Large Language Models using Small Language Models (arXiv 2310.12962)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Emulated:
    """Adds to the policy's log-probabilities what fine-tuning changed in other models, mostly smaller ones.

    ``log pi_base + sum_i strength_i (log pi_tuned_i - log pi_base_i)``, normalised at each token, which approximates
    the rule for whole sequences. All models need the policy's vocabulary. It costs a pass of each model per token.

    Unverified: which distribution ``top_p`` filters in the paper, and its value there.
    """

    tuned: Annotated[Several, option("models after fine-tuning: folders, or one folder")]
    base: Annotated[Several, option("the same models before it, in the same order")]
    strength: Annotated[float | tuple[float, ...], option("of each pair, or one number for all")] = 1.0
    top_p: Annotated[float, option("only tokens of the policy's own nucleus stay possible; 1: all", gt=0, le=1)] = 1.0
    dtype: Annotated[Literal["float32", "bfloat16"], option("of these models")] = "float32"

    def __post_init__(self) -> None:
        tuned, base = _several(self.tuned), _several(self.base)
        if len(tuned) != len(base):
            raise UserError(f"there are {len(tuned)} tuned models and {len(base)} base models; each needs its own base")
        _check_strengths("strength", self.strength, "pairs", len(tuned))

    @property
    def addresses(self) -> tuple[str, ...]:
        """All tuned models, then all base models."""
        return _several(self.tuned) + _several(self.base)

    @property
    def tilt(self) -> tuple[float, ...]:
        return _one_each(self.strength, len(_several(self.tuned)))


_V_GPS = (
    "Steering Your Generalists: Improving Robotic Foundation Models via Value Guidance (arXiv 2410.13816), for "
    "language models as here: this project"
)


@decodings.register("best_of_n", source=_V_GPS, evidence="end to end")
@dataclass(frozen=True)
class BestOfN:
    """Samples ``n`` completions and takes one by the value of its last state: the best, or by ``softmax(V / beta)``.

    ``beta`` divides values here, unlike in ``value_augmented``. The best of n is within ``log n - (n - 1) / n`` nats of
    the policy. Recorded log-probabilities are those of plain sampling and not of what was selected, so that its
    rollouts are for evaluations and demonstrations, not for importance ratios.
    """

    model: Annotated[str, option("the value model: a folder", min_length=1)]
    n: Annotated[int, option("completions to choose from", unit="completions", ge=1)] = 8
    beta: Beta = None
    dtype: Annotated[Literal["float32", "bfloat16"], option("of the value model")] = "float32"

    tilt = ()
    chunk_tokens = None

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.model,)


@decodings.register("chunk_rerank", source=_V_GPS, evidence="end to end")
@dataclass(frozen=True)
class ChunkRerank:
    """As ``best_of_n``, but chooses among ``n`` continuations again and again, every ``chunk_tokens`` tokens.

    A continuation that ends within its chunk takes part with the value of its end.
    """

    model: Annotated[str, option("the value model: a folder", min_length=1)]
    n: Annotated[int, option("continuations to choose from", unit="continuations", ge=1)] = 4
    chunk_tokens: Annotated[int, option("length of a continuation", unit="tokens", ge=1)] = 16
    beta: Beta = None
    dtype: Annotated[Literal["float32", "bfloat16"], option("of the value model")] = "float32"

    tilt = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.model,)


def _several(given: Several) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def _one_each(given: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    return given if isinstance(given, tuple) else (float(given),) * count


def _check_strengths(name: str, given: float | tuple[float, ...], what: str, count: int) -> None:
    if not count:
        raise UserError(f"there are no {what}; name at least one, or use the decoding 'plain'")
    found = _one_each(given, count)
    if len(found) != count:
        raise UserError(f"{name} has {len(found)} numbers for {count} {what}; give one for each, or one number for all")
    if not all(map(math.isfinite, found)):
        raise UserError(f"{name} is {given}; give finite numbers")
