"""The process that calls reward functions. It is started with a fresh interpreter and may be killed at any moment.

Both directions are lines of JSON. It is told the rewards, then gets ``{"samples": [...], "calls": [[reward, sample],
...]}`` with indices into both lists, and gives one line per call. Its first lines say what is being imported, then that
it is ready or why it cannot be.
"""

import asyncio
import base64
import contextlib
import fcntl
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import select
import signal
import socket
import sys
import traceback
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from alignment.reward_registry import reward_functions
from alignment.score import FAILED, Score, Status

PROVIDED = (
    *("prompts", "completions", "completion_ids", "length_tokens", "finish_reason"),
    *("trainer_state", "log_extra", "log_metric"),
)
"""Keyword arguments that every reward function is offered beside the columns of the data set."""
DETAIL_CHARS = 300
Verdict = tuple[float | None, str, str, str | None]
"""Value, status, detail, answer: the fields of a :class:`Score`."""


class Sample(NamedTuple):
    """Completions of one prompt, or some of them, as they travel to a worker."""

    row: str
    """JSON of the prompt's row; decoded for each call, so that no reward sees what another did to it."""
    texts: Sequence[str]
    token_ids: Sequence[str]
    """Base64 of 32-bit integers: long completions are long lists."""
    length_tokens: Sequence[int]
    finish_reason: Sequence[str]
    step: int
    max_steps: int

    def only(self, i: int) -> "Sample":
        """Completion ``i`` alone."""
        one = slice(i, i + 1)
        return self._replace(
            texts=self.texts[one],
            token_ids=self.token_ids[one],
            length_tokens=self.length_tokens[one],
            finish_reason=self.finish_reason[one],
        )


def pack(token_ids: Sequence[int]) -> str:
    """Token ids as a sample carries them."""
    return base64.b64encode(array("i", token_ids).tobytes()).decode()


def unpack(packed: str) -> list[int]:
    """The inverse of :func:`pack`."""
    return array("i", base64.b64decode(packed)).tolist()


@dataclass(frozen=True)
class LoadedReward:
    """A reward function and what its signature says of it."""

    function: Callable[..., Any]
    accepts: frozenset[str] | None
    """The keywords it takes; None for all of them."""
    needs: tuple[str, ...]
    """Columns of the data set that it cannot do without."""
    chat: bool
    """It is annotated as taking chat messages, as TRL's own functions are, and gets them for text prompts too."""


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Answers requests until the parent closes the channel."""
    _die_with_parent(lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = socket.socket(fileno=channel_fd)

    def send(answer: Any) -> None:
        channel.sendall(json.dumps(answer).encode() + b"\n")

    # One event loop for all calls: clients of a web service keep their connections.
    with channel, channel.makefile("rb") as lines, asyncio.Runner() as runner:
        setup = lines.readline()
        rewards = _load_all(json.loads(setup), send) if setup else None
        if rewards is None:
            return
        send({"ready": [reward.needs for reward in rewards]})
        for line in lines:
            message = json.loads(line)
            samples = [Sample(*fields) for fields in message["samples"]]
            for reward, sample, check in message["calls"]:
                function, given = rewards[reward], samples[sample]
                send(check_rows(function, given) if check else answer_to(function, given, runner))


def _die_with_parent(lifeline_fd: int) -> None:
    """Lets the kernel kill this process, and what it started, once the parent's end of the pipe is closed.

    A thread that watches the pipe would not do: it never runs while a regular expression holds the interpreter.
    """
    if hasattr(fcntl, "F_SETSIG"):  # elsewhere the signal is SIGIO, which ends a process that does not handle it
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:  # it was closed before the kernel was told to watch it
        sys.exit()
    # When memory runs out the kernel shall take a scorer, never the run. Not every system has the file.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _load_all(setup: Mapping[str, Any], send: Callable[[Any], None]) -> list[LoadedReward] | None:
    """Imports the plugins and rewards, in the order given; on a failure tells the parent which, and returns None."""
    what = ""
    try:
        for plugin in setup["plugins"]:
            what = f"plugin {plugin!r}"
            send({"loading": what})
            importlib.import_module(plugin)
        rewards: list[LoadedReward] = []
        for wire in setup["rewards"]:
            what = f"reward {wire['column']!r} ({wire.get('path') or wire['component']['name']})"
            send({"loading": what})
            rewards.append(load_reward(wire))
        return rewards
    except BaseException as error:  # sys.exit() at the top of a module as well: the parent must hear of it
        send({"failed": f"{what} cannot be loaded: {describe(error)}{_hidden_module(error, setup['sys_path'])}"})
        return None


def _hidden_module(error: BaseException, sys_path: Sequence[str]) -> str:
    """A hint for a user's file that has the name of a package that was imported before it, such as ``rewards.py``."""
    obj = getattr(error, "obj", None)  # of an AttributeError
    name = (obj.__name__ if inspect.ismodule(obj) else getattr(error, "name", None) or "").partition(".")[0]
    own = [file for path in sys_path if os.path.isfile(file := os.path.join(path, f"{name}.py"))]
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if not name or not own or not loaded or os.path.samefile(own[0], loaded):
        return ""
    return f". {own[0]} is hidden by the package {name!r} ({loaded}); give the file another name"


