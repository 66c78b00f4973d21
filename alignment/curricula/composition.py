"""How a list of curricula works together. The functions take the states of a stage by place (``curricula.0``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from alignment.curricula.contract import Curriculum, curricula
from alignment.curricula.uniform import Uniform
from alignment.errors import UserError
from alignment.types import Context, Group, Prompt


class _Selector(Protocol):
    def select(self, state: Any, prompts: Sequence[Prompt], n: int, context: Context) -> tuple[list[Prompt], Any]: ...


class _Admitter(Protocol):
    def admits(self, state: Any, prompt: Prompt, context: Context) -> bool: ...


class _Keeper(Protocol):
    def keep(self, state: Any, group: Group) -> bool: ...


class _Replayer(Protocol):
    def replay(self, state: Any, need: int, context: Context) -> list[Group]: ...


def with_selector(chosen: Sequence[Curriculum]) -> tuple[Curriculum, ...]:
    """``chosen``, with :class:`Uniform` put first when nobody selects, or the first of them wants candidates.

    Raises:
        UserError: One that draws from the whole data set stands behind another selector.
    """
    selectors = [c for c in chosen if hasattr(c, "select")]
    if late := [curricula.name_of(c) for c in selectors[1:] if getattr(c, "draws", False)]:
        raise UserError(
            f"curricula: '{late[0]}' must be the first that selects prompts; move it forward or leave it out"
        )
    return tuple(chosen) if selectors and not hasattr(selectors[0], "candidates") else (Uniform(), *chosen)


def places(chosen: Sequence[Curriculum]) -> dict[str, Curriculum]:
    """Each curriculum by its place in the recipe, the key of its state."""
    return {f"curricula.{i}": c for i, c in enumerate(chosen)}


def select_prompts(
    chosen: Sequence[Curriculum], states: Mapping[str, Any], prompts: Sequence[Prompt], n: int, context: Context
) -> tuple[list[Prompt], dict[str, Any]]:
    """``n`` prompts through all selectors in order, and all states with theirs moved on.

    What each selector is asked for follows from the last to the first: the last chooses ``n`` out of its
    ``candidates(n)``, which the one before it has to choose, and so on. The first chooses until as many as it is asked
    for are admitted by every curriculum that has a say.

    Raises:
        UserError: No prompts, no curriculum that selects, or no prompt that is admitted.
    """
    selectors = {place: cast(_Selector, c) for place, c in places(chosen).items() if hasattr(c, "select")}
    if not selectors:
        raise UserError("curricula: none of them selects prompts; put 'uniform' first")
    if not prompts:
        raise UserError("the data set to train on is empty")
    first = next(iter(selectors))
    selectors[first] = _Guarded(selectors[first], chosen, states)
    demands = [n]
    for selector in reversed(list(selectors.values())[1:]):
        demands.append(_candidates(selector, demands[-1]))
    after = dict(states)
    pool: Sequence[Prompt] = prompts
    for (place, selector), demand in zip(selectors.items(), reversed(demands), strict=True):
        pool, after[place] = selector.select(states.get(place), pool, demand, context)
        assert len(pool) == demand, f"{place} chose {len(pool)} prompts where {demand} were asked for"
    return list(pool), after


@dataclass(frozen=True)
class _Guarded:
    """The first selector: it chooses again for prompts that others do not admit."""

    selector: _Selector
    chosen: Sequence[Curriculum]
    states: Mapping[str, Any]

    def select(self, state: Any, prompts: Sequence[Prompt], n: int, context: Context) -> tuple[list[Prompt], Any]:
        guards = {place: cast(_Admitter, c) for place, c in places(self.chosen).items() if hasattr(c, "admits")}
        found, refused = list[Prompt](), 0
        while len(found) < n:
            drawn, state = self.selector.select(state, prompts, n - len(found), context)
            assert len(drawn) == n - len(found), f"{len(drawn)} prompts where {n - len(found)} were asked for"
            fit = [p for p in drawn if all(g.admits(self.states.get(at), p, context) for at, g in guards.items())]
            found, refused = found + fit, 0 if fit else refused + len(drawn)
            if refused > 2 * len(prompts):
                names = ", ".join(f"'{curricula.name_of(c)}'" for c in self.chosen if hasattr(c, "admits"))
                raise UserError(
                    f"curricula: {names} left out the last {refused} prompts that were drawn, of {len(prompts)}: "
                    "give the model prompts that it sometimes solves, or let them in again (sooner) with recheck_every"
                )
        return found, state


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
