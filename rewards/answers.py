r"""An answer as it is compared: a number, a word, a LaTeX expression, or a list, tuple, interval or matrix of such."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

from rewards.latex import closes_at_end, normalise, number, plain_characters, top_level

Tier = Literal["string", "number", "symbolic"]
TIERS: tuple[Tier, ...] = get_args(Tier)
CHARS_MAX = 1000
"""A longer text is no answer."""
_PARTS_MAX = 64
_DEPTH_MAX = 8
_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm)\s*\{([^{}]*)\}\.?")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_WORD = re.compile(r"[^\W\d_]{3}")
_LETTER = re.compile(r"\(?([A-Za-z])[).]?")
_JOINED = re.compile(r"(?:\\(?:text|mbox)\s*\{)?\s(?:and|or)\s(?:\s*\})?|,\s*(?:and|or)\s")
_NO_UNIT = (
    r"(?:or|and|to|if|plus|minus|times|dozens?|hundreds?|thousands?|(?:m|b|tr|quadr)illions?|tenths?|hundredths?"
    r"|thousandths?|millionths?|half|halves|thirds?|percent|per cent|squared|cubed|factorial)\b"
)
_PLAIN_UNIT = re.compile(
    rf"((?:[A-Za-z]\s*=\s*)?[-+$0-9.,/]*[0-9])\s+(?![A-Za-z ./]*?\b{_NO_UNIT})[A-Za-z]{{2}}[A-Za-z ./]*", re.IGNORECASE
)
_PER_CENT = re.compile(r"(?<=[0-9}])\s*(?:\\(?:text|mbox)\s*\{\s*per ?cent\s*\}|per ?cent)\s*$", re.IGNORECASE)
_MANY = r"(?:hundred|thousand|dozen|(?:m|b|tr)illion)"
_UNIT_TEXT = rf"\\text\{{(?!\s*[ied]\s*\}})(?![^{{}}]*?(?<![A-Za-z])(?i:{_NO_UNIT}|{_MANY}))(?:[^{{}}0-9,]|\^[23])*\}}"
_UNIT = re.compile(rf"(.+?)(?:{_UNIT_TEXT}(?:\^[23])?|\^\\circ|\^\{{\\circ\}}(?:[CF](?![a-z]))?)+")
_END = re.compile(r"(?:\\[,;:! ]|(?<!\\)[.,;:\s])+$")
_LETTERS = re.compile(
    r"(?<!\\)(?<![A-Za-z])[A-Za-z]|\\(?:alpha|beta|gamma|theta|angle|triangle|text|overline|sin|cos|tan)(?![a-z])"
)
_PERCENT = re.compile(r"(.+?)\\?%")
_BASED = re.compile(r"[0-9][0-9A-F]*_(?:[2-9]|\{[1-3][0-9]\})")
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_(?:\{[^{}]*\}|\w))?(?:\([a-zA-Z,]*\))?")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}")
_MEMBER = re.compile(rf"({_NAME.pattern})\\in ?(.+)")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z]) ?")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne)(?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, read."""

    text: str
    """Canonical: two answers that are equal by spelling or as numbers have one text."""
    latex: str
    """For a parser, without unit and ``x=``."""
    number: Fraction | None = None
    percent: bool = False
    kind: str = ""
    r"""What its parts make: ``list`` (in any order; also ``\{...\}`` and ``\pm``), the brackets of a tuple or interval,
    or the shape of a matrix. Empty without parts."""
    parts: tuple["Answer", ...] = ()
    words: bool = False
    """It is text, not mathematics."""
    name: str = ""
    """The ``x`` of ``x=5``."""
    equation: str = ""
    """The whole of ``x=5``, or of any other equation."""
    last_side: str = ""
    r"""What follows the last ``=`` of an equation that is not of the form ``x=...``."""

    @property
    def based(self) -> bool:
        """Whether it is a numeral with its base, such as ``1010_2``."""
        return _BASED.fullmatch(self.text) is not None


