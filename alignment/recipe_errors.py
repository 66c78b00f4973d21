"""pydantic's errors as sentences at ``file:line``: what was expected, what was given, and what was probably meant."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator
from pydantic_core import ErrorDetails

from alignment.recipe_sections import NAME_PATTERN, PATH_PATTERN, NamedReward
from alignment.recipe_tree import Node, Place, Problem, kind, mark_of
from alignment.registry import Registry
from alignment.reward_registry import reward_functions

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "dataclass": "a mapping",
    "component": "a name, or a mapping with 'name' and options",
    "reward": "a name, or a mapping with 'name', 'function' or 'environment'",
    "none": "null",
    "literal": "one of {expected}",
    "finite": "a finite number",
    "too": "a list of at least {min_length} items",
}
_COMPARED = {
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_long": "a list of at most {max_length} items",
}
_PATTERNS = {
    NAME_PATTERN: "a name of letters, digits, '.', '_' and '-' that starts with a letter or digit",
    PATH_PATTERN: "the dotted path of a function in a module, such as my_rewards.brevity",
}
_MOVED = {
    "eval_every": "evaluation.every says how often the model is evaluated",
    "learning_rate": "the learner's option is called 'lr'",
    "batch_size": "an online step has prompts_per_step prompts of group_size completions each",
    "gpus": "where processes live is a stage's 'cluster'",
}


def problems_of(errors: Sequence[ErrorDetails], root: Node, data: Any, model: type[BaseModel]) -> list[Problem]:
    """A problem for each place of a recipe that pydantic complains about.

    The alternatives of a union become one sentence.

    Args:
        errors: From :meth:`pydantic.ValidationError.errors`.
        root: The recipe's values with their marks.
        data: The same values without.
        model: What ``data`` was validated as.
    """
    expected: dict[Place, list[str]] = {}
    told: list[tuple[Place, str]] = []
    for error in errors:
        place = _place(error, data)
        phrase = _expected(error)
        if phrase is None:
            place, message = _told(error, place, data, model)
            told.append((place, message))
        else:
            expected.setdefault(place, []).append(phrase)
    for place, phrases in expected.items():
        if any(other != place and other[: len(place)] == place for other in [*expected, *(p for p, _ in told)]):
            continue  # the value took one alternative of a union and failed further inside
        value = _value(data, place)
        literal = [option for error in errors if _place(error, data) == place for option in _literals(error)]
        message = f"expected {' or '.join(dict.fromkeys(phrases))}, given {kind(value)}{_meant(value, literal)}"
        told.append((place, message + _quoted(phrases, value)))
    return [Problem(mark_of(root, place), place, message) for place, message in told]


def without(data: Any, places: Sequence[Place]) -> Any:
    """``data`` less the values at ``places``, so that the rest can be checked for more mistakes."""
    data = deepcopy(data)
    for place in sorted(places, key=lambda p: [str(part).zfill(6) for part in p], reverse=True):
        holder = _value(data, place[:-1]) if place else None
        if isinstance(holder, dict):
            holder.pop(place[-1], None)
        elif isinstance(holder, list) and isinstance(place[-1], int) and place[-1] < len(holder):
            del holder[place[-1]]
    return data


def did_you_mean(given: Any, allowed: Sequence[str]) -> str:
    """``; did you mean 'clip'?`` or nothing."""
    close = get_close_matches(str(given), allowed, 1, 0.6) if given is not None else []
    return f"; did you mean '{close[0]}'?" if close else ""


def _place(error: ErrorDetails, data: Any) -> Place:
    """Where the error is in the user's own terms: parts that pydantic adds for unions and wrappers are left out."""
    place: list[str | int] = []
    last = len(error["loc"]) - 1
    for index, part in enumerate(error["loc"]):
        if _holds(data, part):
            place.append(part)
            data = data[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif index == last and error["type"] in _MISSING:
            place.append(part)
    if error["type"] == "component_name" and isinstance(data, dict):
        key = error.get("ctx", {}).get("key", "name")
        place += [key] if key in data else []
    return tuple(place)


def _value(data: Any, place: Place) -> Any:
    for part in place:
        if not _holds(data, part):
            return None
        data = data[part]
    return data


def _holds(data: Any, part: str | int) -> bool:
    return part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))


def _expected(error: ErrorDetails) -> str | None:
    """What a well-formed value would be, for errors about the form of a value."""
    context = error.get("ctx", {})
    if error["type"] == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
    if error["type"] in _COMPARED:
        return _COMPARED[error["type"]].format(**context)
    if error["type"] in (*_UNKNOWN_KEY, *_MISSING, "component_name", "value_error", "assertion_error"):
        return None
    phrase = _EXPECTED.get(error["type"].partition("_")[0])
    return phrase.format(**context) if phrase else None


