"""The records that flow through the project, and the legend of tensor shapes.

Shape legend, used as suffixes of names (``adv_BT``):

====== =====================================================================
B      rows; one row is one sequence (prompt, completion and any observations)
T      token positions of a row, prompt included, right-padded
K      reward components (objectives), in the order the recipe lists them
V      vocabulary
C, S   entropy controls, in the recipe's order; numbers per token that a policy loss keeps of a whole mini-batch
====== =====================================================================

Position ``t`` of a ``[B, T]`` tensor speaks of the *token* at ``t``: ``logp_BT[b, t]`` is the log-probability of
token ``t`` given tokens ``< t``. Position 0 is never trained on. Log-probabilities and entropies are in nats.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from alignment.score import FAILED, Score
from alignment.score import Status as Status

FinishReason = Literal["stop", "length", "abort"]
SOURCES = ("policy", "demonstration", "replay", "steered")
RATIO_BASES = ("old", "self", "one")


def keyed_seed(*parts: object) -> int:
    """A 63-bit seed that depends on ``parts`` alone, the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def prompt_key(prompt: Any) -> str:
    """16 hexadecimal digits that depend on ``prompt``, text or chat messages, alone."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set: ``row["prompt"]`` is text or chat messages, the other columns are for rewards."""

    id: str
    row: Mapping[str, Any]
    origin: str = ""
    """Where the row stands, such as ``train.jsonl:17``, for messages about it."""

    @property
    def key(self) -> str:
        """Depends on the prompt's content alone: what demonstrations and preferences of the same prompt have too."""
        return prompt_key(self.row["prompt"])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. ``top_p < 1`` or ``top_k > 0`` truncates the distribution that is sampled."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    tilt: tuple[float, ...] = ()
    """Strength of each model that the sampler's decoding steers with; empty: the policy's own distribution."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that are never sampled; log-probabilities are those without them."""


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens in: one completion to sample. Its random numbers depend on ``seed`` alone, not on the batch around it."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens out. ``logp`` is taken after processors and temperature; a stop token, when sampled, is the last token."""

    id: str
    token_ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    """Runs of ``(policy version, index of the first token it sampled)``."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt, with what is needed to score it, to train on it and to audit it."""

    id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Everything after the prompt: sampled tokens and the environment's observations."""
    loss_mask: tuple[bool, ...]
    """True where the policy sampled the token; observations are False."""
    behaviour_logp: tuple[float, ...]
    """After processors and temperature; 0 for tokens that were not sampled."""
    text: str
    finish_reason: FinishReason
    seed: int
    sampler: str
    sampling: SamplingParams
    versions: tuple[tuple[int, int], ...]
    source: Literal["policy", "demonstration", "replay", "steered"] = "policy"
    """Who drew the tokens; ``steered``: the policy with the help of other models."""
    ratio_base: Literal["old", "self", "one"] = "old"
    turns: tuple[tuple[str, int, int], ...] = ()
    """``(role, start, end)`` spans of ``token_ids``: role is assistant or observation."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    reward: float | None = None
    """Sum of the applicable components by the recipe's fixed weights; None while unscored. Weightings may differ."""
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether it may be trained on: no component failed and at least one applied."""
        scores = self.scores.values()  # lists below, not generators: this is asked several times of every rollout
        return not any([s.status in FAILED for s in scores]) and any([s.value is not None for s in scores])

    @property
    def correct(self) -> bool | None:
        """By the first reward component of the recipe, or None where that one gave no value."""
        first = next(iter(self.scores.values()), None)
        return None if first is None or first.value is None else first.status == "ok" and first.value >= 1.0

    def judged(self, scores: Mapping[str, Score], reward: float | None) -> Self:
        """The rollout with these scores and this reward: what ``replace`` would make, at a fraction of the cost."""
        return type(self)(*_UNJUDGED(self), scores=scores, reward=reward, timings=self.timings)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The rollout that :meth:`to_json` described."""
        plain = dict(data)
        for name in ("prompt_ids", "token_ids", "loss_mask", "behaviour_logp"):
            plain[name] = tuple(plain[name])
        plain["versions"] = tuple(tuple(run) for run in plain["versions"])
        plain["turns"] = tuple(tuple(turn) for turn in plain["turns"])
        sampling = dict(plain["sampling"])
        lists = {name: tuple(sampling.get(name, ())) for name in ("stop_ids", "tilt", "banned_ids")}
        plain["sampling"] = SamplingParams(**{**sampling, **lists})
        plain["scores"] = {name: Score(**score) for name, score in plain["scores"].items()}
        return cls(**plain)


