"""YAML files and ``--set a.b=c`` to values that remember their file and line.

YAML 1.2 by ruamel.yaml: ``1e-4`` is a number, ``on`` and ``no`` are text.
"""

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from alignment.recipe_tree import Mark, Node, Place, Problem, RecipeError, kind

SECRET_VALUE = re.compile(
    r"(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY)"
)
SECRET_KEY = re.compile(r"(^|_)(api_?key|access_?key|auth_?token|access_?token|hf_?token|secret|password)$", re.I)
RECIPE = "a recipe is a mapping with at least model, data and stages"
_MAX_VALUES = 100_000
_MAX_DEPTH = 30
_TOO_DEEP = "is nested too deeply to be a recipe"
_TAG = "tag:yaml.org,2002:"
_BASES = {"0x": 16, "0o": 8, "0b": 2}
_REMEDIES = {
    "mapping values are not allowed": "put text that contains ': ' in quotes and check the indentation",
    "could not find expected ':'": "every line of a mapping reads 'key: value'",
    "expected <block end>": "entries of one mapping or list start in the same column",
    "expected ',' or": "close the bracket or brace that is open",
    "undefined alias": "define the anchor with '&' before it is used",
    "but found another document": "keep one document in each file and remove '---'",
    "expected the node content": "a value is missing, or a bracket is left open",
    "while scanning a quoted scalar": "close the quotation mark",
}


def read_file(path: Path, problems: list[Problem], what: str = RECIPE) -> Node:
    """The mapping that a recipe file holds, or another file of which ``what`` says what it should be. Mistakes beside
    which the rest can be read join ``problems``; see :func:`parse`.

    Raises:
        RecipeError: The file cannot be read, is not UTF-8 or not YAML, or holds no mapping.
    """
    mark = Mark(str(path), None, path.resolve().parent)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError([Problem(mark, (), "no such file")]) from None
    except IsADirectoryError:
        raise RecipeError([Problem(mark, (), "is a folder; give the recipe file in it")]) from None
    except (OSError, ValueError) as error:
        raise RecipeError([Problem(mark, (), f"cannot be read: {error}")]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError([Problem(replace(mark, line=line), (), "is not UTF-8 text; save it as UTF-8")]) from None
    node = parse(text, mark, problems)
    if node is None:
        raise RecipeError([Problem(mark, (), f"is empty; {what}")])
    if not isinstance(node.value, dict):
        raise RecipeError([Problem(node.mark, (), f"expected a mapping such as 'run: ...', given {kind(node.value)}")])
    return node


def parse_override(text: str, problems: list[Problem]) -> Node:
    """The mapping that ``--set a.b=c`` stands for; the value is YAML and ``a.0.b`` reaches into a list. Mistakes beside
    which the rest can be read join ``problems``; see :func:`parse`.

    Raises:
        RecipeError: It is not ``key=value``, or the value is not YAML.
    """
    mark = Mark("--set " + _shown(text), None, Path.cwd())
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError([Problem(mark, (), "expected KEY=VALUE with a dotted key, such as run.seed=1")])
    place = tuple(int(part) if part.isdecimal() else part for part in parts)
    node = parse(value, mark, problems, place) or Node(None, mark)
    for part in reversed(parts):
        node = Node({part: node}, mark)
    return node


def parse(text: str, mark: Mark, problems: list[Problem], place: Place = ()) -> Node | None:
    """The values of a YAML document that belongs at ``place``, or None if there is none. Lines count from 1; a mark
    that is not a file keeps its own text.

    Every duplicate key (its first value stays), unknown tag and bad number (null in its place) joins ``problems``.

    Raises:
        RecipeError: The first syntax error.
    """
    is_file = not mark.source.startswith("--set")
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        if root is None:
            return None
        return _Builder(mark, is_file, problems).build(root, place)
    except MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark
        line = found.line + 1 if is_file and found is not None else None
        raise RecipeError([Problem(replace(mark, line=line), (), _syntax_message(error))]) from None
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1 if is_file and isinstance(error.position, int) else None
        message = "holds a control character that YAML does not allow; remove it"
        raise RecipeError([Problem(replace(mark, line=line), (), message)]) from None
    except RecursionError:
        raise RecipeError([Problem(mark, (), _TOO_DEEP)]) from None
    except (YAMLError, ValueError, NotImplementedError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([Problem(mark, (), f"is not valid YAML: {error}")]) from None


def _syntax_message(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "syntax error")
    if "'\\t'" in problem or "\t" in problem:
        return "a tab is used for indentation; YAML allows only spaces there"
    told = f"{error.context or ''} {problem}"
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in told), "check this line and the one above")
    return f"is not valid YAML: {problem}; {remedy}"


