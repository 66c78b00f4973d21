"""Curricula: which prompts are sampled, which groups are trained on, which are trained on again.

A recipe lists curricula and they compose. Each does at least one of three things:

``select(state, prompts, n, context) -> (chosen, state)``
    Chooses ``n`` of ``prompts``. The first selector sees the whole data set, each later one what the one before chose;
    ``candidates(n)`` says how many it wants to choose ``n`` from (default ``n``).
``keep(state, group) -> bool``
    Whether a scored group is trained on; ``max_refills`` bounds how much is sampled in place of those that are not.
``replay(state, need, context) -> groups``
    At most ``need`` groups of earlier batches, when a batch is still short.

State is explicit, as for every component: ``init() -> state`` and ``observe(state, signals) -> state``, where the
signals hold *all* sampled groups, kept or not. The helpers below take the states of a stage by place (``curricula.0``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch

from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.types import Context, Group, Prompt, keyed_seed


@runtime_checkable
class Curriculum(Protocol):
    """Anything with ``select``, ``keep`` or ``replay``, as the module describes. The registry asks for one of them."""


class _Selector(Protocol):
    def select(self, state: Any, prompts: Sequence[Prompt], n: int, context: Context) -> tuple[list[Prompt], Any]: ...


class _Keeper(Protocol):
    def keep(self, state: Any, group: Group) -> bool: ...


class _Replayer(Protocol):
    def replay(self, state: Any, need: int, context: Context) -> list[Group]: ...


curricula: Registry[Curriculum] = Registry(
    "curricula", Curriculum, "Which prompts and groups are trained on", any_of=("select", "keep", "replay")
)


@curricula.register("uniform", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Uniform:
    """Every prompt once per epoch, in an order drawn anew for each epoch.

    A batch that crosses the end of an epoch takes the rest of it and the beginning of the next: after any number of
    batches the counts of two prompts differ by at most one.
    """

    def init(self) -> dict[str, int]:
        """The beginning of the first epoch."""
        return {"epoch": 0, "cursor": 0}

    def select(
        self, state: Mapping[str, int], prompts: Sequence[Prompt], n: int, context: Context
    ) -> tuple[list[Prompt], dict[str, int]]:
        """The next ``n`` prompts. ``cursor`` counts the prompts already taken from ``epoch``."""
        epoch, cursor = state["epoch"], state["cursor"]
        chosen: list[Prompt] = []
        while len(chosen) < n:
            order = _permutation(context.seed, epoch, len(prompts))
            taken = order[cursor : cursor + n - len(chosen)]
            chosen += [prompts[i] for i in taken]
            cursor += len(taken)
            if cursor == len(prompts):
                epoch, cursor = epoch + 1, 0
        return chosen, {"epoch": epoch, "cursor": cursor}


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(keyed_seed("uniform", seed, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


@curricula.register(
    "constant_group_filter",
    source="DAPO: An Open-Source LLM Reinforcement Learning System at Scale (arXiv 2503.14476)",
    evidence="end to end",
)
@dataclass(frozen=True)
class ConstantGroupFilter:
    """Drops groups whose rewards are all equal, which carry no advantage, and samples other prompts in their place.

    Dynamic sampling (section 3.2): keep a group when ``0 < #correct < group size``, and sample until the batch is full.
    Deviations: rewards are compared instead of correctness, so partial credit counts as a difference; unscored rollouts
    are left out and two scored ones are needed; the number of refills is bounded; and what is missing is sampled
    instead of a full batch, in launch order.
    """

    min_group_size: ClassVar[int] = 2

    max_refills: Annotated[
        int, option("how many batches may be sampled beyond the first to fill one", unit="batches", ge=0)
    ] = 10
    on_exhausted: Annotated[
        Literal["error", "short"], option("past max_refills: stop the run, or train on the groups there are")
    ] = "error"

    def keep(self, state: Any, group: Group) -> bool:
        """Whether two scored rollouts of ``group`` have different rewards."""
        return len(set(group.rewards)) > 1


def with_selector(chosen: Sequence[Curriculum]) -> tuple[Curriculum, ...]:
    """``chosen``, with :class:`Uniform` put first when none of them selects prompts.

    Raises:
        UserError: ``uniform`` stands behind another selector: it must see the whole data set to count its epochs.
    """
    selectors = [c for c in chosen if hasattr(c, "select")]
    if any(isinstance(c, Uniform) for c in selectors[1:]):
        raise UserError("curricula: 'uniform' must be the first that selects prompts; move it forward or leave it out")
    return tuple(chosen) if selectors else (Uniform(), *chosen)


def places(chosen: Sequence[Curriculum]) -> dict[str, Curriculum]:
    """Each curriculum by its place in the recipe, the key of its state."""
    return {f"curricula.{i}": c for i, c in enumerate(chosen)}


def select_prompts(
    chosen: Sequence[Curriculum], states: Mapping[str, Any], prompts: Sequence[Prompt], n: int, context: Context
) -> tuple[list[Prompt], dict[str, Any]]:
    """``n`` prompts through all selectors in order, and all states with theirs moved on.

    What each selector is asked for follows from the last to the first: the last chooses ``n`` out of its
    ``candidates(n)``, which the one before it has to choose, and so on.

    Raises:
        UserError: No prompts, or no curriculum that selects.
    """
    selectors = {place: cast(_Selector, c) for place, c in places(chosen).items() if hasattr(c, "select")}
    if not selectors:
        raise UserError("curricula: none of them selects prompts; put 'uniform' first")
    if not prompts:
        raise UserError("the data set to train on is empty")
    demands = [n]
    for selector in reversed(list(selectors.values())[1:]):
        demands.append(_candidates(selector, demands[-1]))
    after = dict(states)
    pool = list(prompts)
    for (place, selector), demand in zip(selectors.items(), reversed(demands), strict=True):
        pool, after[place] = selector.select(states.get(place), pool, demand, context)
        assert len(pool) == demand, f"{place} chose {len(pool)} prompts where {demand} were asked for"
    return pool, after


def keeps(chosen: Sequence[Curriculum], states: Mapping[str, Any], group: Group) -> str | None:
    """None when every curriculum keeps ``group``, else the registered name of the first that drops it."""
    for place, c in places(chosen).items():
        if hasattr(c, "keep") and not cast(_Keeper, c).keep(states.get(place), group):
            return curricula.name_of(c)
    return None


def replays(chosen: Sequence[Curriculum], states: Mapping[str, Any], need: int, context: Context) -> list[Group]:
    """At most ``need`` groups to train on again, from each replaying curriculum in turn."""
    found: list[Group] = []
    for place, c in places(chosen).items():
        if hasattr(c, "replay") and len(found) < need:
            found += cast(_Replayer, c).replay(states.get(place), need - len(found), context)
    assert len(found) <= need, f"replay gave {len(found)} groups where at most {need} were asked for"
    return found


def refill_bound(chosen: Sequence[Curriculum]) -> int:
    """Batches that may be sampled beyond the first to fill one: the smallest ``max_refills``, 0 when none filters."""
    return min((getattr(c, "max_refills", 0) for c in chosen if hasattr(c, "keep")), default=0)


def _candidates(selector: _Selector, n: int) -> int:
    wanted = getattr(selector, "candidates", None)
    return n if wanted is None else wanted(n)