def load_reward(wire: Mapping[str, Any]) -> LoadedReward:
    """The reward function that :meth:`alignment.reward_registry.RewardSpec.wire` described."""
    if "component" in wire:
        importlib.import_module(wire["module"])
        component = reward_functions.build(wire["component"])
        if prepare := getattr(component, "prepare", None):
            prepare()
        return LoadedReward(component, None, tuple(getattr(component, "columns", ())), chat=False)
    target, options = resolve(wire["path"]), dict(wire["options"])
    if not callable(target):
        raise TypeError(f"{wire['path']} is not callable")
    # Neither a class nor a function that takes nothing that TRL passes is a reward yet: it makes one from its options.
    if inspect.isclass(target) or not _takes_completions(target):
        target, options = target(**options), {}
    if not callable(target):
        raise TypeError(f"{wire['path']} takes neither completions nor **columns, and what it returns is not callable")
    function = functools.partial(target, **options) if options else target
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needs = tuple(p.name for p in named if p.default is p.empty and p.name not in PROVIDED)
    accepts = None if everything else frozenset(p.name for p in named) - frozenset(options)
    return LoadedReward(_without(function, options), accepts, needs, _wants_chat(target))


def _without(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """``function`` with the recipe's options in force even where the data set has a column of the same name."""
    if not options:
        return function
    return lambda **columns: function(**{k: v for k, v in columns.items() if k not in options})


def resolve(path: str) -> Any:
    """The object at a dotted path; its module is the longest prefix that can be imported."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            target = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if split == 1 or error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        return functools.reduce(getattr, parts[split:], target)
    raise AssertionError("a dotted path has at least two parts")


def _takes_completions(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters
    return any(p.kind is p.VAR_KEYWORD or name in PROVIDED for name, p in parameters.items())


def _wants_chat(function: Callable[..., Any]) -> bool:
    call = function if inspect.isroutine(function) else type(function).__call__
    try:
        hint = get_type_hints(call).get("completions")
    except (NameError, TypeError, AttributeError):  # annotations for a type checker only: TRL ignores them too
        return False
    inner = get_args(hint)
    return get_origin(hint) is list and bool(inner) and get_origin(inner[0]) is list


def check_rows(reward: LoadedReward, sample: Sample) -> Sequence[Verdict] | str:
    """One verdict per row, ``error`` where it cannot be used, or what the call as a whole failed with."""
    try:
        told = list(reward.function.check([json.loads(row) for row in sample.texts]))  # pyright: ignore[reportFunctionMemberAccess]
    except BaseException as error:  # as in answer_to
        return describe(error)
    if len(told) != (n := len(sample.texts)):
        return [failure("error", f"check returned {len(told)} values for {n} rows")] * n
    return [(None, "skipped", "", None) if fault is None else failure("error", str(fault)) for fault in told]


def answer_to(reward: LoadedReward, sample: Sample, runner: asyncio.Runner) -> Sequence[Verdict] | str:
    """One verdict per completion, or what the call as a whole failed with."""
    try:
        values = reward.function(**_arguments(reward, sample))
        if inspect.isawaitable(values):
            values = runner.run(_wait_for(values))
        judged = [_judge(value) for value in values]
    except BaseException as error:  # time-out helpers and sys.exit raise beside Exception; the worker goes on
        return describe(error)
    if len(judged) != (n := len(sample.texts)):
        return [failure("error", f"returned {len(judged)} values for {n} completions")] * n
    return judged


async def _wait_for(values: Any) -> Any:
    return await values


def _arguments(reward: LoadedReward, sample: Sample) -> dict[str, Any]:
    """Keyword arguments by TRL's convention: one entry per completion, the prompt's columns repeated."""
    row = json.loads(sample.row)
    prompt, n = row["prompt"], len(sample.texts)
    chat = reward.chat or not isinstance(prompt, str)
    columns: dict[str, Any] = {name: [value] * n for name, value in row.items() if name not in ("prompt", "completion")}
    columns |= {
        "prompts": [prompt] * n,
        "completions": [[{"role": "assistant", "content": t}] for t in sample.texts] if chat else sample.texts,
        "completion_ids": [unpack(ids) for ids in sample.token_ids],
        "length_tokens": sample.length_tokens,
        "finish_reason": sample.finish_reason,
        "trainer_state": SimpleNamespace(global_step=sample.step, max_steps=sample.max_steps),
        "log_extra": _ignore,
        "log_metric": _ignore,
    }
    # Lists are copied: a function may well sort what it is given, and the next one gets the same sample.
    columns = {name: list(value) if isinstance(value, list) else value for name, value in columns.items()}
    if reward.accepts is None:
        return columns
    return {name: value for name, value in columns.items() if name in reward.accepts}


def _ignore(*args: Any, **kwargs: Any) -> None:
    """TRL's logging hooks, which its functions may call; scores and statuses are logged here instead."""


def _judge(value: Any) -> Verdict:
    """The verdict that amounts to what a function gave for one completion."""
    status, detail, answer = "ok", "", None
    if isinstance(value, Score):
        value, status, detail, answer = value.value, value.status, str(value.detail)[:DETAIL_CHARS], value.answer
        if status not in get_args(Status):
            allowed = ", ".join(get_args(Status))
            return failure("error", f"returned a Score with status {status!r}; allowed: {allowed}")
    if status in FAILED:
        return None, status, detail, answer
    if value is None:
        return None, "skipped", detail, answer
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if not isinstance(value, numbers.Real):
        return failure("error", f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        return failure("error", f"returned {value}")
    return float(value), status, detail, answer


def failure(status: str, detail: str) -> Verdict:
    """The verdict of a completion whose score could not be computed."""
    return None, status, detail, None


def describe(error: BaseException) -> str:
    """One line: the error, its message, and the place in the code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:DETAIL_CHARS] + place
