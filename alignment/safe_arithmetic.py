"""Exact arithmetic on text that a model wrote: parsed, checked against an allow-list, bounded, never executed."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_BITS = 256
"""Of the numerator and of the denominator, at every step: 77 decimal digits."""

_ALPHABET = re.compile(r"[0-9+\-*/%(). ]*")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str) -> Fraction:
    """The exact value of an expression of numbers, ``+ - * / // % **`` and parentheses.

    Raises:
        ValueError: It is not such an expression, divides by zero, or is longer than :data:`MAX_CHARACTERS` or larger
            than :data:`MAX_BITS` anywhere on the way.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    if not _ALPHABET.fullmatch(text):
        raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, MemoryError) as error:  # CPython's parser reports very deep nesting as a MemoryError
        raise ValueError("not an arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def show(value: Fraction) -> str:
    """``36`` for a whole number, ``7/2`` for another."""
    return str(value)


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            # From the characters, not from the parsed float, so that 0.1 is a tenth.
            return _bounded(Fraction(ast.get_source_segment(text, node) or ""))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, text))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, text), _value(right, text))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(op)](_value(left, text), _value(right, text))))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("an exponent must be a whole number")
    if _bits(base) * abs(exponent) > 2 * MAX_BITS:  # before computing it: 9**9**9 has 10^8 digits
        raise ValueError(f"larger than {MAX_BITS} bits")
    return _bounded(Fraction(base**exponent.numerator))


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ValueError(f"larger than {MAX_BITS} bits")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
