"""One spelling for the many ways in which LaTeX writes an answer, and the exact value of those that are numbers."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{GREEK SMALL LETTER PI}": "\\pi ", "\N{DEGREE SIGN}": "^\\circ ",
        "\N{MULTIPLICATION SIGN}": "\\cdot ", "\N{MIDDLE DOT}": "\\cdot ", "\N{INFINITY}": "\\infty ",
        "\N{LESS-THAN OR EQUAL TO}": "\\le ", "\N{GREATER-THAN OR EQUAL TO}": "\\ge ", "\N{UNION}": "\\cup ",
        "\N{PLUS-MINUS SIGN}": "\\pm ", "\N{NO-BREAK SPACE}": " ", "\N{ELEMENT OF}": "\\in ", "*": "\\cdot ",
        "\t": " ", "\n": " ", "\0": " ",
    }
)  # fmt: skip
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "times": "cdot", "ast": "cdot", "geqslant": "ge", "geq": "ge",
    "leqslant": "le", "leq": "le", "neq": "ne", "degree": "circ", "mbox": "text", "textbf": "text", "textit": "text",
    "textrm": "text", "textnormal": "text", "mathrm": "text", "operatorname": "text",
}  # fmt: skip
_SIZES = {size + side for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
_NOTHING = {"left", "right", "displaystyle", "textstyle", "limits", "quad", "qquad", *_SIZES}
_NOTHING |= {"mathbf", "mathit", "mathsf", "boldsymbol", "bm"}
_WORD = re.compile(r"\\([a-zA-Z]+)")
_ONE = r"([0-9a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z{]))"
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_MIXED = re.compile(r"(?<=[0-9]) +([0-9]+)/([0-9]+)(?![0-9])")
_THOUSANDS = re.compile(r"(?<![0-9])([0-9]{1,3})((?: [0-9]{3})+)(?![0-9])")

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_EXPONENT = r"(?:\{([-+]?[0-9]{1,3})\}|([0-9]))"
_PLAIN = re.compile(rf"{_DECIMAL}(?:[eE][-+]?[0-9]{{1,3}})?")
_RATIO = re.compile(rf"\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}}|({_DECIMAL})/({_DECIMAL})")
_MIXED_NUMBER = re.compile(r"([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_POWER_OF_TEN = re.compile(rf"(?:({_DECIMAL})\\cdot ?)?10\^{_EXPONENT}")
_DIGITS_MAX = 1000
"""Longer numbers are no answers, and arithmetic on them takes time."""


def plain_characters(text: str) -> str:
    """``text`` without characters that are not seen, and with full-width ones in their usual width."""
    if text.isascii():
        return text
    wide = (unicodedata.normalize("NFKC", c) if "\uff00" <= c <= "\uffef" else c for c in text)
    return "".join(c for c in wide if unicodedata.category(c) != "Cf")


def normalise(latex: str) -> str:
    r"""The spelling that equal answers share, as far as spelling goes: ``\dfrac 12`` and ``\frac{1}{2}`` are one.

    Sizes, fonts, spaces, mathematics delimiters and money signs go; what they stand around stays. Arguments of
    fractions and roots get braces, single characters of exponents and indices lose them.
    """
    text = plain_characters(latex).translate(_SYMBOLS).replace("\\$", "").replace("$", "").strip()
    if text[:2] in ("\\(", "\\["):
        text = text[2:].removesuffix("\\)").removesuffix("\\]")
    text = re.sub(r"\\!\s*", "", text).replace("{,}", ",")
    text = re.sub(r"(?<!\\)\\[,;: >]|~", " ", text)
    text = _WORD.sub(_respell, text)
    text = _MIXED.sub(r"\\frac{\1}{\2}", text)  # 1 4/5
    text = _THOUSANDS.sub(lambda m: m[1] + m[2].replace(" ", ""), text)
    # A space stays between a command and a letter, and between digits, which are not one number then.
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])|(?<=[0-9]) +(?=[0-9])", lambda m: f"{m[1] or ''}\0", text)
    text = text.replace(" ", "").replace("\0", " ")
    text = re.sub(rf"\\(frac|sqrt) ?{_ONE}", r"\\\1{\2}", text)
    text = re.sub(rf"(\\frac{_GROUP}) ?{_ONE}", r"\1{\2}", text)
    text = re.sub(r"([\^_])([0-9]{2,})", r"\1{\2}", text)
    return re.sub(r"([\^_])\{([0-9a-zA-Z])\}", r"\1\2", text)


def _respell(word: re.Match[str]) -> str:
    name = _SAME.get(word[1], word[1])
    return "" if name in _NOTHING else "\\" + name


def top_level(text: str, separator: str) -> list[str]:
    r"""``text`` split at a separator token (``,``, ``=``, ``\\``) outside of all brackets and ``\begin ... \end``.

    Brackets need not be of one kind: ``(0,1]`` counts as closed.
    """
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        if token == separator and depth == 0:
            parts.append("")
            continue
        depth += (token in ("(", "[", "{", "\\{", "\\begin")) - (token in (")", "]", "}", "\\}", "\\end"))
        parts[-1] += token
    return parts


def closes_at_end(text: str) -> bool:
    """Whether the bracket that ``text`` begins with is closed by its last character, and not before."""
    depth = 0
    tokens = _TOKEN.findall(text)
    for i, token in enumerate(tokens):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth <= 0:
            return i == len(tokens) - 1 and depth == 0
    return False


def number(text: str) -> Fraction | None:
    r"""The exact value of a normalised text that is one number; None for anything else, an expression included.

    Reads ``-1,234.5``, ``.5``, ``2e-3``, ``3/4``, ``\frac{3}{4}``, ``1\frac{4}{5}``, ``0.1\overline{6}`` and
    ``2\cdot10^{-3}``.
    """
    if len(text) > _DIGITS_MAX:
        return None
    sign = -1 if text[:1] == "-" else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    if text.startswith("(") and text.endswith(")"):  # -(3/4)
        text = text[1:-1]
    return next((sign * value for value in _readings(text)), None)


def _readings(text: str) -> Iterator[Fraction]:
    """The value of a number without a sign, if it is one."""
    if _PLAIN.fullmatch(text):
        yield Fraction(text.replace(",", ""))
    elif match := _RATIO.fullmatch(text):
        above, below = (Fraction(part.replace(",", "")) for part in match.groups() if part is not None)
        if below:
            yield above / below
    elif match := _MIXED_NUMBER.fullmatch(text):
        whole, above, below = map(int, match.groups())
        if below:
            yield whole + Fraction(above, below)
    elif match := _REPEATING.fullmatch(text):
        whole, fixed, again = match.groups()
        digits = int((whole or "0") + fixed + again) - int((whole or "0") + fixed)
        yield Fraction(digits, (10 ** len(again) - 1) * 10 ** len(fixed))
    elif match := _POWER_OF_TEN.fullmatch(text):
        factor = Fraction((match[1] or "1").replace(",", ""))
        yield factor * Fraction(10) ** int(match[2] or match[3])