_UNJUDGED = attrgetter(*(f.name for f in fields(Rollout) if f.name not in ("scores", "reward", "timings")))
"""The fields that :meth:`Rollout.judged` leaves as they are. They stand before the others, in this order."""


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one launch of one prompt. ``uid`` counts launches over the whole run: it is the launch order."""

    uid: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> list[float]:
        """The rewards of its scored rollouts."""
        return [r.reward for r in self.rollouts if r.reward is not None]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_json` is its inverse."""
        prompt = {"id": self.prompt.id, "row": dict(self.prompt.row)}
        return {"uid": self.uid, "prompt": prompt, "rollouts": [r.to_json() for r in self.rollouts]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The group that :meth:`to_json` described."""
        return cls(data["uid"], Prompt(**data["prompt"]), tuple(Rollout.from_json(r) for r in data["rollouts"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tensors of one update; ``algorithms`` fill in those after the record itself. None means absent."""

    ids_BT: Tensor  # int64, right-padded
    loss_mask_BT: Tensor
    """bool: tokens that are trained on. All False for unscored rows."""
    length_B: Tensor
    """int64: tokens of the row, prompt included; the rest is padding."""
    group_B: Tensor  # int64: rows of one group share a number
    source_B: Tensor  # int8, index into :data:`SOURCES`
    ratio_base_B: Tensor
    """int8, index into :data:`RATIO_BASES`: what the importance ratio divides by."""
    temperature_B: Tensor
    """float32: log-probabilities and entropies are those of ``softmax(logits / temperature)``."""
    behaviour_logp_BT: Tensor
    """float32: the sampler's, 0 where the token was not sampled."""
    rewards_BK: Tensor
    """float32, NaN where a component does not apply or failed."""
    weights_K: Tensor  # float32: the recipe's fixed weight of each component
    scored_B: Tensor
    """bool: rows that may be trained on and that count in baselines."""
    truncated_B: Tensor  # bool: ended by the length limit
    key_B: Tensor
    """int64: a stable key of the rollout, for random choices keyed by (seed, step, rollout, token)."""
    side_B: Tensor | None = None
    """int8, of preferences: 1 preferred, -1 not; more in ``preference_objective``. Rows of a group stay together."""
    # Annotated by the learner; absent when nobody needs them.
    old_logp_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    entropy_BT: Tensor | None = None
    entropy_drift_BT: Tensor | None = None  # float32: sum_v p_v^2 (log p_v + H) over the vocabulary
    values_BT: Tensor | None = None
    """float32 ``[B, T]``, or ``[B, T, K]`` for a critic of several streams: of the state *after* token ``t``."""
    # Filled in by credit assignment.
    reward_B: Tensor | None = None
    token_reward_BT: Tensor | None = None
    """float32: rewards at tokens beside ``reward_B``, such as a KL penalty in the reward."""
    adv_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    """Targets for ``values_BT``, of its shape; NaN where a state has none."""
    weight_BT: Tensor | None = None
    control_weight_BT: Tensor | None = None
    """float32: the mixer's weight, and, set per mini-batch, the entropy controls'; both multiply the policy loss."""
    logp_BT: Tensor | None = None  # float32: of the policy before this mini-batch's step, where somebody needs it
    marks_BTC: Tensor | None = None
    loss_stats_BTS: Tensor | None = None
    """float32, set per mini-batch: what each entropy control keeps for its penalty, and the policy loss for itself."""
    scale_BT: Tensor | None = None
    """float32: set per mini-batch by the aggregation; the loss is ``sum(scale_BT * loss_BT)``."""
    nll_scale_BT: Tensor | None = None
    value_scale_BT: Tensor | None = None
    """float32: as ``scale_BT``, of the negative log-likelihood of correct rollouts and of the value loss."""
    pack_B: Tensor | None = None  # int64, set per micro-batch: rows of one number stand end to end in the forward pass
    pair_scale_B: Tensor | None = None
    row_scale_B: Tensor | None = None
    """float32, set per mini-batch of preferences: one over its pairs, and over its compared rows."""
    shift_B: Tensor | None = None
    """float32, set per mini-batch of preferences: what KTO compares ratios with."""
    masks_BT2: Tensor | None = None
    divergence_BT: Tensor | None = None
    """float32, set per micro-batch of preferences with masks of tokens, with gradients: the masks of ratios and of
    divergences, and ``KL(reference || policy)`` over the vocabulary before each token, in nats."""
    objectives: tuple[str, ...] = ()
    """Names of the K components."""
    step: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return self.ids_BT.shape[0]

    def rows(self, index: Tensor | Sequence[int]) -> "Batch":
        """The rows ``index``, in that order, with padding that none of them needs cut off."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.ids_BT.device)
        width = int(self.length_B[index].max()) if len(index) else 0
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            suffix = f.name.rpartition("_")[2]
            if isinstance(value, Tensor) and suffix.startswith("B"):
                changes[f.name] = value[index, :width] if suffix.startswith("BT") else value[index]
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with every tensor on ``device``; the batch itself where it is there already."""
        if self.ids_BT.device == torch.device(device):
            return self
        tensors = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@runtime_checkable
class RoleHandle(Protocol):
    """What a component sees of a model that it named in ``needs``: predictions and a way to fit them."""

    @property
    def version(self) -> int:
        """How many times it was fitted; a component's state holds the version that it last saw."""
        ...

    def values(self, prompts: Sequence[Prompt]) -> Tensor:
        """``[len(prompts)]`` float32 predictions."""
        ...

    def fit(self, prompts: Sequence[Prompt], targets: Tensor) -> Mapping[str, float]:
        """One round of regression on ``targets`` (same shape as :meth:`values` returns); metrics by name."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a component may know beside its own state when it chooses: where the run is, and the roles it asked for."""

    step: int
    seed: int
    roles: Mapping[str, RoleHandle] = field(default_factory=dict)
    archive: Callable[[int, int], Group] | None = None
    """For curricula that replay: the group of a step and a uid, as it was trained on."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What every component may learn from after an update: the one feedback path."""

    groups: Sequence[Group]
    """All groups that were sampled for this batch, unfiltered, in launch order."""
    batch: Batch
    """The batch that was trained on, with advantages."""
    metrics: Mapping[str, float]
    evaluation: Mapping[str, float] | None
    """The evaluation of the policy after this update, if one was due."""
    context: Context
    evaluation_before: Mapping[str, float] | None = None
    """The evaluation of the policy before this update, if there was one; the stage's first policy has one."""
    gram_KK: Tensor | None = None
    """Inner products of the components' gradients before this update, if a component ``needs`` it (``gram``)."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that is not a tensor of the learner. Saved with each checkpoint; a run continues from it exactly."""

    step: int = 0
    """Optimizer batches so far over the whole run; also the policy version that is published."""
    stage: int = 0
    stage_step: int = 0
    launched: int = 0
    """Groups launched so far: the next group's ``uid``."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """Each stateful component's state, JSON values only, by its place in the recipe (``curricula.0``)."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Running totals that reports show: scored ``verdicts/STAGE``, and ``demonstrations/STAGE`` that a mixer showed."""
    in_flight: Sequence[Sequence[Any]] = field(default_factory=list)
    """``(uid, prompt id)`` of each group that was launched and not yet used, in launch order: what a resumed run
    samples again. Empty after a step in lockstep."""

    def next_step(self) -> "TrainState":
        """The state with one more step done."""
        return replace(self, step=self.step + 1, stage_step=self.stage_step + 1)
