"""Environments: what a policy talks to. Single-turn answering is the one-step case.

An environment is stateless: an episode's state goes in and comes out of :meth:`Environment.step` and is plain JSON, so
that an episode can be stored and continued. What an environment says is outside the loss mask.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, runtime_checkable

from alignment.errors import UserError
from alignment.registry import Registry, option
from alignment.safe_arithmetic import evaluate, show
from alignment.types import Score


@dataclass(frozen=True, slots=True)
class Step:
    """The environment's answer to one turn of the policy."""

    state: Any
    """JSON values only; goes into the next step."""
    observation: str
    """What the policy reads before its next turn; unused when ``done``."""
    done: bool
    scores: Mapping[str, Score] = field(default_factory=dict)
    """Reward components that only the environment can judge, by name."""


@runtime_checkable
class Environment(Protocol):
    """Opens an episode and answers each turn of the policy until it is done."""

    def reset(self, row: Mapping[str, Any]) -> tuple[Any, str | list[dict[str, Any]]]:
        """The first state and the prompt, text or chat messages, of an episode on ``row``."""
        ...

    def step(self, state: Any, completion: str) -> Step:
        """What follows the turn ``completion``. Raises nothing, whatever the policy wrote."""
        ...


environments: Registry[Environment] = Registry("environments", Environment, "What the policy talks to")


@environments.register("single_turn", source="this project", evidence="end to end")
@dataclass(frozen=True)
class SingleTurn:
    """The row's prompt, one completion, the end."""

    def reset(self, row: Mapping[str, Any]) -> tuple[Any, str | list[dict[str, Any]]]:
        """No state, and the row's prompt."""
        return None, row["prompt"]

    def step(self, state: Any, completion: str) -> Step:
        """The end."""
        return Step(state, "", done=True)


@environments.register("calculator", source="this project", evidence="end to end")
@dataclass(frozen=True)
class Calculator:
    """A turn that holds a call such as ``[12*3]`` gets its exact value as an observation, then the policy goes on.

    The last call of a turn is the one that is answered. A turn without a call, or turn number ``max_turns``, ends the
    episode. A call that cannot be computed gets ``error`` in place of a value.
    """

    call: Annotated[str, option("regular expression of a call; its one group is the expression")] = r"\[([^\[\]]*)\]"
    result: Annotated[str, option("the observation; {value} stands for the value")] = "={value}\n"
    error: Annotated[str, option("what {value} becomes when the call cannot be computed", min_length=1)] = "error"
    max_turns: Annotated[int, option("turns of the policy in an episode", unit="turns", ge=1)] = 2

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.call).groups
        except re.error as error:
            raise UserError(f"call {self.call!r} is not a regular expression: {error}") from error
        if groups != 1:
            raise UserError(f"call {self.call!r} needs one group, the expression; it has {groups}")
        if "{value}" not in self.result:
            raise UserError(f"result {self.result!r} needs {{value}} where the value goes")

    def reset(self, row: Mapping[str, Any]) -> tuple[Any, str | list[dict[str, Any]]]:
        """No turn taken yet, and the row's prompt."""
        return {"turns": 0}, row["prompt"]

    def step(self, state: Any, completion: str) -> Step:
        """The value of the turn's last call, if it has one and another turn may follow."""
        turns = state["turns"] + 1
        calls = re.findall(self.call, completion)
        if not calls or turns >= self.max_turns:
            return Step({"turns": turns}, "", done=True)
        return Step({"turns": turns}, self.result.replace("{value}", self._value(calls[-1])), done=False)

    def _value(self, expression: str) -> str:
        try:
            return show(evaluate(expression))
        except ValueError:
            return self.error