def _told(error: ErrorDetails, place: Place, data: Any, model: type[BaseModel]) -> tuple[Place, str]:
    """The sentence for errors that are not about the form of a value."""
    context = error.get("ctx", {})
    if error["type"] in _UNKNOWN_KEY:
        return place, _unknown_key(place, data, model)
    if error["type"] in _MISSING:
        return place, "is required" + (f"; {_MOVED[str(place[-1])]}" if str(place[-1]) in _MOVED else "")
    if error["type"] == "component_name":
        return place, _unknown_name(context)
    if error["type"] == "value_error":
        return place, str(context.get("error", error["msg"]))
    return place, error["msg"].removeprefix("Input ").removeprefix("should be").strip()


def _unknown_name(context: Mapping[str, Any]) -> str:
    kind_, given, key = context["kind"], context["given"], context.get("key", "name")
    allowed = list(context["allowed"])
    choices = f"available: {', '.join(allowed) or 'none'}"
    if given in (None, "None"):
        return f"needs '{key}' ({choices})"
    if not isinstance(given, str):
        return f"'{key}' must be text, given {kind(given)} ({choices})"
    if given in context.get("later", ()):
        return f"'{given}' is not available yet ({choices})"
    return f"'{given}' is not one of the {kind_}{did_you_mean(given, allowed)} ({choices})"


def _unknown_key(place: Place, data: Any, model: type[BaseModel]) -> str:
    key, holder = str(place[-1]), _value(data, place[:-1])
    cls = _class_at(model, data, place[:-1])
    component = cls is NamedReward or (dataclasses.is_dataclass(cls) and "name" in holder)
    if cls is NamedReward:
        names = [*_keys(reward_functions[holder["name"]].cls), "weight", "as"]
    else:
        names = _keys(cls)
    what = f"'{holder['name']}' has no option '{key}'" if component else f"there is no key '{key}'"
    if not names:
        return f"{what}; it takes none"
    meant = f"; {_MOVED[key]}" if key in _MOVED else did_you_mean(key, names)
    return f"{what}{meant} ({'options' if component else 'keys'}: {', '.join(names)})"


def _keys(cls: Any) -> list[str]:
    """The keys that a section or component may have, as a recipe writes them."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return [info.alias or name for name, info in cls.model_fields.items()]
    return [f.name for f in dataclasses.fields(cls) if f.init] if cls is not None else []


def _class_at(hint: Any, data: Any, place: Place) -> Any:
    """The section or component class that validates the value at ``place``, or None."""
    cls = _class_of(hint, data)
    if not place:
        return cls
    inner = _value(data, place[:1])
    if isinstance(place[0], int):
        items = [arg for arg in _unwrapped(hint) if get_origin(arg) in (tuple, list)]
        return _class_at(get_args(items[0])[0], inner, place[1:]) if items else None
    if cls is None:
        return None
    hints = get_type_hints(cls, include_extras=True)
    return _class_at(hints[place[0]], inner, place[1:]) if place[0] in hints else None


def _unwrapped(hint: Any) -> Iterator[Any]:
    """The alternatives of a hint, annotations stripped."""
    if get_origin(hint) is Annotated:
        yield from _unwrapped(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for arg in get_args(hint):
            yield from _unwrapped(arg)
    else:
        yield hint


def _class_of(hint: Any, value: Any) -> Any:
    """The class behind a hint: for a component, the one that ``value`` names."""
    if get_origin(hint) is Annotated:
        for meta in get_args(hint)[1:]:
            if isinstance(meta, BeforeValidator):
                return _chosen(meta.func, value)
        return _class_of(get_args(hint)[0], value)
    if get_origin(hint) in (Union, UnionType):
        return next((c for arg in get_args(hint) if arg is not NoneType and (c := _class_of(arg, value))), None)
    is_class = isinstance(hint, type) and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint))
    return hint if is_class else None


def _chosen(validator: Any, value: Any) -> Any:
    """The class that a registry or a choice of sections would use for ``value``."""
    registry = getattr(validator, "__self__", None)
    if not isinstance(registry, Registry):
        cls = validator.type_of(value) if hasattr(validator, "type_of") else None
        return cls
    name = value.get("name") if isinstance(value, Mapping) else value
    return registry[name].cls if isinstance(name, str) and name in registry.names() else None


def _literals(error: ErrorDetails) -> list[str]:
    quoted = str(error.get("ctx", {}).get("expected", "")) if error["type"] == "literal_error" else ""
    return quoted.split("'")[1::2]


def _meant(value: Any, allowed: Sequence[str]) -> str:
    return did_you_mean(value, allowed) if isinstance(value, str) else ""


def _quoted(phrases: Sequence[str], value: Any) -> str:
    is_scalar = isinstance(value, (bool, int, float))
    return "; put it in quotes to make it text" if is_scalar and phrases == ["text"] else ""
