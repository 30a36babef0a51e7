"""Texts from files: labelled ones in CSV or JSONL, and plain ones."""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from crosslm.config import DataConfig
from crosslm.config_file import nearest, packaged
from crosslm.data.encodings import is_broken, looks_otherwise, meant_label, named_in, why_undecoded
from crosslm.data.examples import Examples
from crosslm.data.hub import HUB, hub_rows
from crosslm.data.rows import (
    UTF_8,
    check_not_empty,
    content_of,
    csv_rows,
    is_text,
    is_utf8,
    json_rows,
    label_of,
    suffix_of,
    told_columns,
    without_surrogates,
)
from crosslm.errors import DataError
from crosslm.support.files import expanded

ANY_KEY = "the configuration"
NAMED_ROWS = 5
OWN_TEXT = "package:crosslm"
"""The name of a plain text that is installed with crosslm: a page of English on many matters."""


@dataclass
class Loaded:
    """Rows of a file, and which of them could not be used."""

    examples: Examples
    source: str
    empty: list[int] = field(default_factory=list)
    """Numbers of rows without text: the first one below the names of columns is 1, however many lines each has."""
    no_string: list[int] = field(default_factory=list)
    """Those of JSON whose text is a number, say."""
    undecoded: list[int] = field(default_factory=list)
    """Those that are not of ``data.encoding``."""
    why_undecoded: str = ""
    """What they are not, and what to do."""
    looks_otherwise: str = ""
    """What makes it doubtful that the file is of ``data.encoding``, and what to do."""
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Those of ``data.skip_labels``, by label."""

    def warnings(self) -> list[str]:
        """A line for each kind of row that was left out, and one where the encoding is doubtful."""
        kinds = (
            ("no text", self.empty),
            ("the text is no string; write it in quotes", self.no_string),
            (self.why_undecoded, self.undecoded),
        )
        skipped = [(f"labelled {label!r}" if label else "no label", rows) for label, rows in self.skipped.items()]
        told = [f"{self.source}: {_counted(rows)} left out: {why}" for why, rows in (*kinds, *skipped) if rows]
        return [*told, *([f"{self.source}: {self.looks_otherwise}"] if self.looks_otherwise else [])]


def load_examples(name: str, data: DataConfig, labels: Sequence[str], key: str = ANY_KEY) -> Loaded:
    """Rows of one file or hub dataset; rows without text or of another encoding are left out and counted.

    Args:
        name: CSV, CSV.gz or JSONL file in ``data.dir`` (``x.csv`` also finds ``x.csv.gz``), or
            ``hf:DATASET[/CONFIG]:SPLIT``.
        data: folder, column names, encoding, and what the data call the labels (``label_names``).
        labels: the task's label names; a hub dataset's numbered labels are named by its features.
        key: where the name stands in the configuration, for the message.

    Raises:
        DataError: not found, a column is missing, a label is not the task's, rows are there and none can be used, or
            all rows of a label are of another encoding.
    """
    source, rows = hub_rows(name, data) if name.startswith(HUB) else _file_rows(name, data, key)
    loaded = Loaded(Examples([], []), source)
    index = {label.strip(): place for place, label in enumerate(labels)}
    named = {theirs.strip(): ours.strip() for theirs, ours in data.label_names.items()}
    skip = {label.strip() for label in data.skip_labels}
    unknown: dict[str, list[int]] = {}
    undecoded: list[tuple[str, str]] = []
    has_labels, bare = False, None  # of JSON a row may lack the key
    for number, row in rows:
        if data.text_column not in row:
            raise _no_column(source, number, row, data.text_column, data, key)
        has_labels = has_labels or data.label_column in row
        if not has_labels:
            bare = bare or _no_column(source, number, row, data.label_column, data, key)
            if "" not in skip:
                raise DataError(f'{bare}, or say data.skip_labels = [""] to leave out rows without a label')
        text, label = row[data.text_column], row.get(data.label_column)
        if any(isinstance(value, str) and is_broken(value) for value in (text, label)):
            loaded.undecoded.append(number)
            undecoded.append((f"{text} {label}", label_of(label)))
            continue
        if not isinstance(text, str) or not text.strip():
            (loaded.empty if text is None or isinstance(text, str) else loaded.no_string).append(number)
            continue
        told = label_of(label)
        if told in skip:
            loaded.skipped.setdefault(told, []).append(number)
            continue
        if isinstance(label, list | dict):
            raise DataError(
                f"{source}: row {number} has {'a list' if isinstance(label, list) else 'an object'} in the column "
                f"{data.label_column!r}, and a row has one label: write that one, or where a text may have several "
                "make a task of yes and no for each"
            )
        if not told:
            raise DataError(
                f"{source}: row {number} has a text and no label: are there too few fields, or an unclosed quote in it "
                'or above it? Give each row both, or leave such rows out: data.skip_labels = [""]'
            )
        known = named.get(told, told)
        if known not in index:
            unknown.setdefault(told, []).append(number)
            continue
        loaded.examples.texts.append(" ".join(text.split()))
        loaded.examples.labels.append(index[known])
    if bare and not has_labels:
        raise bare
    if unknown:
        raise DataError(
            f"{source}: {_of_labels(unknown, labels)}; the task's labels are {list(labels)}; correct the file, say "
            "in data.label_names which of them it is, or leave its rows out by data.skip_labels"
        )
    loaded.why_undecoded = why_undecoded([row for row, _ in undecoded], loaded.examples.texts, data, key)
    loaded.looks_otherwise = looks_otherwise(loaded.examples.texts, data, key)
    if not loaded.examples and (why := loaded.warnings()):
        raise DataError(f"{'; '.join(why)}; no row is left, and it must have some")
    places = {name: index.get(named.get(name, name)) for name in (*index, *named)}
    _check_none_is_lost(loaded, [meant_label(label, places) for _, label in undecoded], labels)
    return loaded


def _of_labels(unknown: Mapping[str, list[int]], labels: Sequence[str]) -> str:
    """Which labels the task does not know, where they stand, and what they may have been meant to be."""
    told = []
    for name, rows in list(unknown.items())[:NAMED_ROWS]:
        near = nearest(name, labels)
        meant = f"; did you mean {near!r}?" if near else ""
        others = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        told.append(f"row {rows[0]}{others} has {_shown(name)}{meant}")
    more = f", and {len(unknown) - NAMED_ROWS} labels more" if len(unknown) > NAMED_ROWS else ""
    return ", ".join(told) + more


def _shown(label: str) -> str:
    """A label in words; not one so long that it may be a private text, where columns were taken for each other."""
    if is_text(label):
        return f"a label of {len(label)} letters (is data.label_column the right column?)"
    return f"the label {label!r}"


def _check_none_is_lost(loaded: Loaded, undecoded: Sequence[int | None], labels: Sequence[str]) -> None:
    """Find out that no label is left out with rows of another encoding: only those of its words may have an umlaut.

    Args:
        loaded: rows that are left, and the numbers of those that are not.
        undecoded: the label of each row of another encoding, if it can be told.
        labels: of the task.

    Raises:
        DataError: one is.
    """
    left = set(loaded.examples.labels)
    for label in dict.fromkeys(undecoded):
        if label is not None and label not in left:
            rows = [number for number, of in zip(loaded.undecoded, undecoded, strict=True) if of == label]
            raise DataError(
                f"{loaded.source}: {_counted(rows)} labelled {labels[label]!r} must be read, or none of that label is "
                f"left: {loaded.why_undecoded}"
            )


def _no_column(source: str, number: int, row: Iterable[str], wanted: str, data: DataConfig, key: str) -> DataError:
    told = _columns(row, wanted, data, key)
    return DataError(f"{source}: row {number} has no column {wanted!r}; its columns are: {told}")


def _columns(found: Iterable[str], wanted: str, data: DataConfig, key: str) -> str:
    columns = list(found)
    how = f"name yours in {named_in('text_column' if wanted == data.text_column else 'label_column', key)}"
    if any(map(is_broken, columns)):
        how = f"{why_undecoded(columns, (), data, key)}; or {how}"
    return told_columns(map(without_surrogates, columns), how)


def _file_rows(name: str, data: DataConfig, key: str) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    path = find_file(name, data, key)
    text = read_text(path, data.encoding)
    kind = suffix_of(path)
    if kind == ".csv":
        return str(path), csv_rows(io.StringIO(text, newline=""), str(path), partial(_check_header, path, data, key))
    if kind == ".jsonl":
        return str(path), json_rows(text.split("\n"), str(path))
    raise DataError(f"{path}: must be .csv, .csv.gz, .jsonl or .jsonl.gz (in a spreadsheet: save as CSV UTF-8)")


def _check_header(path: Path, data: DataConfig, key: str, header: list[str]) -> None:
    check_not_empty(str(path), header)
    for column in (data.text_column, data.label_column):
        if column not in header:
            raise DataError(f"{path}: no column {column!r}; its columns are: {_columns(header, column, data, key)}")
        if header.count(column) > 1:
            raise DataError(f"{path}: has the column {column!r} twice; give each a name of its own")


def read_text(path: Path, encoding: str = UTF_8) -> str:
    """A file's text, unpacked if it is gzipped; bytes that are not of its encoding become lone surrogates.

    Args:
        path: of the file.
        encoding: of it, unless it begins with the mark of UTF-8.

    Raises:
        DataError: it cannot be read, is a spreadsheet's own file, or UTF-16 where it is to be something else, or is of
            another encoding in such a way that no row of it can be read.
    """
    content = content_of(path, encoding)
    marked = content.startswith(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8-sig" if marked or is_utf8(encoding) else encoding, "surrogateescape")
    except UnicodeError as error:
        raise DataError(
            f"{path}: is not {encoding}, as data.encoding says: {error}; name its own there, or save it as UTF-8"
        ) from error


def readable_lines(path: Path, warn: Callable[[str], None]) -> list[str]:
    """Lines of a text file, those that are not UTF-8 left out; ``warn`` is told of them.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    everything = [line for line in read_text(path).splitlines() if line.strip()]
    lines = [line for line in everything if not is_broken(line)]
    if len(lines) < len(everything):
        warn(f"{path}: {len(everything) - len(lines)} of {len(everything)} lines left out: not UTF-8")
    if not lines:
        raise DataError(f"{path}: has no text; it must hold some in UTF-8")
    return lines


