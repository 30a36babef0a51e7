"""Whether a file is of the encoding that it is read in, and what to do where rows are not."""

from collections.abc import Mapping, Sequence

from crosslm.config import DataConfig
from crosslm.data.rows import NOT_UTF8, UTF_8, is_utf8

WINDOWS = "cp1252"
"""What programs on Windows write in Western Europe and America, if not UTF-8."""


def is_broken(value: str) -> bool:
    """Whether something in it could not be decoded."""
    return any("\ud800" <= character <= "\udfff" for character in value)


def why_undecoded(rows: Sequence[str], others: Sequence[str], data: DataConfig, key: str) -> str:
    """What rows are not, and what to do.

    Args:
        rows: text and label of those that are not of ``data.encoding``.
        others: texts that are.
        data: as it is.
        key: of the file in the configuration.
    """
    if not is_utf8(data.encoding):
        return f"not {data.encoding}; save the file as UTF-8, or name its own in {named_in('encoding', key)}"
    is_mixed = any(not text.isascii() for text in others)  # read as another, those would be garbled
    if is_mixed or not all(map(_is_of_windows, rows)):
        return "not UTF-8; save the file as UTF-8"
    windows = named_in("encoding", key, f' = "{WINDOWS}"')
    return f"not UTF-8; save the file as UTF-8, or if it is of Windows say {windows}"


def _is_of_windows(row: str) -> bool:
    """Whether what is not UTF-8 in a row can be read as what Windows writes."""
    try:
        row.encode(UTF_8, "surrogateescape").decode(WINDOWS)
    except UnicodeError:
        return False
    return True


def looks_otherwise(texts: Sequence[str], data: DataConfig, key: str) -> str:
    """What makes it doubtful that texts are of ``data.encoding``: read as UTF-8, most of them are text too."""
    foreign = [text for text in texts if not text.isascii()]
    if is_utf8(data.encoding) or not foreign or 2 * sum(_is_utf8_of(text, data) for text in foreign) < len(foreign):
        return ""
    return f"read as {data.encoding}, and its letters look like UTF-8: they may be wrong; if so, say " + named_in(
        "encoding", key, ' = "utf-8"'
    )


def _is_utf8_of(text: str, data: DataConfig) -> bool:
    try:
        text.encode(data.encoding).decode(UTF_8)
    except UnicodeError:
        return False
    return True


def meant_label(label: str, known: Mapping[str, int | None]) -> int | None:
    """Which label of the task a row of another encoding has, if its ASCII letters tell: they are the same in most."""
    if not is_broken(label):
        return known.get(label)
    alike = {place for name, place in known.items() if _outline(name) == _outline(label)}
    return alike.pop() if len(alike) == 1 else None


def _outline(label: str) -> str:
    return "".join(letter if letter.isascii() else NOT_UTF8 for letter in label)


def named_in(field: str, key: str, value: str = "") -> str:
    """Where a field of ``[data]`` is said for a file: of a silo's own file in its own table, too.

    Args:
        field: of ``[data]`` and of ``[[clients]]``.
        key: of the file in the configuration.
        value: what is to be said.
    """
    if not key.startswith("clients."):
        return f"data.{field}{value}"
    return f"{key.rpartition('.')[0]}.{field}{value} (or data.{field}, for all silos without their own)"
