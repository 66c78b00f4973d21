"""The tasks of reasoning-gym that can be trained on, and why the others cannot.

Everything here was measured with reasoning-gym 0.1.25. Nothing is imported from it before a task is made, and no torch:
scoring workers import this module.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from alignment.errors import UserError

EXCLUDED: dict[str, tuple[str, ...]] = {
    "its scorer runs the completion as Python": (
        *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
        *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
    ),
    "its scorer runs text of the row as Python": ("bitwise_arithmetic", "number_sorting"),
    "its problems are not the same in every process": (
        *("codeio", "isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"),
    ),
    "its problems depend on how many are asked for": ("acre",),
    "it has no answer to learn from": ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"),
    "its scorer gives full marks to any text": ("game_of_life_halting",),
    "its scorer gives full marks to 'nan'": ("complex_arithmetic",),
    "its scorer skips what it cannot read: two numbers may be as right as one": ("polynomial_equations",),
    "its scorer reads the first number of any text, so that a copied question may be right": ("gsm_symbolic",),
    "its scorer ignores what are no moves, so that any text around them is right": ("sokoban",),
    "its scorer gives full marks to 0 for most questions, and never returns from 1e999999999": ("coin_flip",),
    "its scorer raises errors on junk": ("game_of_life", "prime_factorization"),
    "it makes about ten problems a second or fewer": ("futoshiki", "zebra_puzzles"),
    "its scorer needs a tuple where rows, which are JSON, have a list": ("arc_agi", "rearc"),
    "making a problem seeds numpy's global generator": ("pool_matrix",),
    "it is a mixture; name its tasks in sources of their own": ("composite",),
}
"""Why a task is left out: the tasks."""

ALLOWED: tuple[str, ...] = (
    *("ab", "advanced_geometry", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation"),
    *("caesar_cipher", "calendar_arithmetic", "chain_sum", "circuit_logic", "color_cube_rotation", "count_bits"),
    *("count_primes", "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum", "dice"),
    *("emoji_mystery", "family_relationships", "figlet_font", "fraction_simplification", "gcd", "group_anagrams"),
    *("jugs", "kakurasu", "knights_knaves", "largest_island", "lcm", "leg_counting", "letter_counting"),
    *("letter_jumble", "mahjong_puzzle", "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "needle_haystack"),
    *("number_filtering", "number_format", "number_sequence", "palindrome_generation", "palindrome_partitioning"),
    *("path_star", "power_function", "products", "quantum_lock", "rectangle_count", "rotate_matrix", "rotten_oranges"),
    *("self_reference", "sentence_reordering", "shortest_path", "simple_equations", "simple_geometry"),
    *("spell_backward", "string_manipulation", "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism"),
    *("time_intervals", "tower_of_hanoi", "tsumego", "word_sequence_reversal", "word_sorting"),
)
"""Tasks whose problems are the same everywhere and whose scorer neither runs what it judges nor can be talked round."""


def refusal(task: Any) -> str | None:
    """Why ``task`` cannot be used, or None."""
    if task in ALLOWED:
        return None
    for reason, names in EXCLUDED.items():
        if task in names:
            return f"reasoning-gym's task {task!r} cannot be used: {reason}"
    return f"{task!r} is not one of the reasoning-gym tasks that can be used (available: {', '.join(ALLOWED)})"


def quietly() -> contextlib.AbstractContextManager[Any]:
    """Keeps what some tasks print, when they make a problem or judge an answer, from the terminal."""
    return contextlib.redirect_stdout(io.StringIO())


def make(task: str, config: Mapping[str, Any], seed: int = 0, size: int = 1) -> Any:
    """The data set of reasoning-gym that makes and scores the problems of ``task``; item ``i`` has seed ``seed + i``.

    Raises:
        UserError: The package is missing, the task cannot be used, or ``config`` does not suit it.
    """
    reason = refusal(task)
    if reason is not None:
        raise UserError(reason)
    return _made(task, json.dumps(dict(config), sort_keys=True), seed, size)


@lru_cache(maxsize=256)
def _made(task: str, config: str, seed: int, size: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(
            f'reasoning-gym is not installed ({error}); install it with: pip install "alignment-rl[reasoning-gym]"'
        ) from error
    options = json.loads(config)
    known = [f.name for f in dataclasses.fields(DATASETS[task][1]) if f.name not in ("seed", "size")]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise UserError(f"config: reasoning-gym's {task} has no option {unknown[0]!r} (options: {', '.join(known)})")
    try:
        made = create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, ValueError, TypeError) as error:  # how its configurations say what is wrong
        raise UserError(f"config: reasoning-gym's {task} refuses {options}: {error}") from error
    if task == "base_conversion" and made.config.min_base == made.config.max_base:
        raise UserError(
            f"config: reasoning-gym's base_conversion never returns with min_base = max_base = {made.config.min_base}: "
            f"it draws until two bases differ; make max_base larger"
        )
    return made
