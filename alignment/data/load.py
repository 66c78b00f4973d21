"""The data of a run: every section is read, bad rows and over-long prompts are taken out, and all of it is counted."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from alignment.control import prompt_cue
from alignment.data.demonstrations import Shown, Tokens, encode_demonstrations
from alignment.data.rows import shown
from alignment.data.sides import PAIRED, columns_of, demonstration, pair_of, side_fault, too_long
from alignment.data.sources import describe
from alignment.environments import Environment
from alignment.errors import UserError
from alignment.models import Messages, Model, Tokenizer, encode_prompt, encode_prompts, stop_ids
from alignment.recipe import Recipe, RolloutStage
from alignment.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from alignment.scoring import Scorer

log = logging.getLogger(__name__)

SECTIONS = ("train", "demonstrations", "preferences", "eval", "eval_preferences")
MAX_SKIPPED_SHARE = 0.01
REPORTED_BAD_ROWS = 5


@dataclass(frozen=True)
class Section:
    """A section of ``data`` while it is sorted out: the prompts that can be used so far, and what was left out."""

    name: str
    origin: str
    digest: str
    """SHA-256 of all rows that could be read, in their order."""
    prompts: Sequence[Prompt]
    bad: tuple[str, ...] = ()
    """Rows that cannot be used, each with its place and what is wrong."""
    over_long: int | None = None
    """Prompts left out because they have too many tokens; None before they were counted."""

    @property
    def rows(self) -> int:
        """All that were read."""
        return len(self.prompts) + len(self.bad) + (self.over_long or 0)

    def set_aside(self, faults: Iterable[str | None]) -> "Section":
        """The section without the prompts that have a fault; ``faults`` are in their order."""
        judged = list(zip(self.prompts, faults, strict=True))
        bad = [f"{prompt.origin or prompt.id}: {fault}" for prompt, fault in judged if fault is not None]
        return (
            replace(self, prompts=[p for p, fault in judged if fault is None], bad=(*self.bad, *bad)) if bad else self
        )

    def fitting(self, lengths: Sequence[int], limit: int) -> "Section":
        """The section without prompts of more than ``limit`` tokens; ``lengths`` are in their order.

        Raises:
            UserError: All of them are longer.
        """
        kept = [prompt for prompt, length in zip(self.prompts, lengths, strict=True) if length <= limit]
        if not kept:
            raise UserError(
                f"data.{self.name}: all {len(lengths)} prompts have more than data.max_prompt_tokens ({limit}) tokens; "
                f"the shortest has {min(lengths)}, the longest {max(lengths)}: raise that number"
            )
        return replace(self, prompts=kept, over_long=len(self.prompts) - len(kept))

    def report(self) -> dict[str, Any]:
        """What logs, trackers and ``result.json`` say of it: JSON values."""
        numbers = describe(self.prompts)
        return {
            "origin": self.origin,
            "sha256": self.digest,
            "rows": self.rows,
            "used": len(self.prompts),
            "bad": len(self.bad),
            "bad_rows": list(self.bad[:REPORTED_BAD_ROWS]),
            "over_long": self.over_long,
            "distinct": int(numbers["distinct"]),
            "floor": numbers["floor"],
        }


@dataclass(frozen=True)
class LoadedData:
    """What a run learns from and is measured on."""

    train: Sequence[Prompt] = ()
    held_out: Sequence[Prompt] = ()
    demonstrations: Mapping[str, list[Rollout]] = field(default_factory=dict)
    """By the :attr:`~alignment.types.Prompt.key` of the prompt that they answer."""
    demonstrated: Mapping[str, Prompt] = field(default_factory=dict)
    """The row of each demonstration, by its id."""
    preferences: Sequence[Group] = ()
    """Pairs, the preferred completion first; and single completions, with a label."""
    held_out_preferences: Sequence[Group] = ()
    report: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """:meth:`Section.report` of each section."""
    longest: Mapping[str, int] = field(default_factory=dict)
    """Tokens of the longest prompt of each section whose prompts are played, with a control token behind it."""

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each section's rows: what must be equal for a run to continue."""
        return {name: section["sha256"] for name, section in self.report.items()}


