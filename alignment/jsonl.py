"""Strict JSON on one line, whatever the value holds."""

import json
import math
from collections.abc import Mapping

_LINE_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def to_json(value: object) -> str:
    """``value`` as strict JSON on one line, whatever characters it holds.

    NaN and infinities become null. Line separators that are not ``\\n`` are escaped, so that every way to split lines
    agrees; a text that UTF-8 cannot encode (lone surrogates) is escaped, and reads back as it was.
    """
    plain = _finite(value)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str).translate(_LINE_BREAKS)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(plain, allow_nan=False, default=str)
    return text


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