@lru_cache(maxsize=8192)
def read(text: str) -> Answer | None:
    """The answer that ``text``, LaTeX or not, stands for; None when it is empty or too long to be one."""
    if len(text) > CHARS_MAX:
        return None
    text = _PER_CENT.sub(r"\\%", _END.sub("", plain_characters(text))).strip()
    while text.startswith("{") and closes_at_end(text):
        text = text[1:-1].strip()
    words = False
    if match := _WRAPPED.fullmatch(text):
        text, words = match[1].strip(), True
    if match := _LETTER.fullmatch(text):  # the (C) of a multiple choice
        return Answer(match[1], match[1])
    if _WORDS.fullmatch(text) and (words or _WORD.search(text)):
        folded = " ".join(text.casefold().split())
        return Answer(folded, folded, words=True)
    if match := _PLAIN_UNIT.fullmatch(text):
        text = match[1]
    text = normalise(_JOINED.sub(", ", text))
    return _read(text, _DEPTH_MAX) if text else None


def _read(text: str, depth: int, listed: bool = False) -> Answer:
    """The answer of a normalised text; ``listed`` says that a comma in it is never within a number."""
    composite = _brackets(text, depth) if depth else None
    if composite is not None:
        return composite
    items = top_level(text, ",")
    if depth and len(items) > 1 and (listed or number(_bare(text)[0]) is None):
        return _compose("list", text, [_read(item, depth - 1, listed=True) for item in items if item])
    sides = top_level(text, "=")
    member = _MEMBER.fullmatch(text)
    if depth and (member or (len(sides) > 1 and _NAME.fullmatch(sides[0]))) and not _ORDER.search("".join(sides[1:])):
        name, body = (member[1], member[2]) if member else (sides[0], sides[-1])
        return replace(_read(body, depth - 1), name=name, equation=text)
    if depth and len(sides) == 1 and len(_PLUS_MINUS.findall(text)) == 1:
        return _compose("list", text, [_read(_PLUS_MINUS.sub(sign, text), depth - 1) for sign in ("+", "-")])
    if len(sides) > 1 and not _ORDER.search(text):
        return Answer(text, text, equation=text, last_side=sides[-1])
    return _atom(text)


def _brackets(text: str, depth: int) -> Answer | None:
    """What stands in one pair of brackets around everything, or in a matrix."""
    if match := _MATRIX.fullmatch(text):
        rows = [top_level(row, "&") for row in top_level(match[2].removesuffix("\\\\"), "\\\\")]
        shape = f"matrix {'x'.join(str(len(row)) for row in rows)}"
        return _compose(shape, text, [_read(item, depth - 1, listed=True) for row in rows for item in row])
    opening = "\\{" if text.startswith("\\{") else text[:1]
    if opening not in ("\\{", "(", "[") or not closes_at_end(text):
        return None
    closing = "\\}" if text.endswith("\\}") else text[-1]
    inner = text[len(opening) : -len(closing)]
    items = top_level(inner, ",")
    if opening == "\\{" and closing == "\\}":
        return _compose("list", text, [_read(item, depth - 1, listed=True) for item in items if item])
    if len(items) > 1:
        return _compose(opening + closing, text, [_read(item, depth - 1, listed=True) for item in items])
    return _read(inner, depth - 1) if (opening, closing) == ("(", ")") and inner else None


def join(answers: Sequence[Answer]) -> Answer:
    """Several answers that are all wanted, as one list."""
    return _compose("list", ",".join(answer.latex for answer in answers), answers)


def _compose(kind: str, latex: str, parts: Sequence[Answer]) -> Answer:
    """Parts as one answer. A list is flat, has each part once, and is its part when it has only one."""
    if kind == "list":
        flat = [each for part in parts for each in (part.parts if part.kind == "list" else (part,))]
        parts = list({(part.name, part.text): part for part in flat}.values())
        if len(parts) == 1:
            return parts[0]
        return Answer(", ".join(sorted(part.text for part in parts)), latex, kind=kind, parts=tuple(parts))
    inner = ", ".join(part.text for part in parts)
    text = f"{kind}: {inner}" if kind.startswith("matrix") else f"{kind[0]}{inner}{kind[-1]}"
    return Answer(text, latex, kind=kind, parts=tuple(parts))


