"""Rows of other people's files become rows of ours: columns are renamed, prompts built, and bad rows named.

A row of ours has a ``prompt``, text or chat messages, and may have ``answer`` (for rewards), ``completion`` (for
demonstrations, text or messages), ``chosen`` and ``rejected`` (for preferences) and ``id``; ``messages``, a whole
dialogue, stands for a prompt and a completion. All its other columns stay as they were.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, TypeGuard

from alignment.data.sources import Dataset
from alignment.errors import UserError
from alignment.types import Prompt

Layout = Literal["plain", "verl", "openrlhf"]
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "plain": {},
    "verl": {"prompt": ("prompt",), "answer": ("reward_model.ground_truth",)},
    "openrlhf": {"prompt": ("input", "context_messages", "prompt"), "answer": ("label",), "completion": ("output",)},
}
"""Where each layout has our columns: the first of several that a row has and that is not null."""
SHOWN_BAD_ROWS = 20
_MISSING = object()
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.-]*)\}")
_ASSISTANT = "\n\nAssistant:"
"""What stands before each answer in preferences that hold a whole dialogue as text (Anthropic's hh-rlhf)."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as a file has it, or why it cannot be read."""

    origin: str
    """Where it stands, such as ``train.jsonl:17``."""
    value: Any = None
    fault: str = ""


@dataclass(frozen=True)
class Columns:
    """How the columns of a file become ours; the options of the source ``dataset``."""

    layout: Layout = "plain"
    field_map: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    chat: bool = False
    system: str | None = None

    def row(self, raw: Any) -> tuple[dict[str, Any], list[str]]:
        """The row that ``raw`` becomes and what is wrong with it."""
        if not isinstance(raw, Mapping):
            return {}, [f"must be a JSON object, not {type(raw).__name__}"]
        row, missing = self._renamed(raw)
        if missing:
            return row, missing
        _split_dialogues(row)
        _split_messages(row, self.template is None)
        if self.template is not None:
            row["prompt"], faults = fill(self.template, row, raw)
            if faults:
                return row, faults
        for name in ("prompt", "completion", "chosen", "rejected"):
            if name in row:
                row[name] = _without_nulls(row[name])
        _split_answer(row)
        faults = self._as_chat(row)
        _shorten_sides(row)
        return row, faults or list(_faults(row))

    def _renamed(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        taken: dict[str, str] = {}
        for ours, candidates in LAYOUTS[self.layout].items():
            there = [c for c in candidates if lookup(raw, c) is not _MISSING and not _is_judgement(raw, c)]
            if there and ours not in self.field_map:
                taken[ours] = next((c for c in there if lookup(raw, c) is not None), there[-1])
        taken |= self.field_map
        missing = [
            f"has no {theirs!r} (field_map.{ours})" for ours, theirs in taken.items() if lookup(raw, theirs) is _MISSING
        ]
        renamed = {ours: lookup(raw, theirs) for ours, theirs in taken.items() if lookup(raw, theirs) is not _MISSING}
        whole = set(taken.values())  # of a nested column, the one around it stays
        return {name: value for name, value in raw.items() if name not in whole} | renamed, missing

    def _as_chat(self, row: dict[str, Any]) -> list[str]:
        prompt = row.get("prompt")
        if self.chat and _is_text(prompt):
            row["prompt"] = prompt = [{"role": "user", "content": prompt}]
        if self.system is None or "prompt" not in row:
            return []
        if not _are_messages(prompt):
            return ["'prompt' is text, which a system message cannot stand before; set chat: true"]
        if prompt[0]["role"] != "system":
            row["prompt"] = [{"role": "system", "content": self.system}, *prompt]
        return []


def to_dataset(raws: Iterable[RawRow], columns: Columns, origin: str) -> Dataset:
    """All rows that can be used, with ids, and the others named.

    A row's id is its column ``id``, or else the content of its prompt: adding other rows changes none.

    Raises:
        UserError: No row can be used.
    """
    prompts: list[Prompt] = []
    bad: list[str] = []
    used: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for raw in raws:
        row, faults = ({}, [raw.fault]) if raw.fault else columns.row(raw.value)
        prompt = Prompt("", row, raw.origin)
        name, fault = ("", "") if faults else _identity(prompt, used, copies)
        if faults or fault:
            bad.append(f"{raw.origin}: {'; '.join(faults or [fault])}")
        else:
            used[name] = raw.origin
            prompts.append(Prompt(name, row, raw.origin))
    if not prompts and bad:
        raise UserError(f"none of the {len(bad)} rows of {origin} can be used:\n{shown(bad)}")
    if not prompts:
        raise UserError(f"{origin} has no rows; a row is an object such as {{'prompt': '1+1='}}")
    return Dataset(prompts, origin, tuple(bad))


def shown(bad: Sequence[str], most: int = SHOWN_BAD_ROWS) -> str:
    """The first of ``bad``, one in a line, and how many more there are."""
    more = [f"and {len(bad) - most} more"] if len(bad) > most else []
    return "\n".join([*bad[:most], *more])


def _is_judgement(raw: Mapping[str, Any], column: str) -> bool:
    """OpenRLHF calls two things label: the answer to a prompt, and whether a completion was wanted."""
    return column == "label" and isinstance(raw[column], bool)


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or with dots of one inside it (``reward_model.ground_truth``, ``turns.0.content``)."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def template_columns(template: str) -> list[str]:
    """The columns that a template names."""
    return [match[1] for match in _FIELD.finditer(template) if match[1]]


def fill(template: str, *rows: Mapping[str, Any]) -> tuple[str, list[str]]:
    """``template`` with each ``{column}`` replaced, and what is wrong.

    ``{{`` and ``}}`` are braces; braces around anything but a name, such as ``{}`` and ``{2}``, stay as they are.

    Args:
        template: The text.
        rows: Where columns are looked for, one after the other.
    """
    faults: list[str] = []

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if not name:
            return match[0][0]
        value = next((found for row in rows if (found := lookup(row, name)) is not _MISSING), _MISSING)
        if value is _MISSING:
            faults.append(f"has no {name!r}, which the template 'prompt' names; write {{{{{name}}}}} if it is text")
        elif not isinstance(value, (str, int, float)) or isinstance(value, bool):
            faults.append(f"{name!r} must be text or a number to stand in the template 'prompt', not {_kind(value)}")
        return str(value)

    return _FIELD.sub(value_of, template), faults


def _identity(prompt: Prompt, used: Mapping[str, str], copies: Counter[str]) -> tuple[str, str]:
    """The id of a sound row, or what is wrong with the one it gives."""
    if "id" not in prompt.row:
        key = prompt.key
        copies[key] += 1
        return (key if copies[key] == 1 else f"{key}-{copies[key] - 1}"), ""
    given = prompt.row["id"]
    if isinstance(given, bool) or not isinstance(given, (str, int, float)) or given == "":
        return "", f"'id' must be text or a number, not {_kind(given)}; rename the column if it is no id"
    if str(given) in used:
        return "", f"'id' {given!r} is that of {used[str(given)]} already; rename the column if it is no id"
    return str(given), ""


def _split_dialogues(row: dict[str, Any]) -> None:
    """A pair without a prompt holds the whole dialogue twice: what both sides begin with is the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row:
        return
    if _are_messages(chosen) and _are_messages(rejected):
        start = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    elif _is_text(chosen) and _is_text(rejected):
        same = _common(chosen, rejected)
        found = chosen.rfind(_ASSISTANT, 0, same)
        start = found + len(_ASSISTANT) if found >= 0 else 0
    else:
        return
    if start:
        row["prompt"], row["chosen"], row["rejected"] = chosen[:start], chosen[start:], rejected[start:]


def _split_messages(row: dict[str, Any], alone: bool) -> None:
    """A dialogue in a row without a prompt: up to the assistant's first message is the prompt, the rest what it says
    and hears. ``alone``: no template makes the prompt."""
    messages = _without_nulls(row.get("messages"))
    if not alone or {"prompt", "completion", "chosen", "rejected"} & row.keys() or not _are_messages(messages):
        return
    prompt = [*takewhile(lambda message: message["role"] != "assistant", messages)]
    if not prompt:
        return
    del row["messages"]
    row["prompt"] = prompt
    if rest := messages[len(prompt) :]:
        row["completion"] = rest


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _split_answer(row: dict[str, Any]) -> None:
    """A prompt whose last message is the assistant's, in a row without a completion, holds the completion."""
    prompt = row.get("prompt")
    if _are_messages(prompt) and len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        if not {"completion", "chosen", "rejected"} & row.keys():
            row["prompt"], row["completion"] = prompt[:-1], prompt[-1]["content"]


def _shorten_sides(row: dict[str, Any]) -> None:
    """What follows the prompt alone, and as text where it is one plain message of the assistant."""
    prompt = row.get("prompt")
    for name in ("completion", "chosen", "rejected"):
        side = row.get(name)
        if not _are_messages(side):
            continue
        if _are_messages(prompt):
            own = prompt[1:] if prompt[0]["role"] == "system" else prompt
            start = next((len(p) for p in (prompt, own) if p and side[: len(p)] == p), 0)
            side = side[start:]
        if len(side) == 1 and side[0].keys() == {"role", "content"} and side[0]["role"] == "assistant":
            side = side[0]["content"]
        row[name] = side


def _faults(row: Mapping[str, Any]) -> Iterator[str]:
    if "prompt" not in row and isinstance(row.get("messages"), list):
        yield "'messages' must be messages {role, content} of which the first is not the assistant's; or name 'prompt'"
    elif "prompt" not in row:
        yield f"has no 'prompt'; its columns are {', '.join(row) or 'none'}: name the right one in field_map"
    elif not _is_text(row["prompt"]) and not _are_messages(row["prompt"]):
        yield "'prompt' must be text or a list of messages {role, content}, and not empty"
    elif _is_text(row["prompt"]) and not row["prompt"].strip():
        yield "'prompt' is blank"
    if "answer" in row and row["answer"] is None:
        yield "'answer' is null; leave the column out of rows without one"
    if "completion" in row:
        yield from _side_faults(row, "completion")
    there = [name for name in ("chosen", "rejected") if name in row]
    for name in there:
        yield from _side_faults(row, name)
    if len(there) == 1:
        yield f"has {there[0]!r} alone; a preference needs 'chosen' and 'rejected'"
    elif there and row["chosen"] == row["rejected"]:
        yield "'chosen' and 'rejected' are equal"


def _side_faults(row: Mapping[str, Any], name: str) -> Iterator[str]:
    side = row[name]
    if _is_text(side):
        return
    if not _are_messages(side):
        yield f"{name!r} must be text or a list of messages {{role, content}}, and not empty"
    elif _is_text(row.get("prompt")):
        yield f"{name!r} is a list of messages but 'prompt' is text; set chat: true"
    elif side[0]["role"] != "assistant":
        yield f"{name!r} goes on with a message of the {side[0]['role']!r}; after the prompt comes the assistant's"
    elif name == "completion" and side[-1]["role"] != "assistant":
        yield f"{name!r} ends with a message of the {side[-1]['role']!r}, after which nothing is learned; take it out"


def _without_nulls(value: Any) -> Any:
    """Messages without keys that are null: a parquet file gives each message every key that any of them has."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return value
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != ""


def _are_messages(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    def is_message(item: Any) -> bool:
        return isinstance(item, Mapping) and _is_text(item.get("role")) and isinstance(item.get("content"), str)

    return isinstance(value, list) and bool(value) and all(is_message(item) for item in value)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "empty text"}
    return names.get(type(value), f"a {type(value).__name__}")
