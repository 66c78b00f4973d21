"""The problems of a benchmark as they are put to a model: picked, checked, as chat messages or text, none too long."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from alignment.data.rows import shown
from alignment.data.sources import Dataset, describe
from alignment.durable import digest
from alignment.errors import UserError
from alignment.evaluation.benchmarks import Chosen
from alignment.models import Tokenizer, encode_prompts
from alignment.scoring import Scorer
from alignment.types import Prompt, keyed_seed

log = logging.getLogger(__name__)
ChatMode = Literal["auto", "yes", "no"]
MAX_BAD_SHARE = 0.01


@dataclass(frozen=True)
class Prepared:
    """What is sampled and scored of one benchmark."""

    chosen: Chosen
    prompts: tuple[Prompt, ...]
    """``id`` names the problem by its content, so that evaluations of other checkpoints know it again."""
    chat: bool
    """Whether prompts are chat messages."""
    longest: int
    """Tokens of the longest prompt."""
    data: Mapping[str, Any]
    """JSON values: ``origin``, ``sha256`` of the problems, ``problems``, ``left_out``, ``distinct`` and ``floor``."""

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds of it."""
        return {**self.chosen.resolved(), "chat": self.chat, "data": dict(self.data)}


@dataclass(frozen=True)
class Selection:
    """Which problems of a benchmark are taken, and in which form."""

    chat: ChatMode = "auto"
    """``auto``: as messages if the benchmark is for chat and the tokenizer has a chat template."""
    limit: int | None = None
    """At most so many problems; None: all."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out and counted; None: there may be none that do not fit."""


def prepare(
    chosen: Chosen, dataset: Dataset, scorer: Scorer, tokenizer: Tokenizer, positions: int | None, selection: Selection
) -> Prepared:
    """Checks the problems and gives them the form in which the model gets them.

    Args:
        chosen: The benchmark.
        dataset: Its problems.
        scorer: Of the benchmark's reward: it knows which rows it cannot judge.
        tokenizer: Of the model.
        positions: Longest sequence of the model, in tokens; None: no limit.
        selection: Which problems, and how.

    Raises:
        UserError: Rows cannot be judged (more than 1 % of them), nothing is left, messages without a chat template, or
            prompts and completions that do not fit into the model.
    """
    sound, bad = _judgeable(chosen.name, dataset, scorer)
    prompts = limited(named(sound), selection.limit)
    as_chat = _wants_chat(chosen, selection.chat, tokenizer)
    played = [replace(p, row={**p.row, "prompt": _messages(p.row["prompt"])}) if as_chat else p for p in prompts]
    try:
        lengths = [len(ids) for ids in encode_prompts(tokenizer, [p.row["prompt"] for p in played])]
    except UserError as error:
        raise UserError(f"{chosen.name}: {error}") from error
    keep = [i for i, n in enumerate(lengths) if n <= (selection.max_prompt_tokens or n)]
    if not keep:
        limit = selection.max_prompt_tokens
        raise UserError(f"{chosen.name}: all prompts have more than the {limit} tokens of --max-prompt-tokens")
    over_long = len(played) - len(keep)
    if over_long:
        limit = selection.max_prompt_tokens
        log.warning(
            "%s: %d of %d prompts, of more than %s tokens, are left out", chosen.name, over_long, len(played), limit
        )
    lengths = [lengths[i] for i in keep]
    _refuse_too_long(chosen, lengths, positions)
    bare = [prompts[i] for i in keep]
    numbers = describe(bare)
    data = {
        "origin": dataset.origin,
        "sha256": digest([[p.id, dict(p.row)] for p in bare]),
        "problems": len(bare),
        "left_out": {"bad_rows": len(bad), "over_long": over_long},
        "distinct": numbers["distinct"],
        "floor": numbers["floor"],
    }
    return Prepared(chosen, tuple(played[i] for i in keep), as_chat, max(lengths), data)


def named(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with ids that depend on what they say alone; the second of equal ones gets ``-1``."""
    seen: dict[str, int] = {}
    found: list[Prompt] = []
    for prompt in prompts:
        copy = seen[prompt.key] = seen.get(prompt.key, -1) + 1
        found.append(replace(prompt, id=f"{prompt.key}-{copy}" if copy else prompt.key))
    return found


def limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` of them, in their order.

    Which ones depends on their ids, neither on their order nor on the others: a larger limit adds to a smaller one.
    """
    ranked = sorted(prompts, key=lambda p: keyed_seed("limit", p.id))
    taken = {p.id for p in ranked[:limit]}
    return [p for p in prompts if p.id in taken]


def _judgeable(name: str, dataset: Dataset, scorer: Scorer) -> tuple[list[Prompt], list[str]]:
    """The prompts that the reward can judge, and the rows that are left out, each with its fault."""
    scorer.check(set.intersection(*(set(p.row) for p in dataset.prompts)) if dataset.prompts else ())
    faults = scorer.faults(dataset.prompts)
    bad = [*dataset.bad, *(f"{p.origin or p.id}: {f}" for p, f in zip(dataset.prompts, faults, strict=True) if f)]
    prompts = [p for p, fault in zip(dataset.prompts, faults, strict=True) if not fault]
    rows = len(dataset.prompts) + len(dataset.bad)
    if not prompts or len(bad) > MAX_BAD_SHARE * rows:
        raise UserError(
            f"{name}: {len(bad)} of {rows} rows of {dataset.origin} cannot be used, at most {MAX_BAD_SHARE:.0%} may be "
            f"left out:\n{shown(bad)}"
        )
    if bad:
        log.warning("%s: %d of %d rows are left out:\n%s", name, len(bad), rows, shown(bad))
    return prompts, bad


def _wants_chat(chosen: Chosen, chat: ChatMode, tokenizer: Tokenizer) -> bool:
    if chat == "yes" and not tokenizer.chat_template:
        raise UserError(
            f"{chosen.name}: --chat yes, but the tokenizer has no chat template; use --chat no, or put a "
            f"chat_template.jinja beside the tokenizer"
        )
    return chat == "yes" or (chat == "auto" and chosen.chat and bool(tokenizer.chat_template))


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _refuse_too_long(chosen: Chosen, lengths: Sequence[int], positions: int | None) -> None:
    room, longest = chosen.sampling.max_tokens, max(lengths)
    if positions is None or longest + room <= positions:
        return
    over = sum(n + room > positions for n in lengths)
    remedies = []
    if longest < positions:
        remedies.append(f"--max-tokens {positions - longest}, which fits the longest prompt ({longest} tokens)")
    if room < positions:
        remedies.append(f"--max-prompt-tokens {positions - room}, which leaves {over} of {len(lengths)} problems out")
    raise UserError(
        f"{chosen.name}: {over} of {len(lengths)} prompts and max_tokens {room} together exceed the model's "
        f"{positions} positions; give {' or '.join(remedies) or f'--max-tokens below {positions}'}"
    )
