r"""Equality of LaTeX expressions: math-verify reads them, values at fixed points compare them.

Two expressions are equal when their values agree wherever they are evaluated: at positive points that no answer was
made for. Rational numbers must be the same, other values agree to 1e-40 of the smaller of 1 and their size, and where
there is a decimal such as 1.41421 to 1e-6 of their size. That is stricter than rounding to six places, which makes all
small numbers equal, and needs no simplification, which may take for ever. Equations are equal when one is a constant
multiple of the other. What has no value, such as sets, unions of intervals and inequalities, is left to math-verify's
own comparison.

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
_BITS_MAX = 200_000
"""Of an exact power."""
_DIGITS_AGREE, _DIGITS_MORE, _DIGITS_MAX = 40, 20, 6000
"""Decimal places in which values agree, those calculated beyond, and the most for large values."""
DECIMAL_TOLERANCE = 1e-6
"""Relative, where a decimal takes part."""
_POINTS = ((97, 31, 41), (139, 53, 61), (71, 97, 83), (907, -29, 89))
_STEPS = (
    *((3, 4, 1), (8, 3, 1), (5, 6, 1), (12, 1, 1), (7, 9, 1), (10, 5, 1), (4, 5, 1), (9, 7, 1), (25, 2, 1), (32, 7, 1)),
    *((6, 2, 1), (27, 3, 1), (16, -1, 1), (64, -5, 1), (100, -9, 1)),
)
"""The k-th symbol is (first + k * second) / third, rising and falling with k; where expressions are rounded, whole
numbers, squares and powers of two and three among them."""
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
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    rules = NormalizationConfig(  # units stay: it would take the h of \pi r^2 h for hours
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )

    try:
        found = parse(
            f"${latex}$",
            [LatexExtractionConfig(normalization_config=rules)],
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
    from sympy import Abs, Float, I, Integer, Mod, Pow, ceiling, floor, log, sign

    gold, given = (each.subs({s: I for s in each.free_symbols if s.name == "i"}) for each in (gold, given))
    symbols = sorted(gold.free_symbols | given.free_symbols, key=lambda s: s.name)
    exact = (None, None) if symbols or multiples else (_rational(gold), _rational(given))
    if None not in exact:
        return bool(exact[0] == exact[1])
    places = _STEPS if gold.has(floor, ceiling, Mod) or given.has(floor, ceiling, Mod) else _POINTS
    decimal = gold.has(Float) or given.has(Float)
    logarithms = gold.has(log) and given.has(log)  # whole ones are rounded right only when they are exact
    logarithms = logarithms and not any(p.exp.free_symbols for e in (gold, given) for p in e.atoms(Pow))
    kind = Integer if logarithms and places is _STEPS else lambda value: Float(value, 200)
    signs = (1, -1) if gold.has(Abs, sign) or given.has(Abs, sign) else (1,)
    factor = None if multiples else 1
    for start, step, divisor in places if symbols else places[:1]:
        for side in signs:
            numbers = (kind(side * (start + step * k)) / divisor for k in range(len(symbols)))
            at = dict(zip(symbols, numbers, strict=True))
            left, right, tolerance = _values(gold.subs(at), given.subs(at))
            tolerance = DECIMAL_TOLERANCE if decimal else tolerance
            if left == right and factor == 1:  # infinity included
                continue
            if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
                return False
            if factor is None:
                factor = left / right if left != 0 and right != 0 else 0
            if factor == 0 or not bool(abs(left - factor * right) <= tolerance * abs(left)):
                return False
    return True


def _rational(found: Any) -> Any | None:
    """The exact value of what the four operations, powers and factorials make of whole numbers, if not too large."""
    from sympy import Add, Integer, Mul, Pow, Rational, factorial

    if isinstance(found, Rational):
        return found
    parts = [part for part in map(_rational, found.args) if part is not None]
    if not parts or len(parts) < len(found.args):
        return None
    if isinstance(found, (Add, Mul)):
        return type(found)(*parts)
    last = parts[-1]
    if not isinstance(last, Integer) or abs(last) > _BIG_EXPONENT:
        return None
    if isinstance(found, factorial) and last >= 0:
        return factorial(last)
    bits = max(int(parts[0].p).bit_length(), int(parts[0].q).bit_length())
    small = isinstance(found, Pow) and parts[0] != 0 and bits * abs(last) <= _BITS_MAX
    return parts[0] ** last if small else None


def _values(gold: Any, given: Any) -> tuple[Any, Any, Any]:
    """Two constants worked out, and how much they may differ, relative to the first: large ones get more digits."""
    from sympy import Float, Integer, ceiling, log

    digits = _DIGITS_AGREE + _DIGITS_MORE
    left = gold.evalf(digits)
    if left.is_number and left.is_finite and abs(left) > 1:
        digits = min(_DIGITS_MAX, digits + int(ceiling(log(abs(left), 10).evalf(10))))
        left = gold.evalf(digits)
    return left, given.evalf(digits), Float(10, 30) ** Integer(_DIGITS_MORE - digits)