class _Builder:
    """Turns composed YAML into nodes and collects what is wrong with them."""

    def __init__(self, mark: Mark, is_file: bool, problems: list[Problem]) -> None:
        self.mark, self.is_file, self.problems = mark, is_file, problems
        self.count = 0
        self.open: set[int] = set()

    def at(self, node: YamlNode) -> Mark:
        return replace(self.mark, line=node.start_mark.line + 1) if self.is_file else self.mark

    def build(self, node: YamlNode, place: Place) -> Node:
        self.count += 1
        if self.count > _MAX_VALUES:
            raise RecipeError([Problem(self.at(node), (), f"holds more than {_MAX_VALUES} values")])
        if len(place) > _MAX_DEPTH:
            raise RecipeError([Problem(self.at(node), (), _TOO_DEEP)])
        if id(node) in self.open:
            raise RecipeError([Problem(self.at(node), place, "an alias refers to the value that it is part of")])
        self.open.add(id(node))
        if isinstance(node, MappingNode):
            value: Any = self.mapping(node, place)
        elif isinstance(node, SequenceNode):
            value = [self.build(item, (*place, index)) for index, item in enumerate(node.value)]
        else:
            value = self.scalar(node, place)
        self.open.discard(id(node))
        return Node(value, self.at(node))

    def mapping(self, node: MappingNode, place: Place) -> dict[str, Node]:
        result: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for source in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                    child = self.build(source, place)
                    inherited = {**(child.value if isinstance(child.value, dict) else {}), **inherited}
                continue
            if not isinstance(key_node.value, str):
                self.problems.append(Problem(self.at(key_node), place, "a key must be text"))
                continue
            key, mark = key_node.value, self.at(key_node)
            if key in result:
                message = f"the key is given twice, first at {result[key].mark}; keep one"
                self.problems.append(Problem(mark, (*place, key), message))
                continue
            result[key] = replace(self.build(value_node, (*place, key)), mark=mark)
        return {**inherited, **result}

    def scalar(self, node: YamlNode, place: Place) -> Any:
        tag, text = str(node.tag).removeprefix(_TAG), node.value
        try:
            return _scalar(tag, text)
        except UnicodeEncodeError:
            self.problems.append(Problem(self.at(node), place, "holds half a character; write it in full"))
            return None
        except (ValueError, OverflowError, KeyError):
            said = f"'{text}'" if len(text) <= 40 else f"'{text[:37]}...'"
            what = {"int": "a whole number of at most 64 bits", "float": "a number", "bool": "true or false"}.get(tag)
            message = f"{said} is not {what}" if what else f"the tag {node.tag} is not allowed; write plain values"
            self.problems.append(Problem(self.at(node), place, message))
            return None


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar, by the tag that YAML 1.2 resolves. A date stays text."""
    match tag:
        case "str" | "timestamp" | "value":
            text.encode("utf-8")  # an escape such as "\\ud800" is half a character
            return text
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}[text.lower()]
        case "int":
            digits = text.replace("_", "")
            number = int(digits, _BASES.get(digits.lstrip("+-")[:2].lower(), 10))
            if not -(2**63) <= number < 2**63:
                raise OverflowError
            return number
        case "float":
            value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            if math.isnan(value):
                raise ValueError
            return value
        case _:
            raise KeyError(tag)


def _shown(override: str) -> str:
    """An override as errors show it, without secrets."""
    key, _, _ = override.partition("=")
    return f"{key}=***" if SECRET_KEY.search(key.rpartition(".")[2]) else SECRET_VALUE.sub("***", override)
