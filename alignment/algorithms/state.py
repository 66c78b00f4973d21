"""What components declare and remember. State is explicit: JSON values by the component's place in the recipe."""

from collections.abc import Iterable, Mapping
from typing import Any

from alignment.types import Signals

MEASURED = frozenset({"demonstrations", "demonstration_rewards", "update_norm", "gram", "evaluation"})
"""Needs that are no annotations of a batch: ``update_norm``, a metric of how far an update moved the policy's weights;
``gram``, inner products of the components' gradients before the update (:attr:`Signals.gram_KK`); ``evaluation``, that
evaluations are made during the stage; ``demonstrations``, that the data has some; ``demonstration_rewards``, that
those of a batch are scored."""


def needs_of(component: object) -> tuple[str, ...]:
    """What ``component`` asks to have computed.

    ``reference``, ``old_logp``, ``entropy``, ``entropy_drift``, ``values``, ``role:NAME``; ``logp`` of the policy
    before each mini-batch's step; and :data:`MEASURED`.
    """
    return tuple(getattr(component, "needs", ()))


def annotations(components: Iterable[object]) -> frozenset[str]:
    """What ``components`` need annotated before an update: before its first step, ``logp`` is ``old_logp``."""
    asked = frozenset(need for component in components for need in needs_of(component))
    return asked - {"logp"} | {"old_logp"} if "logp" in asked else asked


def fresh(components: Mapping[str, Any]) -> dict[str, Any]:
    """The first state of every component that has one."""
    return {name: component.init() for name, component in components.items() if hasattr(component, "init")}


def observe(components: Mapping[str, Any], states: Mapping[str, Any], signals: Signals) -> dict[str, Any]:
    """The states after an update; those of components that do not learn from ``signals`` stay as they are.

    Raises:
        KeyError: A component that observes has no state.
    """
    learners = {name: component for name, component in components.items() if hasattr(component, "observe")}
    return {**states, **{name: component.observe(states[name], signals) for name, component in learners.items()}}


def report(components: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, float]:
    """What components that have ``metrics(state) -> Mapping[str, float]`` say of their states, as ``place/name``."""
    told = {place: c.metrics(states.get(place)) for place, c in components.items() if hasattr(c, "metrics")}
    return {f"{place}/{name}": float(value) for place, found in told.items() for name, value in found.items()}
