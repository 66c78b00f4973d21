"""Asks an OpenAI-compatible endpoint, remembers what it said, and counts what that cost."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignment.durable import replace_file
from alignment.errors import UserError

NO_VERDICT = "no verdict"


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is and how it is asked."""

    base_url: str
    model: str
    key_env: str
    temperature: float
    max_tokens: int
    timeout_s: float
    max_retries: int
    cache: str | None
    account: str | None
    """File with a line for each call that was made: ``model``, ``prompt_tokens``, ``completion_tokens``, ``cost`` and
    ``failed`` (why it was of no use, or null)."""
    prices: tuple[float, float]
    """Of a million tokens read, and written."""


def ask(
    endpoint: Endpoint,
    messages: list[dict[str, str]],
    sample: int,
    schema: Mapping[str, Any],
    sound: Callable[[str], bool],
) -> str:
    """What the judge says, from the cache if it was asked the same before.

    Calls that fail in transit, are refused for their number or meet an error of the server are made again, later each
    time, up to ``max_retries`` times.

    Args:
        endpoint: Where.
        messages: The question.
        sample: Which of several answers to the same question.
        schema: Of the verdict; servers that can keep to it are asked to.
        sound: Whether an answer holds a verdict. Others count as failed, and are asked for again the next time.

    Raises:
        UserError: The package or the key is missing.
        Exception: Whatever the client raises when it gives up.
    """
    asked = [endpoint.base_url, endpoint.model, endpoint.temperature, endpoint.max_tokens, messages, sample]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    known = None if endpoint.cache is None else Path(endpoint.cache) / f"{key}.json"
    if known is not None and known.is_file():
        return json.loads(known.read_text(encoding="utf-8"))["text"]
    try:
        answer = client(endpoint).chat.completions.create(
            model=endpoint.model,
            messages=messages,
            temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            },
        )
        text = (answer.choices[0].message.content or "") if answer.choices else ""
    except Exception as error:
        _count(endpoint, None, f"{type(error).__name__}: {error}"[:300])
        raise
    useful = sound(text)
    _count(endpoint, answer.usage, None if useful else NO_VERDICT)
    if known is not None and useful:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_file(known, json.dumps({"text": text}).encode(), synced=False)
    return text


@lru_cache(maxsize=8)
def client(endpoint: Endpoint) -> Any:
    """The client of an endpoint.

    Raises:
        UserError: The package or the key is missing.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise UserError("the reward 'judge' needs the package openai: pip install 'alignment-rl[judge]'") from error
    key = os.environ.get(endpoint.key_env)
    if key is None and "//localhost" not in endpoint.base_url and "//127.0.0.1" not in endpoint.base_url:
        raise UserError(
            f"the judge at {endpoint.base_url} needs a key: set {endpoint.key_env} in the environment, or name another "
            f"variable in key_env"
        )
    return OpenAI(
        base_url=endpoint.base_url,
        api_key=key or "none",
        timeout=endpoint.timeout_s,
        max_retries=endpoint.max_retries,
    )


def _count(endpoint: Endpoint, usage: Any, failed: str | None) -> None:
    """Adds a line to the account, if one is kept. One short line is written whole by every process."""
    if endpoint.account is None:
        return
    read, wrote = (getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens"))
    cost = (read * endpoint.prices[0] + wrote * endpoint.prices[1]) / 1e6
    line = {"time": round(time.time(), 1), "model": endpoint.model, "prompt_tokens": read, "completion_tokens": wrote}
    account = Path(endpoint.account)
    account.parent.mkdir(parents=True, exist_ok=True)
    with account.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "cost": cost, "failed": failed}) + "\n")