def whole_text(path: Path) -> str:
    """A text file of which every line counts.

    Raises:
        DataError: it cannot be read, has no text, or has a line that is not UTF-8.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: has no text; it must hold some in UTF-8")
    if broken := [number for number, line in enumerate(text.splitlines(), start=1) if is_broken(line)]:
        raise DataError(f"{path}: line {broken[0]} is not UTF-8; write the file anew as UTF-8, or without that line")
    return text


def is_there(name: str, data: DataConfig) -> bool:
    """Whether :func:`find_file` would find it; of a hub dataset it is known when it is asked for."""
    if name.startswith(HUB):
        return True
    try:
        find_file(name, data)
    except DataError:
        return False
    return True


def find_file(name: str, data: DataConfig, key: str = ANY_KEY) -> Path:
    """The file of this name in ``data.dir``, or the same with ``.gz``, or what is installed as :data:`OWN_TEXT`.

    Args:
        name: as in the configuration.
        data: where it is.
        key: where in the configuration, for the message.

    Raises:
        DataError: neither is there.
    """
    if name == OWN_TEXT:
        return Path(str(files("crosslm.data") / "general.txt"))
    path = expanded(data.dir) / name
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    hint = " (packaged configurations bring no data; crosslm demo fetches those of demo)"
    is_packaged = path.parent in {file.parent for file in packaged().values()}
    raise DataError(
        f"{path}: no such file; set data.dir or --data-dir to the folder that it is in, or name another file in "
        f"{key}{hint if is_packaged else ''}"
    )


def _counted(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''} ({shown})"