def load_data(recipe: Recipe, model: Model, scorer: "Scorer") -> LoadedData:
    """Everything under ``data``, checked: what would stop the run later is found now.

    A row is bad when its source, the tokenizer or its chat template, or a reward cannot use it; ``data.on_bad_row``
    says what then happens. Prompts with more than ``data.max_prompt_tokens`` tokens are left out and counted.

    Raises:
        UserError: A section cannot be read, has bad rows that may not be skipped, or nothing is left of it; or a
            reward needs a column that the rows lack.
    """
    sections: dict[str, Section] = {}
    demonstrations: dict[str, list[Rollout]] = {}
    pairs: dict[str, list[Group]] = {}
    longest: dict[str, int] = {}
    stops, cue = stop_ids(model.tokenizer, model.module), prompt_cue(model.tokenizer, model.module)
    for name in SECTIONS:
        section = read_section(recipe, name)
        if section is None:
            continue
        if name in ("train", "eval"):
            section = section.set_aside(_missing_columns(section.prompts, scorer))
            section = section.set_aside(scorer.faults(section.prompts))
        section, tokens, opened = _encoded(section, played(recipe, name), model.tokenizer)
        section, sides = _sides(section, tokens, opened, model.tokenizer, stops)
        section = section.set_aside(too_long(p, sides, recipe.data.max_completion_tokens) for p in section.prompts)
        section = accepted(section, recipe.data.on_bad_row)
        if tokens:
            section = section.fitting([len(tokens[p.id]) for p in section.prompts], recipe.data.max_prompt_tokens)
            longest[name] = max(len(tokens[p.id]) for p in section.prompts) + len(cue)
        for prompt in section.prompts if name == "demonstrations" else ():
            rollout = demonstration(prompt, tokens[prompt.id] + cue, sides["completion"][prompt.id])
            demonstrations.setdefault(prompt.key, []).append(rollout)
        if name.endswith("preferences"):
            pairs[name] = [
                pair_of(i, prompt, tokens[prompt.id] + cue, sides) for i, prompt in enumerate(section.prompts)
            ]
        sections[name] = section
        _say(section)
    prompts = {name: section.prompts for name, section in sections.items()}
    return LoadedData(
        train=prompts.get("train", ()),
        held_out=prompts.get("eval", ()),
        demonstrations=demonstrations,
        demonstrated={prompt.id: prompt for prompt in prompts.get("demonstrations", ())},
        preferences=pairs.get("preferences", ()),
        held_out_preferences=pairs.get("eval_preferences", ()),
        report={name: section.report() for name, section in sections.items()},
        longest=longest,
    )


def longest_prompt(section: Section, recipe: Recipe, tokenizer: Tokenizer) -> int | None:
    """Tokens of the longest prompt of ``section`` that a run would use; None where none can be played.

    Raises:
        UserError: All prompts are too long, or the tokenizer has no chat template for messages.
    """
    section, tokens, _ = _encoded(section, played(recipe, section.name), tokenizer)
    if not tokens or not section.prompts:
        return None
    section = section.fitting([len(tokens[p.id]) for p in section.prompts], recipe.data.max_prompt_tokens)
    return max(len(tokens[p.id]) for p in section.prompts)


def read_section(recipe: Recipe, name: str) -> Section | None:
    """What the source of ``data.<name>`` gives, rows without a column that the section needs set aside; None without
    a source.

    Raises:
        UserError: It cannot be read, or no row can be used.
    """
    source = getattr(recipe.data, name)
    if source is None:
        return None
    try:
        dataset = source.load(recipe.folder)
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from error
    assert len({prompt.id for prompt in dataset.prompts}) == len(dataset.prompts), f"data.{name}: ids of prompts repeat"
    digest = hashlib.sha256()
    for prompt in dataset.prompts:
        digest.update(json.dumps(prompt.row, sort_keys=True, default=str).encode() + b"\n")
    section = Section(name, dataset.origin, digest.hexdigest(), dataset.prompts, tuple(dataset.bad))
    missing = [[column for column in columns_of(name, p.row) if column not in p.row] for p in dataset.prompts]
    section = section.set_aside(f"has no {', '.join(map(repr, columns))}" if columns else None for columns in missing)
    if not section.prompts:
        raise UserError(
            f"data.{name}: no row has {' and '.join(map(repr, columns_of(name, {})))}; the columns of the first are "
            f"{', '.join(dataset.prompts[0].row)}: name the right ones in field_map"
        )
    return section


def played(recipe: Recipe, name: str) -> list[Environment]:
    """The environments that open with the prompts of ``data.<name>``."""
    if name == "train":
        return [stage.environment for stage in recipe.stages if isinstance(stage, RolloutStage) and stage.samples]
    return [recipe.evaluation_environment]


def accepted(section: Section, on_bad_row: str) -> Section:
    """The section, if it may be used.

    Raises:
        UserError: It has bad rows, and they may not be skipped or are more than 1 % of its rows.
    """
    bad, rows = len(section.bad), section.rows
    if not bad or on_bad_row == "skip" and section.prompts and bad / rows <= MAX_SKIPPED_SHARE:
        return section
    if on_bad_row == "skip":
        remedy = f"more than the {MAX_SKIPPED_SHARE:.0%} that data.on_bad_row: skip leaves out; mend or remove them"
    else:
        remedy = f"mend or remove them, or set data.on_bad_row: skip (for at most {MAX_SKIPPED_SHARE:.0%} of the rows)"
    raise UserError(f"data.{section.name}: {bad} of {rows} rows cannot be used; {remedy}:\n{shown(section.bad)}")


