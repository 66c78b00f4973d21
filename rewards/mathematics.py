r"""Right or wrong by mathematics: the answer in the last box, compared as text, as a number, and as an expression."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.score import Score
from rewards.answers import Answer, join, match, read
from rewards.extraction import AnswerIn, given_answer, gold_texts, has_box
from rewards.latex import normalise, top_level
from rewards.symbolic import TooLong, parsed, require_math_verify, same

_MATHEMATICS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NO_FORMULA = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z({])|[?!;:]")
_DECIMAL = re.compile(r"[-+0-9.,]+")
_SIDES = re.compile(r"[<>]|\\(?:le|ge|ne|approx|equiv)(?![a-zA-Z])")


@reward_functions.register("math", source="this project; expressions by math-verify 0.9")
@dataclass(frozen=True)
class Math:
    r"""1 when the completion's answer is the gold answer as text, as a number or as an expression, 0 otherwise.

    The answer is what the last ``\boxed{...}`` or ``\fbox{...}`` holds. The gold column may hold a text with ``####``
    (GSM8K), a worked solution with a box, LaTeX, a number, or a list of answers that are all wanted, in any order.
    ``Score.detail`` of a right answer is the tier that found it: ``string``, ``number`` or ``symbolic``. An answer that
    only mathematics makes right and that the question already states is a copy, hence wrong.

    ``unparseable`` (and 0) without an answer, ``skipped`` where the row has none, ``timeout`` when an expression could
    not be compared within seconds. Calls must come from the main thread of a process, unless ``symbolic`` is false.
    """

    column: Annotated[str, option("column of the data set that holds the gold answer", min_length=1)] = "answer"
    answer_in: Annotated[
        AnswerIn,
        option("where a completion's answer is: only in a box, or, without one, after '####', 'answer is' or last"),
    ] = "box"
    symbolic: Annotated[bool, option("compare expressions (needs math-verify), not only texts and numbers")] = True

    def __post_init__(self) -> None:
        if self.symbolic:
            require_math_verify()

    @property
    def columns(self) -> tuple[str, ...]:
        """The data columns it reads."""
        return (self.column,)

    def prepare(self) -> None:
        """Imports math-verify and has it read something, which takes seconds the first time."""
        if self.symbolic:
            parsed(r"\frac{x^2}{\sqrt{2}}")

    def check(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """What is wrong with each row's gold answer."""
        return [self._fault(row.get(self.column)) for row in rows]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion."""
        rows = zip(prompts, texts(completions), columns[self.column], strict=True)
        return [self._score(prompt, text, gold) for prompt, text, gold in rows]

    def _fault(self, value: Any) -> str | None:
        gold = _gold(value)
        if gold is None:
            return f"column {self.column!r} holds no answer that can be read: {str(value)[:80]!r}"
        if not self.symbolic:
            return None
        try:
            unread = next((part for part in _leaves(gold) if not _readable(part)), None)
        except TooLong as error:
            return str(error)
        return None if unread is None else f"the answer {unread.latex[:80]!r} cannot be read as mathematics"

    def _score(self, prompt: Any, completion: str, value: Any) -> Score:
        gold = _gold(value)
        if gold is None:
            return Score(None, "skipped", f"the row has no answer that can be read: {str(value)[:80]!r}")
        found = given_answer(completion, self.answer_in)
        if found is None:
            return Score(0.0, "unparseable", "the last box is not closed" if has_box(completion) else "no answer")
        given = read(found)
        if given is None:
            return Score(0.0, "wrong" if found.strip() else "unparseable", "the answer is empty or too long")
        try:
            tier = match(gold, given, same if self.symbolic else _never)
        except TooLong as error:
            return Score(None, "timeout", str(error), given.text)
        if tier is None:
            return Score(0.0, "wrong", "", given.text)
        if given.last_side and not gold.last_side and _stated_equation(prompt, given):
            return Score(0.0, "wrong", "the question states this equation", given.text)
        if (tier == "symbolic" and _copied(prompt, gold, given)) or (tier == "number" and _stated(prompt, gold, given)):
            return Score(0.0, "wrong", "the question states this expression", given.text)
        return Score(1.0, "ok", tier, given.text)


def _never(gold: str, given: str) -> bool:
    return False


def _gold(value: Any) -> Answer | None:
    """The gold answer of a row; None when there is none that can be read."""
    return _joined(gold_texts(value))


@lru_cache(maxsize=8192)
def _joined(found: tuple[str, ...]) -> Answer | None:
    answers = [read(text) for text in found]
    known = [answer for answer in answers if answer is not None]
    return join(known) if known and len(known) == len(answers) else None


def _leaves(answer: Answer) -> list[Answer]:
    return [leaf for part in answer.parts for leaf in _leaves(part)] if answer.parts else [answer]


def _readable(gold: Answer) -> bool:
    return gold.words or gold.based or gold.number is not None or parsed(gold.latex) is not None


def _copied(prompt: Any, gold: Answer, given: Answer) -> bool:
    """Whether the question states the answer, as one side of a formula, and it is not the gold answer reordered.

    Spelling apart, the characters are compared in any order: ``(1+x)^2`` is a copy of ``(x+1)^2``.
    """
    if sorted(given.latex) == sorted(gold.latex):
        return False
    wanted = sorted(given.latex)
    return any(sorted(side) == wanted for formula in _formulas(prompt) for side in _sides(formula))


def _stated(prompt: Any, gold: Answer, given: Answer) -> bool:
    """Whether the question has the number in just this spelling, when the gold answer has it in quite another one.

    Two decimals are one spelling, and so are fractions of the same digits.
    """
    if gold.number is None or given.number is None or _form(gold) == _form(given):
        return False
    wanted = given.latex + "%" * given.percent
    return any(side.replace("\\%", "%") == wanted for formula in _formulas(prompt) for side in _sides(formula))


def _stated_equation(prompt: Any, given: Answer) -> bool:
    """Whether the question has the whole equation that is given for its last side."""
    return any(normalise(formula).rstrip(".,") == given.equation for formula in _formulas(prompt))


def _form(answer: Answer) -> str:
    if answer.percent:
        return "%"
    return "decimal" if _DECIMAL.fullmatch(answer.latex) else " ".join(re.findall(r"[0-9]+", answer.latex))


def _formulas(prompt: Any) -> list[str]:
    question = (
        prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt if m["role"] == "user")
    )
    formulas = [next(filter(None, groups)) for groups in _MATHEMATICS.findall(question)]
    return formulas or _NO_FORMULA.split(question)


def _sides(formula: str) -> list[str]:
    whole = normalise(formula).rstrip(".,")
    parts = [part for side in _SIDES.split(whole) for one in top_level(side, "=") for part in top_level(one, ",")]
    return [whole, *parts]
