r"""Where the answer stands in a completion, and in the gold column of a data set. Linear in the length of the text."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from rewards.matching import last_number

AnswerIn = Literal["box", "box_or_number"]
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<answer>((?:(?!</?answer>).){0,1000})</answer>", re.DOTALL)
_MARKS = "*_`\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
"""Of Markdown, and quotes."""
_PHRASE = re.compile(rf"answer[{_MARKS}]{{0,3}}(?: is|:)[ \t{_MARKS}]{{0,8}}:?[ \t]*", re.IGNORECASE)
_SENTENCE_END = re.compile(rf"\n|\.(?=[{_MARKS}]*(?:\s|$))|$")
_BARE_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_WORDS_MAX = 4
"""A longer sentence after "the answer is" is no answer: the last number in it may be."""


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` or ``\fbox{...}``; None without one, or when the last is not closed.

    Braces may nest; ``\{`` and ``\}`` do not count. Of nested boxes the innermost of the last is taken. A number needs
    no braces: ``\boxed 5``.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opening = _BOX.match(text, start) if start >= 0 else None
    if opening is None:
        return None
    if not text.startswith("{", opening.end()):  # \boxed 5
        bare = _BARE_NUMBER.match(text, opening.end())
        return bare[0] if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[opening.end() + 1 : brace.start()]
    return None


def has_box(text: str) -> bool:
    """Whether a box begins anywhere, closed or not."""
    return "\\boxed" in text or "\\fbox" in text


def given_answer(completion: str, answer_in: AnswerIn) -> str | None:
    r"""The text of a completion's answer, or None.

    ``box``: the last box. ``box_or_number``: the same if there is any box; else what follows the last ``####``, the
    last ``<answer>...</answer>``, what follows the last "answer is" or "answer:" up to the end of that sentence, and
    last of all the last number.
    """
    if has_box(completion) or answer_in == "box":
        return last_box(completion)
    if "####" in completion:
        return _unmarked(completion.rpartition("####")[2].strip().partition("\n")[0]) or None
    if tags := _TAG.findall(completion):
        return _unmarked(tags[-1]) or None
    phrases = list(_PHRASE.finditer(completion))
    if phrases:
        start = phrases[-1].end()
        end = _SENTENCE_END.search(completion, start)
        sentence = _unmarked(completion[start : end.start() if end else None])
        if sentence and len(sentence.split()) <= _WORDS_MAX:
            return sentence
        completion = sentence or completion
    number = last_number(completion)
    return None if number is None else str(number)


def _unmarked(text: str) -> str:
    """``text`` without Markdown and quotes around it."""
    return text.strip().strip(_MARKS).strip()


def gold_texts(value: Any) -> tuple[str, ...]:
    r"""The texts of the gold answers in a data set's column; empty when there is none.

    A text that has ``####`` is read after the last of them (GSM8K), one that has a box is read inside its last one (a
    worked solution), any other is the answer. A number stands for itself. A list holds several answers, all wanted.
    """
    if isinstance(value, str):
        if "####" in value:
            value = value.rpartition("####")[2]
        elif has_box(value):
            value = last_box(value) or ""
        return (value.strip(),) if value.strip() else ()
    if isinstance(value, Sequence):
        found = [gold_texts(each) for each in value]
        return tuple(text for texts in found for text in texts) if all(found) else ()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (str(value),)
    return ()
