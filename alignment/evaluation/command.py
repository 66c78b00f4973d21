"""What is between the command ``align eval`` and the evaluation: its arguments, and what is printed."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from alignment.console import show_warnings
from alignment.errors import UserError
from alignment.evaluation.compare import compare_folders
from alignment.evaluation.data import ChatMode, Selection
from alignment.evaluation.decoding import choose_decoding
from alignment.evaluation.model import Dtype
from alignment.evaluation.run import Options, evaluate_checkpoint
from alignment.evaluation.view import Progress, comparison_table, notes, results_table, show
from alignment.recipe_tree import Mark, Node, Problem, RecipeError, merge, plain
from alignment.recipe_yaml import parse_override


def selection(chat: str, limit: int | None, max_prompt_tokens: int | None) -> Selection:
    """Which problems, and in which form.

    Raises:
        UserError: ``chat`` is not what it may be.
    """
    _one_of("--chat", chat, get_args(ChatMode))
    return Selection(chat, limit, max_prompt_tokens)  # pyright: ignore[reportArgumentType] - checked above


def options(
    checkpoint: str | None,
    tasks: str,
    data: Sequence[str],
    samples: int | None,
    temperature: float | None,
    max_tokens: int | None,
    selection: Selection,
    dtype: str | None,
) -> Options:
    """The options that the command's arguments mean.

    Raises:
        UserError: One is missing, or is not what it may be.
    """
    if checkpoint is None:
        raise UserError("give a checkpoint: a model folder, a hub id or RUN[@STEP|@best]; or --compare A B")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("say what to measure: --tasks gsm8k,gcd (`align list benchmarks` and `align list tasks`)")
    files = dict(_pair(text) for text in data)
    if len(files) < len(data):
        raise UserError("--data names a benchmark twice")
    if dtype is not None:
        _one_of("--dtype", dtype, get_args(Dtype))
    return Options(checkpoint, names, files, samples, temperature, max_tokens, selection, dtype=dtype)  # pyright: ignore[reportArgumentType]


def settings(texts: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What ``--set NAME.OPTION=VALUE`` says, by benchmark, or ``decoding``; values are YAML, later ones win.

    Raises:
        UserError: One has another form, or its value is not YAML.
    """
    problems: list[Problem] = []
    root = Node({}, Mark("--set", None, Path.cwd()))
    for text in texts:
        node = parse_override(text, problems)
        (inner,) = node.value.values()
        if not isinstance(inner.value, dict) or not inner.value:
            raise UserError(f"--set {text}: write NAME.OPTION=VALUE, such as gsm8k.samples=4")
        root = merge(root, node)
    if problems:
        raise RecipeError(problems)
    return plain(root)


def decoded(options: Options, given: str | None) -> Options:
    """``options`` with the decoding that ``--decoding`` names, and its options taken out of the benchmarks'.

    Args:
        options: What ``--set`` said is in them.
        given: A name, or a mapping as YAML.

    Raises:
        UserError: It is no decoding, or an option of it is wrong.
    """
    settings = dict(options.settings)
    own = settings.pop("decoding", {})
    value: Any = None if given is None else plain(parse_override(f"decoding={given}", []))["decoding"]
    if given is not None and not isinstance(value, str | Mapping):
        raise UserError(f"--decoding {given}: give a name, or a mapping such as {{name: value_augmented, models: DIR}}")
    return replace(options, settings=settings, decoding=choose_decoding(value, own))


def evaluate(options: Options, as_json: bool) -> int:
    """Evaluates and prints the scores; progress goes to standard error. Returns the exit code."""
    errors = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        show_warnings(errors, stack)
        results = evaluate_checkpoint(options, Progress(errors))
    code, folder = results.pop("exit_code"), results.pop("folder")
    if as_json:
        _print_json(results)
    elif results["tasks"]:
        show(results_table(results), notes(results), Console(highlight=False))
    if code:
        errors.print(
            f"stopped; finished problems are in {folder}, and the same command goes on", markup=False, soft_wrap=True
        )
    else:
        errors.print(f"wrote {folder}", markup=False, soft_wrap=True)
    return code


def compare(folders: tuple[Path, Path], as_json: bool, given: str | None) -> None:
    """Compares two evaluations and prints what came out.

    Raises:
        UserError: A checkpoint was given as well, or the two cannot be compared.
    """
    if given is not None:
        raise UserError(f"--compare takes two folders of earlier evaluations and no checkpoint; leave {given} out")
    found = compare_folders(*folders)
    if as_json:
        _print_json(found)
        return
    console = Console(highlight=False)
    for side in "ab":
        decoding = "" if found[side]["decoding"] == "plain" else f", decoded by {found[side]['decoding']},"
        told = f"{side.upper()}: {found[side]['checkpoint']}{decoding} in {found[side]['folder']}"
        console.print(told, markup=False, soft_wrap=True)
    show(comparison_table(found), found["notes"], console)


def _pair(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise UserError(f"--data {text}: write NAME=FILE, such as gsm8k=data/gsm8k_test.jsonl")
    return name, file


def _one_of(what: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise UserError(f"{what} {given}: give one of {', '.join(allowed)}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
