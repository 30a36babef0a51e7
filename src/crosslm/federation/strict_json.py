"""JSON from a stranger: bounded in memory before it is parsed, no name twice, no number that is none."""

import json
import re
from typing import Any

from crosslm.errors import UploadError

MAX_DEPTH = 32
# possessive and with an optional end: linear, whatever comes
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")
BRACKETS = re.compile(rb"[\[\]{}]")


def parse(data: bytes, what: str, max_values: int) -> Any:
    """The value in these bytes.

    Args:
        data: UTF-8, and no other encoding: the bounds count bytes of it.
        what: the name of it, for messages.
        max_values: at most so many values at all depths together; what Python needs for each is
            some hundred bytes, so this bounds memory.

    Raises:
        UploadError: not JSON, too many values, too deep, a name twice, NaN or infinity, or half a character.
    """
    structure = STRING.sub(b"", data)
    if sum(map(structure.count, (b"[", b"{", b","))) > max_values:
        raise UploadError(f"its {what} holds more than {max_values} values")
    depth = 0
    for mark in BRACKETS.finditer(structure):
        depth += 1 if mark[0] in (b"[", b"{") else -1
        if depth > MAX_DEPTH:
            raise UploadError(f"its {what} is nested deeper than {MAX_DEPTH}")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
        if ESCAPED.search(data):  # half of a pair cannot be written down anywhere
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise UploadError(f"its {what} is not JSON as it must be: {str(error)[:120]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:60]!r} twice")
    return result


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return number