def _missing_columns(prompts: Sequence[Prompt], scorer: "Scorer") -> list[str | None]:
    """What rewards need and single rows lack.

    Raises:
        UserError: All rows lack it.
    """
    scorer.check(set().union(*(prompt.row for prompt in prompts)))
    verdicts: dict[frozenset[str], str | None] = {}
    for columns in {frozenset(prompt.row) for prompt in prompts}:
        try:
            scorer.check(columns, "the row")
            verdicts[columns] = None
        except UserError as error:
            verdicts[columns] = str(error)
    return [verdicts[frozenset(prompt.row)] for prompt in prompts]


def _encoded(
    section: Section, environments: Sequence[Environment], tokenizer: Tokenizer
) -> tuple[Section, dict[str, Tokens], dict[str, str | Messages]]:
    """The tokens of prompts in the environment that shows the most, and what the last one shows, by prompt id.

    Rows that cannot be encoded are set aside. Without environments there are no tokens.
    """
    longest: dict[str, Tokens] = {}
    last: dict[str, str | Messages] = {}
    known: list[Any] = []
    for environment in environments:
        opened = [environment.reset(prompt.row)[1] for prompt in section.prompts]
        if opened in known:  # as a rule all environments show the same
            continue
        known.append(opened)
        last = {prompt.id: text for prompt, text in zip(section.prompts, opened, strict=True)}
        section, tokens = _with_tokens(section, opened, tokenizer)
        longest = {name: max(longest.get(name, ()), ids, key=len) for name, ids in tokens.items()}
    return section, longest, last


def _sides(
    section: Section,
    tokens: Mapping[str, Tokens],
    opened: Mapping[str, str | Messages],
    tokenizer: Tokenizer,
    stops: Sequence[int],
) -> tuple[Section, dict[str, dict[str, Shown]]]:
    """What somebody wrote after the prompts, by column and prompt id; rows that cannot be encoded are set aside."""
    sides: dict[str, dict[str, Shown]] = {}
    judged = section.name.endswith("preferences")
    for column in dict.fromkeys(column for p in section.prompts for column in columns_of(section.name, p.row)):
        having = [p for p in section.prompts if column in columns_of(section.name, p.row)]
        faults = {p.id: side_fault(p, column, judged) for p in having}
        having = [p for p in having if faults[p.id] is None]
        found = encode_demonstrations([(opened[p.id], tokens[p.id], p.row[column]) for p in having], tokenizer, stops)
        said = {p.id: each for p, each in zip(having, found, strict=True)}
        sides[column] = {name: each for name, each in said.items() if isinstance(each, Shown)}
        faults |= {name: each for name, each in said.items() if isinstance(each, str)}
        section = section.set_aside(faults.get(p.id) for p in section.prompts)
    if judged:
        chosen, rejected = (sides.get(column, {}) for column in PAIRED)
        same = (p.id in chosen and chosen[p.id].token_ids == rejected[p.id].token_ids for p in section.prompts)
        section = section.set_aside("'chosen' and 'rejected' are the same tokens" if equal else None for equal in same)
    return section, sides


def _with_tokens(
    section: Section, texts: Sequence[str | Messages], tokenizer: Tokenizer
) -> tuple[Section, dict[str, Tokens]]:
    """The tokens of ``texts``, one for each prompt, by the prompt's id; prompts that have none are set aside."""
    try:
        found: list[Tokens | None] = [*encode_prompts(tokenizer, texts)]
        faults: list[str | None] = [None] * len(found)
    except UserError as error:
        if not tokenizer.chat_template and not all(isinstance(text, str) for text in texts):
            raise UserError(f"data.{section.name}: {error}") from error
        found, faults = [], []
        for text in texts:
            ids, fault = _attempt(tokenizer, text)
            found.append(ids)
            faults.append(fault)
    tokens = {p.id: ids for p, ids in zip(section.prompts, found, strict=True) if ids is not None}
    return section.set_aside(faults), tokens


def _attempt(tokenizer: Tokenizer, text: str | Messages) -> tuple[Tokens | None, str | None]:
    try:
        return encode_prompt(tokenizer, text), None
    except UserError as error:
        return None, str(error)


def _say(section: Section) -> None:
    """Logs what was read; as a warning if anything was left out."""
    parts = [f"{section.rows:,} rows from {section.origin}, {len(section.prompts):,} used"]
    if section.bad:
        parts.append(f"{len(section.bad):,} bad rows skipped, the first: {section.bad[0]}")
    if section.over_long:
        parts.append(f"{section.over_long:,} prompts longer than data.max_prompt_tokens left out")
    log.log(logging.WARNING if len(parts) > 1 else logging.INFO, "data.%s: %s", section.name, "; ".join(parts))
