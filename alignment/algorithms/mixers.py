"""Mixers: which rollouts and demonstrations each update learns from, and in what proportion.

A demonstration that is imitated has advantage 1 and ratio base ``self``: its loss is its negative log-likelihood. The
objective takes the token mean over imitated rows and the algorithm's aggregation over the others, so the loss of a
mixed mini-batch is ``L_RL + c L_SFT``, each a mean of its own, and ``c`` is a coefficient of rows. Demonstrations are
found by the prompt's content (:attr:`Prompt.key`); a group's rollouts stay as they are where none is there, which is
counted.

``off_policy_mixers`` and ``experimental_mixers`` register more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from alignment.algorithms.demonstrations import is_demonstration
from alignment.algorithms.tokens import share_down
from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Batch, Context, Group, Prompt, Rollout, Signals, keyed_seed

Demonstrations = Mapping[str, Sequence[Rollout]]


@runtime_checkable
class Mixer(Protocol):
    """Routes groups and demonstrations to the learner's slots before credit, and may weigh rows after it.

    A demonstration is imitated if its ratio base is ``self``, as it has when it is loaded, and judged within its group
    like a rollout with any other. Optional on the class:

    ``needs``: ``demonstrations``, that the data has some; ``demonstration_rewards``, that those of the slot ``rl`` are
    scored by the recipe's rewards before they are credited (those whose rewards fail are left out).
    ``asks(group) -> bool``: whether it would use a demonstration of this prompt; prompts without one are counted, and a
    data set in which none has one is refused.
    ``teaches(solved, of) -> bool``: whether a demonstration counts in a group of which so many rollouts are solved;
    loading a recipe warns where a filter drops those groups before the mixer sees them.
    ``advantages(state, batch) -> adv_BT``: takes the place of those that ``batch`` was credited with.
    ``shaping: float | None``: gamma of ``p / (p + gamma)`` in rows of ratio base ``one``.
    ``slots``: those beside ``rl`` that it may route to, each an optimizer more in memory; ``lr_ratio: float``: their
    learning rate over that of ``rl``.
    """

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        """Groups by slot, ``rl`` being the main one; ``demonstrations`` are by :attr:`Prompt.key`."""
        ...

    def coefficients(self, state: Any, batch: Batch) -> Tensor | None:
        """``weight_B`` that multiplies each row's policy loss; None is 1."""
        ...


mixers: Registry[Mixer] = Registry("mixers", Mixer, "Which rollouts and demonstrations an update learns from")


@mixers.register("none", source="this project", evidence="end to end")
@dataclass(frozen=True)
class NoMix:
    """All groups as they were sampled, no demonstrations."""

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        return {"rl": list(groups)}

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None


class Joining:
    """A mixer that has demonstrations of every prompt join its group: :meth:`joins` says which, and as what."""

    def asks(self, group: Group) -> bool:
        """Of every prompt."""
        return True

    def teaches(self, solved: int, of: int) -> bool:
        """Most of all where no rollout is right, since the demonstration is."""
        return True

    def joins(self, shown: Sequence[Rollout]) -> Sequence[Rollout]:
        """What joins the rollouts of a prompt with the demonstrations ``shown``."""
        raise NotImplementedError

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        """All groups, each with what joins it; one without demonstrations stays as it is."""
        joined = ((g, self.joins(demonstrations.get(g.prompt.key, ()))) for g in groups)
        return {"rl": [replace(group, rollouts=(*group.rollouts, *more)) for group, more in joined]}


