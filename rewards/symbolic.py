r"""Equality of LaTeX expressions: math-verify reads them, values at fixed points compare them.

Two expressions are equal when their values agree to 1e-15 of their size wherever they are evaluated: at positive points
that no answer was made for. A decimal such as 1.41421 needs 1e-6. That is stricter than rounding to six places, which
makes all small numbers equal, and needs no simplification, which may take for ever. Equations are equal when one is a
constant multiple of the other. What has no value, such as sets, unions of intervals and inequalities, is left to
math-verify's own comparison.

Runs in the main thread only, because math-verify stops what takes too long by a signal.
"""

import importlib.util
import re
from functools import lru_cache
from typing import Any

from alignment.errors import UserError

SECONDS = 2
"""For each reading and each comparison."""
CHARS_MAX = 400
_BIG_EXPONENT = 10_000
TOLERANCE, DECIMAL_TOLERANCE = 1e-15, 1e-6
"""Relative; the second where a decimal takes part."""
_POINTS = ((97, 31, 41), (139, 53, 61), (71, 97, 83))
_STEPS = ((3, 4, 1), (8, 3, 1), (5, 6, 1), (12, 1, 1), (7, 9, 1), (10, 5, 1))
"""The k-th symbol is (first + k * second) / third; whole numbers where expressions are rounded."""
_UNFINISHED = re.compile(r"\\(?:sum|prod|int|lim|iint|oint)(?![a-zA-Z])")
_TOWER = re.compile(r"\^\{[^{}a-zA-Z\\]*\^")
_EXPONENT = re.compile(r"\^\{?-?([0-9]{5,})")
_FACTORIAL = re.compile(r"[0-9]{5}!|![)}\]]*!")
_DIGITS = re.compile(r"[0-9]{100}|[0-9] [0-9]")
_PROSE = re.compile(r"[A-Za-z]{12}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_COMMAND_OR_CAPITAL = re.compile(r"\\[a-zA-Z]+|[A-Z]")


class TooLong(Exception):
    """A comparison was not done in time."""


def require_math_verify() -> None:
    """Raises a UserError with the remedy when math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "comparing LaTeX needs math-verify, which is not installed: pip install 'alignment-rl[math]', "
            "or set 'symbolic: false' to compare texts and numbers only"
        )


def hopeless(latex: str) -> bool:
    """Whether ``latex`` is no answer to begin with.

    That is prose, numbers side by side, and what could take for ever to work out: long texts, towers of powers,
    factorials of factorials, sums and integrals that are left to do.
    """
    if len(latex) > CHARS_MAX or any(int(m[1]) > _BIG_EXPONENT for m in _EXPONENT.finditer(latex)):
        return True
    signs = _UNFINISHED, _TOWER, _FACTORIAL, _DIGITS
    return any(sign.search(latex) for sign in signs) or _PROSE.search(_COMMAND.sub(" ", latex)) is not None


@lru_cache(maxsize=4096)
def parsed(latex: str) -> Any | None:
    """What math-verify reads in ``latex``: an object of sympy, or None.

    Raises:
        TooLong: It was not done in time.
    """
    from math_verify import LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    try:
        found = parse(
            f"${latex}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=SECONDS,
            raise_on_error=True,
        )
    except TimeoutException as error:  # beside Exception
        raise TooLong(f"reading {latex[:80]!r} took more than {SECONDS} s") from error
    except Exception:  # noqa: BLE001 - sympy raises what it likes for what is no mathematics
        return None
    return found[0] if found else None


@lru_cache(maxsize=8192)
def same(gold: str, given: str) -> bool:
    """Whether two LaTeX texts mean the same.

    Raises:
        TooLong: It was not found out in time.
    """
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    if hopeless(given) or len(gold) > CHARS_MAX:
        return False
    left, right = map(parsed, _cases_apart(gold, given))
    if left is None or right is None:
        return False
    try:
        equal = timeout(SECONDS)(_by_value)(left, right)
        if equal is not None:
            return equal
        if _unsolved(right) and not _unsolved(left):
            return False
        return verify(left, right, allow_set_relation_comp=True, timeout_seconds=SECONDS, raise_on_error=True)
    except TimeoutException as error:
        raise TooLong(f"comparing {given[:80]!r} took more than {SECONDS} s") from error
    except Exception:  # noqa: BLE001 - as above: what cannot be compared is not the same
        return False


def _cases_apart(gold: str, given: str) -> tuple[str, str]:
    """Both texts with new names for capital letters that occur as small ones too: math-verify folds ``R`` and ``r``."""
    letters = {c for latex in (gold, given) for c in _COMMAND.sub("", latex) if c.isascii() and c.isalpha()}
    clashing = sorted(c for c in letters if c.isupper() and c.lower() in letters)
    names = [c for c in "abcfghjklmnopqrstuvwxyz" if not {c, c.upper()} & letters]
    renamed = dict(zip(clashing, names, strict=False))
    return tuple(_COMMAND_OR_CAPITAL.sub(lambda m: renamed.get(m[0], m[0]), latex) for latex in (gold, given))  # pyright: ignore[reportReturnType]


def _by_value(gold: Any, given: Any) -> bool | None:
    """Whether two expressions or equations are equal, by their values; None where only math-verify can tell."""
    from sympy import Basic, Equality, Expr, Integral, Limit, Product, Sum
    from sympy.core.function import AppliedUndef

    pair = (gold, given)
    if any(isinstance(e, Basic) and e.has(Sum, Product, Integral, Limit, AppliedUndef) for e in pair):
        return None
    if any(isinstance(e, Expr) for e in pair):  # an expression is no interval, and working it out may take for ever
        return all(isinstance(e, Expr) for e in pair) and _agree(gold, given, multiples=False)
    if all(isinstance(e, Equality) and isinstance(e.lhs, Expr) and isinstance(e.rhs, Expr) for e in pair):
        return _agree(gold.lhs - gold.rhs, given.lhs - given.rhs, multiples=True)
    return None


def _unsolved(found: Any) -> bool:
    """Whether it has an inequality to be solved yet: math-verify would solve it, and be given the question's."""
    from sympy import Basic
    from sympy.core.relational import Relational

    sides = [(r.lhs, r.rhs) for r in found.atoms(Relational)] if isinstance(found, Basic) else []
    return not all((a.is_Symbol and not b.free_symbols) or (b.is_Symbol and not a.free_symbols) for a, b in sides)


def _agree(gold: Any, given: Any, multiples: bool) -> bool:
    """Whether two expressions have equal values, or values in one constant ratio, at all points."""
    from sympy import Abs, Float, I, ceiling, floor, sign

    gold, given = (each.subs({s: I for s in each.free_symbols if s.name == "i"}) for each in (gold, given))
    symbols = sorted(gold.free_symbols | given.free_symbols, key=lambda s: s.name)
    tolerance = DECIMAL_TOLERANCE if gold.has(Float) or given.has(Float) else TOLERANCE
    signs = (1, -1) if gold.has(Abs, sign) or given.has(Abs, sign) else (1,)
    places = _STEPS if gold.has(floor, ceiling) or given.has(floor, ceiling) else _POINTS
    factor = None if multiples else 1
    for start, step, divisor in places if symbols else places[:1]:
        for side in signs:
            at = {s: Float(side * (start + step * k), 40) / divisor for k, s in enumerate(symbols)}
            left, right = (each.subs(at).evalf(30) for each in (gold, given))
            if left == right and factor == 1:  # infinity included
                continue
            if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
                return False
            if factor is None:
                factor = left / right if left != 0 and right != 0 else 0
            if factor == 0 or not bool(abs(left - factor * right) <= tolerance * abs(left)):
                return False
    return True
