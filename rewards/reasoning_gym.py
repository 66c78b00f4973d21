"""The scorers of reasoning-gym as a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from alignment.data.reasoning_gym_tasks import make, quietly, refusal
from alignment.errors import UserError
from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.score import Score


@reward_functions.register("reasoning_gym", source="reasoning-gym (arXiv 2505.24760)")
@dataclass(frozen=True)
class ReasoningGym:
    """1 when reasoning-gym's scorer gives full marks to the completion, 0 otherwise: its partial marks count nothing.

    For rows of the source ``reasoning_gym``; needs the extra of that name. White space around an answer does not count.
    """

    answer_in: Annotated[
        Literal["text", "tags"], option("text: all of the completion; tags: its last <answer>...</answer>")
    ] = "text"
    columns = ("entry", "task")

    def prepare(self) -> None:
        """Imports reasoning-gym, which takes about a second."""
        make("chain_sum", {})

    def check(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """What makes a row useless to it: it is not one of the source ``reasoning_gym``, or gets its answer wrong."""
        return [self._fault(row) for row in rows]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """One score per completion; ``unparseable`` without an answer, ``error`` where the scorer itself failed."""
        given = zip(texts(completions), columns["task"], columns["entry"], strict=True)
        return [self._score(text, task, entry) for text, task, entry in given]

    def _fault(self, row: Mapping[str, Any]) -> str | None:
        task, entry = row.get("task"), row.get("entry")
        reason = refusal(task)
        if reason is not None:
            return reason
        if not isinstance(entry, Mapping) or not {"question", "answer", "metadata"} <= set(entry):
            return "'entry' must hold reasoning-gym's question, answer and metadata; use the source reasoning_gym"
        try:
            gold = _mark(str(entry["answer"]), str(task), entry)
        except UserError as error:
            return str(error)
        return None if gold == 1.0 else f"its own answer {str(entry['answer'])[:80]!r} gets {gold}, not 1"

    def _score(self, text: str, task: str, entry: Mapping[str, Any]) -> Score:
        answer = _answer(text) if self.answer_in == "tags" else text.strip()
        if not answer:
            return Score(0.0, "unparseable", "no answer")
        mark = _mark(answer, task, entry)
        if isinstance(mark, str):
            return Score(None, "error", mark, answer)
        return Score(1.0, answer=answer) if mark == 1.0 else Score(0.0, "wrong", answer=answer)


def _answer(text: str) -> str | None:
    opened = text.rpartition("<answer>")[2] if "<answer>" in text else ""
    return opened.partition("</answer>")[0].strip() if "</answer>" in opened else None


def _mark(answer: str, task: str, entry: Mapping[str, Any]) -> float | str:
    """The scorer's mark, or what it failed with."""
    scorer = make(task, entry.get("config") or {})
    try:
        with quietly():
            return float(scorer.score_answer(answer, dict(entry)))
    except Exception as error:  # another package's code on text that a model wrote
        return f"the scorer of {task} failed: {type(error).__name__}: {error}"
