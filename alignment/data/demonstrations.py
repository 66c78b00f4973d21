"""What follows a prompt, as tokens: an answer that is text, or messages of which each of the assistant's is learned.

What of a rendered dialogue the assistant wrote is for its chat template to say. Where it does, by the markers
``{% generation %}``, or where TRL knows a template of the same kind that does
(``trl.chat_template_utils.get_training_chat_template``), transformers gives the mask. Otherwise the dialogue is
rendered again and again up to each turn, and a turn is what came to it; that is right only where a longer dialogue
begins with the very tokens of a shorter one, which is checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.errors import UserError
from alignment.models import Messages, Tokenizer, encode_prompt, encode_prompts

Tokens = tuple[int, ...]
Turn = tuple[str, int, int]


@dataclass(frozen=True)
class Shown:
    """What follows a prompt."""

    token_ids: Tokens
    loss_mask: tuple[bool, ...]
    """True for what the assistant says, and for the token that ends its turn."""
    turns: tuple[Turn, ...]
    """``(role, start, end)``, as in :class:`alignment.types.Rollout`."""
    text: str
    """Its only or last answer."""


def encode_demonstrations(
    rows: Sequence[tuple[str | Messages, Tokens, str | Messages]], tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> list[Shown | str]:
    """What each row shows, or why it cannot be encoded.

    Args:
        rows: A prompt, its tokens, and the completion.
        tokenizer: Of the model.
        stop_ids: Tokens that end a completion, the end of sequence first.
    """
    dialogues = None if all(isinstance(said, str) for *_, said in rows) else Dialogues(tokenizer, stop_ids)
    texts = [said for *_, said in rows if isinstance(said, str)]
    try:
        encoded: Iterator[Tokens | None] = iter(encode_prompts(tokenizer, texts))
    except UserError:  # which one it was is found below
        encoded = iter([None] * len(texts))
    return [
        _shown(*row, next(encoded) if isinstance(row[2], str) else None, dialogues, tokenizer, stop_ids) for row in rows
    ]


def _shown(
    opening: str | Messages,
    prompt_ids: Tokens,
    said: str | Messages,
    ids: Tokens | None,
    dialogues: "Dialogues | None",
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
) -> Shown | str:
    try:
        if isinstance(said, str):
            return _answered(said, encode_prompt(tokenizer, said) if ids is None else ids, stop_ids[0])
        assert dialogues is not None and not isinstance(opening, str), "a source refuses messages after text"
        return dialogues.encode(opening, said, prompt_ids)
    except UserError as error:
        return str(error)


def _answered(text: str, token_ids: Tokens, eos_id: int) -> Shown:
    """A single answer and an end-of-sequence token."""
    ids = (*token_ids, eos_id)
    return Shown(ids, (True,) * len(ids), (("assistant", 0, len(ids)),), text)


class Dialogues:
    """Encodes dialogues with one tokenizer.

    Args:
        tokenizer: With a chat template.
        stop_ids: Tokens that end a turn; the first is put where the template ends the last turn with none.

    Raises:
        UserError: There is no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        if not tokenizer.chat_template:
            raise UserError("a dialogue needs a chat template: put a chat_template.jinja beside the tokenizer")
        self.tokenizer, self.stop_ids = tokenizer, tuple(stop_ids)
        self.template = _template(tokenizer)
        """With markers; None where there is none."""

    def encode(self, opening: Messages, rest: Messages, prompt_ids: Tokens) -> Shown:
        """What follows ``opening``, whose tokens are ``prompt_ids``, in the dialogue that goes on with ``rest``.

        A turn of the assistant is learned with the token that ends it, without what the template puts behind that and
        without what it puts before an answer that is sampled. What follows the last turn is left out.

        Raises:
            UserError: The template refuses the dialogue, marks nothing in it, or renders its beginning otherwise than
                without the rest.
        """
        whole = [*opening, *rest]
        ids, mask = self._marked(whole) if self.template is not None else self._by_prefixes(whole, len(opening))
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                "the chat template renders the prompt otherwise when the dialogue goes on, so what is learned would not"
                " follow what is sampled from; give the dialogue as single turns, a 'prompt' and a text 'completion'"
            )
        mask[: len(prompt_ids)] = [False] * len(prompt_ids)
        cue = prompt_ids[len(self._render(opening)) :]
        said = [(_after_cue(ids, start, cue), end) for start, end in _runs(mask)]
        if not said:
            raise UserError("the chat template marks nothing as the assistant's; mend its {% generation %} markers")
        at = len(prompt_ids)
        ids, spans = self._ended(ids[at:], [(start - at, end - at) for start, end in said])
        learned = [any(start <= i < end for start, end in spans) for i in range(len(ids))]
        return Shown(ids, tuple(learned), tuple(_turns(spans)), str(rest[-1]["content"]))

    def _ended(self, ids: Tokens, said: Sequence[tuple[int, int]]) -> tuple[Tokens, list[tuple[int, int]]]:
        """Tokens up to the last turn's end, and turns with the token that ends them and nothing behind it."""
        spans = []
        for start, end in said:
            last = next((i for i in reversed(range(start, end)) if ids[i] in self.stop_ids), None)
            behind = end < len(ids) and ids[end] in self.stop_ids
            spans.append((start, last + 1 if last is not None else end + behind))
        start, end = spans[-1]
        if ids[end - 1] not in self.stop_ids:
            ids, spans[-1] = (*ids[:end], self.stop_ids[0]), (start, end + 1)
        return ids[: spans[-1][1]], spans

    def _marked(self, whole: Messages) -> tuple[Tokens, list[bool]]:
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": self.template}
        found = self._render(whole, **options)
        return tuple(found["input_ids"]), [bool(marked) for marked in found["assistant_masks"]]

    def _by_prefixes(self, whole: Messages, opening: int) -> tuple[Tokens, list[bool]]:
        ids = tuple(self._render(whole))
        mask = [False] * len(ids)
        for i, message in enumerate(whole):
            if i < opening or message["role"] != "assistant":
                continue
            before, after = self._render(whole[:i], add_generation_prompt=True), self._render(whole[: i + 1])
            if after[: len(before)] != before or list(ids[: len(after)]) != after:
                raise UserError(
                    f"what the assistant says in message {i} cannot be told from the rest: the chat template has no"
                    " {% generation %} markers, TRL knows no such template, and this one renders a message otherwise"
                    " when others follow; add the markers to the template, or give the dialogue as single turns, a"
                    " 'prompt' and a text 'completion'"
                )
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
        return ids, mask

    def _render(self, messages: Messages, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **{"return_dict": False, **options})
        except Exception as error:  # templates raise errors of their template engine, and Python's
            raise UserError(f"the tokenizer's chat template cannot render the dialogue: {error}") from error


def _template(tokenizer: Any) -> str | None:
    """A chat template of this tokenizer's kind that marks the assistant's turns; None if there is none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.get_chat_template()
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of each run of true values."""
    start = None
    for i, marked in enumerate([*mask, False]):
        if marked and start is None:
            start = i
        elif not marked and start is not None:
            yield start, i
            start = None


def _after_cue(ids: Tokens, start: int, cue: Tokens) -> int:
    """Where a turn begins behind the tokens that ask for it, which some templates mark in part."""
    overlaps = (n for n in range(len(cue), 0, -1) if ids[max(0, start + n - len(cue)) : start + n] == cue)
    return start + next(overlaps, 0)


def _turns(spans: Sequence[tuple[int, int]]) -> Iterator[Turn]:
    at = 0
    for start, end in spans:
        if at < start:
            yield ("observation", at, start)
        yield ("assistant", start, end)
        at = end