def _atom(text: str) -> Answer:
    if match := _WRAPPED.fullmatch(text):
        return Answer(match[1].casefold(), text, words=True)
    bare, percent = _bare(text)
    value = number(bare)
    return Answer(bare if value is None else str(value), bare, value, percent)


def _bare(text: str) -> tuple[str, bool]:
    """A text without its unit, and whether that was a percent sign."""
    if match := _PERCENT.fullmatch(text):
        return match[1], True
    if match := _UNIT.fullmatch(text):
        return match[1], False
    return text.removeprefix("+"), False


def match(gold: Answer, given: Answer, same: Callable[[str, str], bool]) -> Tier | None:
    """How ``given`` was found to be ``gold``, or None when it is not.

    A number must be given as a number, whatever the value of an expression such as ``2*3`` is. Brackets must be of
    one kind, except that a bare list is a set. Names (``x=``) may be left out but not exchanged.

    Args:
        gold: From the data set.
        given: By the model.
        same: Whether two LaTeX expressions are equal; asked last.
    """
    if gold.name and given.name and gold.name != given.name:
        return None
    if given.equation and not gold.last_side and not _holds(given.equation, same):
        return None
    if gold.parts and given.parts:
        if gold.kind != given.kind or len(gold.parts) != len(given.parts) or len(gold.parts) > _PARTS_MAX:
            return None
        return _match_parts(gold, given, same)
    if gold.parts or given.parts:  # an interval, perhaps, and an inequality
        plain = given if gold.parts else gold
        apart = "list" in (gold.kind, given.kind) or plain.number is not None or plain.words
        return "symbolic" if not apart and same(gold.latex, given.latex) else None
    return _match_atoms(gold, given, same)


def _holds(equation: str, same: Callable[[str, str], bool]) -> bool:
    """Whether the sides of an equation are its last one, or names, or, the first one, a quantity: not so ``8=7``."""
    *sides, last = top_level(equation, "=")
    value = number(_bare(last)[0])
    for i, side in enumerate(sides):
        if _NAME.fullmatch(side) or (i == 0 and _LETTERS.search(side)) or _MEMBER.fullmatch(equation):
            continue
        found = number(_bare(side)[0])
        if not (found == value if found is not None and value is not None else same(last, side)):
            return False
    return True


def _match_parts(gold: Answer, given: Answer, same: Callable[[str, str], bool]) -> Tier | None:
    left, tiers = list(given.parts), list[Tier]()
    wanted = list(gold.parts)
    if gold.kind == "list":  # what is equal at sight goes first
        wanted.sort(key=lambda part: not any(_at_sight(part, other) for other in left))
    for part in wanted:
        candidates = left if gold.kind == "list" else left[:1]
        at_sight = (i for i, other in enumerate(candidates) if _at_sight(part, other))
        otherwise = (i for i, other in enumerate(candidates) if match(part, other, same))
        i = next(at_sight, None)
        i = next(otherwise, None) if i is None else i
        tier = None if i is None else match(part, left.pop(i), same)
        if tier is None:
            return None
        tiers.append(tier)
    return max(tiers, key=TIERS.index)


def _at_sight(gold: Answer, given: Answer) -> Tier | None:
    if gold.text != given.text or gold.kind != given.kind or (gold.name and given.name and gold.name != given.name):
        return None
    return "string" if gold.latex == given.latex else "number"


def _match_atoms(gold: Answer, given: Answer, same: Callable[[str, str], bool]) -> Tier | None:
    if tier := _at_sight(gold, given):
        return tier
    if gold.based or given.based or gold.words or given.words:
        return None
    if given.last_side and not gold.last_side and not gold.name:  # 2+3=5 for 5
        last = _read(given.last_side, 1)
        return None if last.last_side else match(gold, last, same)
    if gold.number is not None:
        if given.number is None or gold.percent == given.percent:
            return None
        share, whole = (gold.number, given.number) if gold.percent else (given.number, gold.number)
        return "number" if share / 100 == whole else None
    if gold.last_side or given.last_side:
        sides = gold.equation, given.equation
    else:
        sides = gold.latex, given.latex
    return "symbolic" if all(sides) and same(*sides) else None