@mixers.register("blend", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Blend:
    """A number of demonstrations beside each batch, of constant or scheduled weight: ``L_RL + c L_SFT``.

    They are drawn anew for each step, without replacement. ``c`` goes from ``start`` to ``end`` over ``over_steps``
    steps of the stage, linearly, along half a cosine or at once when they are over (``step``), and stays there. Steps
    in which the policy rests do not count.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations",)

    rows: Annotated[int, option("demonstrations per step", ge=1)] = 16
    start: Annotated[float, option("c at the first step", ge=0)] = 1.0
    end: Annotated[float | None, option("c after over_steps; null: as at the start", ge=0)] = None
    over_steps: Annotated[int, option("steps from start to end", ge=1)] = 100
    shape: Annotated[Literal["linear", "cosine", "step"], option("how c goes from start to end")] = "linear"

    def init(self) -> dict[str, int]:
        """The first step."""
        return {"step": 0}

    def observe(self, state: Mapping[str, int], signals: Signals) -> dict[str, int]:
        """One step on."""
        return {"step": state["step"] + 1}

    def coefficient(self, step: int) -> float:
        """``c`` at a step of the stage, from 0."""
        x = min(1.0, step / self.over_steps)
        x = {"linear": x, "cosine": 0.5 - 0.5 * math.cos(math.pi * x), "step": float(x == 1.0)}[self.shape]
        return self.start if self.end is None else self.start + (self.end - self.start) * x

    def metrics(self, state: Mapping[str, int]) -> dict[str, float]:
        """The coefficient of the next step."""
        return {"coefficient": self.coefficient(state["step"])}

    def route(
        self, state: Mapping[str, int], groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        return {"rl": [*groups, *drawn(demonstrations, self.rows, context)]}

    def coefficients(self, state: Mapping[str, int], batch: Batch) -> Tensor:
        return torch.where(is_demonstration(batch), self.coefficient(state["step"]), 1.0)


HPT = "Towards a Unified View of Large Language Model Post-Training (arXiv 2509.04419)"


@mixers.register("hpt", source=HPT, evidence="end to end")
@dataclass(frozen=True)
class Hpt:
    """HPT: a prompt that is hardly ever solved is learned from its demonstration, any other from its rollouts.

    Hard gate: with at most ``gate`` solved rollouts a group's rollouts are left out and one demonstration is imitated
    in their place, so such a prompt has no RL gradient and any other no SFT gradient (the published code's
    ``on_solve_num <= switch_gate``; 0 for Qwen2.5-Math, 2 for Llama-3.1-8B). ``gate_share`` is the paper's form: a
    prompt is imitated where the share of solved rollouts is at most that. ``L = L_RL + c L_SFT``, ``c`` being
    ``sft_coefficient`` (1, and 0.3 for Qwen2.5-Math-1.5B there).

    Soft gate: ``soft`` lists ``[solved, alpha, beta]``: from that many solved rollouts on, the rollouts weigh
    ``alpha`` and the demonstrations ``beta`` (0: none). The published code has such a table with a third, off-
    policy, column, which is not used here. Entries in between hold for all numbers up to the next; below the first
    it is pure imitation. The rollouts stay in the batch, where they count in means, also at ``alpha`` 0.

    Solved is correct by the first reward component (a value of at least 1); a rollout whose reward failed is not, and a
    group without any verdict is left as it is. The published RL part is Dr.GRPO without a clip, normalised by a
    constant length, with an entropy bonus of 0.001 and no KL: ``advantage: dr_grpo``, ``policy_loss: reinforce``,
    ``aggregation: {name: constant, length: 8192}``. There the RL part is *summed* over the rows of a micro-batch and
    the SFT part is a mean over its tokens, so that their proportion depends on how rows are packed; here both are means
    over the mini-batch, whatever the packing, and RL weighs less against the same ``c``. A prompt without a
    demonstration keeps its rollouts.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations",)

    gate: Annotated[int, option("solved rollouts up to which a prompt is imitated", ge=0)] = 0
    gate_share: Annotated[
        float | None, option("share of solved rollouts up to which a prompt is imitated; null: gate", ge=0, le=1)
    ] = None
    sft_coefficient: Annotated[float, option("c", ge=0)] = 1.0
    demonstrations_per_prompt: Annotated[int, option("demonstrations of an imitated prompt, at most", ge=1)] = 1
    soft: Annotated[tuple[tuple[int, float, float], ...] | None, option("[solved, alpha, beta] rows; null: hard")] = (
        None
    )

    def __post_init__(self) -> None:
        solved = [row[0] for row in self.soft or ()]
        if solved != sorted(set(solved)) or any(min(row) < 0 for row in self.soft or ()):
            raise UserError("hpt: the rows of 'soft' must rise in their first number, and nothing may be negative")
        given = {"soft": self.soft is not None, "gate_share": self.gate_share is not None, "gate": self.gate > 0}
        if len(chosen := [name for name, is_given in given.items() if is_given]) > 1:
            others = " and ".join(f"'{name}'" for name in chosen[1:])
            raise UserError(f"hpt: {others} would have no effect beside '{chosen[0]}'; take one of them away")

    def weights(self, solved: int, of: int) -> tuple[float, float]:
        """``(alpha, beta)`` of a prompt with so many solved rollouts out of ``of``."""
        if self.soft is not None:
            found = next(((a, b) for least, a, b in reversed(self.soft) if solved >= least), None)
            return found or (0.0, self.sft_coefficient)
        gate = self.gate if self.gate_share is None else share_down(self.gate_share, of)
        return (0.0, self.sft_coefficient) if solved <= gate else (1.0, 0.0)

    def teaches(self, solved: int, of: int) -> bool:
        """Whether such a prompt is imitated."""
        return self.weights(solved, of)[1] > 0

    def asks(self, group: Group) -> bool:
        """Whether the prompt is to be imitated."""
        verdicts = [verdict for r in group.rollouts if (verdict := r.correct) is not None]
        return bool(verdicts) and self.teaches(sum(verdicts), len(verdicts))

    def route(
        self, state: Any, groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        return {"rl": [self._taught(group, demonstrations.get(group.prompt.key, ())) for group in groups]}

    def _taught(self, group: Group, shown: Sequence[Rollout]) -> Group:
        if not shown or not self.asks(group):
            return group
        own = () if self.soft is None else group.rollouts
        return replace(group, rollouts=(*own, *shown[: self.demonstrations_per_prompt]))

    def coefficients(self, state: Any, batch: Batch) -> Tensor:
        """``alpha`` for rollouts and ``beta`` for demonstrations, by what the group solved; 1 for other groups."""
        shown_B = is_demonstration(batch)
        weight_B = torch.ones(len(batch), device=shown_B.device)
        for group in batch.group_B[shown_B].unique().tolist():
            own_B = batch.group_B == group
            verdicts = batch.rewards_BK[own_B & ~shown_B, 0]
            verdicts = verdicts[~verdicts.isnan()]
            alpha, beta = (0.0, self.sft_coefficient)
            if self.soft is not None:
                alpha, beta = self.weights(int((verdicts >= 1).sum()), len(verdicts))
            weight_B = torch.where(own_B, torch.where(shown_B, beta, alpha), weight_B)
        return weight_B


@mixers.register(
    "relift",
    source="Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning (arXiv 2506.07527)",
    evidence="end to end",
)
@dataclass(frozen=True)
class Relift:
    """ReLIFT: prompts that all rollouts failed are learned from demonstrations, in an optimizer of its own.

    After each step the failed prompts go to the front of a buffer; once it holds ``batch_size`` of them, the next step
    takes that many from its front (the newest first, as the published code does) for one supervised update in the slot
    ``sft``, whose moments are apart from RL's. The published code takes them in the same step; here the buffer is part
    of the state, which moves on once per step. RL trains on the whole batch. There RL has no clip and no std
    (``dr_grpo``, ``reinforce``, ``{name: constant, length: ...}``) and an entropy bonus of 0.001, which its supervised
    updates have as well and these do not; and gradients are clipped at 0.7 in RL and 1.0 in supervised updates, here
    alike. The supervised loss is a token mean, whatever the algorithm's aggregation.

    ``failed: no_success`` is a group without a correct rollout; ``all_zero``, as in the published code, one whose
    rewards are all exactly 0, so that a reward of -1 for a broken form keeps a prompt out. Prompts without a
    demonstration are left out when their turn comes.
    """

    needs: ClassVar[tuple[str, ...]] = ("demonstrations",)
    slots: ClassVar[tuple[str, ...]] = ("sft",)

    batch_size: Annotated[int, option("demonstrations of one supervised update", ge=1)] = 32
    failed: Annotated[Literal["no_success", "all_zero"], option("which groups count as failed")] = "no_success"
    lr_ratio: Annotated[float, option("learning rate of supervised updates over that of RL", ge=0)] = 1.0

    def init(self) -> dict[str, Any]:
        """An empty buffer."""
        return {"buffer": [], "used": 0}

    def asks(self, group: Group) -> bool:
        """Whether the group's prompt goes to the buffer; one without a verdict does not."""
        if self.failed == "all_zero":
            return bool(group.rewards) and all(reward == 0 for reward in group.rewards)
        verdicts = [verdict for r in group.rollouts if (verdict := r.correct) is not None]
        return bool(verdicts) and not any(verdicts)

    def _taken(self, state: Mapping[str, Any]) -> list[str]:
        full = len(state["buffer"]) >= self.batch_size
        return state["buffer"][: self.batch_size] if full else []

    def observe(self, state: Mapping[str, Any], signals: Signals) -> dict[str, Any]:
        """What was taken leaves, and the prompts that failed now come first."""
        taken = len(self._taken(state))
        failed = [group.prompt.key for group in signals.groups if self.asks(group)]
        return {"buffer": failed + state["buffer"][taken:], "used": state["used"] + taken}

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Prompts that wait, and how many were taken so far."""
        return {"buffer": float(len(state["buffer"])), "used": float(state["used"])}

    def route(
        self, state: Mapping[str, Any], groups: Sequence[Group], demonstrations: Demonstrations, context: Context
    ) -> Mapping[str, list[Group]]:
        shown = [demonstrations[key][0] for key in self._taken(state) if demonstrations.get(key)]
        taught = {"sft": [_shown(rollout, n) for n, rollout in enumerate(shown)]} if shown else {}
        return {"rl": list(groups)} | taught

    def coefficients(self, state: Any, batch: Batch) -> None:
        return None


def drawn(demonstrations: Demonstrations, rows: int, context: Context) -> list[Group]:
    """As many demonstrations as groups of their own, without replacement, drawn anew for each step."""
    known = [rollout for shown in demonstrations.values() for rollout in shown]
    generator = torch.Generator().manual_seed(keyed_seed(context.seed, context.step, "demonstrations"))
    chosen = torch.randperm(len(known), generator=generator)[:rows].tolist()
    return [_shown(known[i], -1 - n) for n, i in enumerate(chosen)]


def _shown(rollout: Rollout, uid: int) -> Group:
    """A demonstration as a group of its own."""
    return Group(uid, Prompt(rollout.prompt_id, {}), (rollout,))
