"""Labelled texts from files, and their split among clients (CrossLM, section 5.1)."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crosslm.config import Config, DataConfig
from crosslm.config_file import packaged
from crosslm.errors import DataError
from crosslm.examples import Examples
from crosslm.files import expanded
from crosslm.hub import HUB, hub_rows
from crosslm.seeding import seed_for

NAMED_ROWS = 5


@dataclass
class Loaded:
    """Rows of a file, and which of them could not be used."""

    examples: Examples
    source: str
    empty: list[int] = field(default_factory=list)
    """Row numbers (the first row of data is 1) without text."""
    not_utf8: list[int] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """A line for each kind of row that was left out."""
        kinds = (("no text", self.empty), ("not UTF-8", self.not_utf8))
        return [f"{self.source}: {_counted(rows)} left out: {why}" for why, rows in kinds if rows]


@dataclass
class Split:
    """All the labelled text of a run."""

    private: dict[str, Examples]
    """Training rows of each client."""
    tests: dict[str, Examples]
    """Test rows of each client."""
    test: Examples
    """Test rows for the LLM: those of all clients if they have their own."""
    judge: Examples
    """Held-out rows that no client has."""
    warnings: list[str] = field(default_factory=list)


def load_split(config: Config) -> Split:
    """Read every file that the configuration names and give each client its rows.

    Raises:
        DataError: a file, column or label is wrong, or a silo is empty; names file and row.
    """
    data, labels = config.data, config.task.labels
    warnings: list[str] = []

    def rows(name: str) -> Examples:
        loaded = load_examples(name, data, labels)
        warnings.extend(loaded.warnings())
        return loaded.examples

    # the same test rows for every seed of a run, so that seeds can be compared on them
    test = balanced_sample(rows(str(data.test)), data.test_rows, len(labels), seed_for(0, "test"))
    judge = rows(data.judge) if data.judge else Examples([], [])
    if config.clients:
        private = {client.id: rows(client.train) for client in config.clients}
        tests = {client.id: rows(client.test) if client.test else test for client in config.clients}
        if data.rows_per_client:
            private = {
                name: sample(examples, data.rows_per_client, seed_for(config.seed, "rows", name))
                for name, examples in private.items()
            }
    else:
        everything = rows(str(data.train))
        if not data.judge:
            if len(everything) - data.judge_rows < data.num_clients:
                raise DataError(
                    f"{data.train}: has {len(everything)} usable rows; data.judge_rows = {data.judge_rows} of them are "
                    f"held out for the judge, which leaves too few for {data.num_clients} clients; set data.judge_rows"
                )
            order = np.random.default_rng(seed_for(config.seed, "judge")).permutation(len(everything)).tolist()
            judge = everything.take(order[: data.judge_rows])
            everything = everything.take(order[data.judge_rows :])
        parts = dirichlet_split(
            everything.labels, data.num_clients, data.alpha, data.rows_per_client, seed_for(config.seed, "split")
        )
        private = {f"client-{number}": everything.take(part) for number, part in enumerate(parts)}
        tests = dict.fromkeys(private, test)
    if data.judge:
        judge = sample(judge, data.judge_rows, seed_for(config.seed, "judge"))
    for name, examples in private.items():
        counts = examples.class_counts(len(labels))
        if not len(examples):
            raise DataError(f"client {name}: no usable training rows; put labelled text into its file")
        if sum(count > 0 for count in counts) == 1:
            only = labels[int(np.argmax(counts))]
            warnings.append(
                f"client {name}: all {len(examples)} rows are {only!r}; its classifier can learn nothing else"
            )
    if not len(test):
        raise DataError(f"{data.test}: no usable test rows; put labelled text into it")
    for client in config.clients:
        if not len(tests[client.id]):
            raise DataError(f"client {client.id}: {client.test}: no usable test rows; put labelled text into it")
    return Split(private, tests, test, judge, warnings)


def test_rows(config: Config, warn: Callable[[str], None]) -> Examples | None:
    """The rows of ``data.test`` as every seed of a run has them; None if the file is not there.

    ``warn`` is told of rows that were left out.

    Raises:
        DataError: it is there and cannot be used.
    """
    data, labels = config.data, config.task.labels
    if not is_there(str(data.test), data):
        return None
    loaded = load_examples(str(data.test), data, labels)
    for line in loaded.warnings():
        warn(line)
    return balanced_sample(loaded.examples, data.test_rows, len(labels), seed_for(0, "test"))


def load_examples(name: str, data: DataConfig, labels: Sequence[str]) -> Loaded:
    """Rows of one file or hub dataset; rows without text or that are not UTF-8 are left out and counted.

    Args:
        name: CSV, CSV.gz or JSONL file in ``data.dir`` (``x.csv`` also finds ``x.csv.gz``), or
            ``hf:DATASET[/CONFIG]:SPLIT``.
        data: folder, column names, and what the data call the labels (``label_names``).
        labels: the task's label names; a hub dataset's numbered labels are named by its features.

    Raises:
        DataError: not found, a column is missing, or a label is not the task's.
    """
    source, rows = hub_rows(name, data) if name.startswith(HUB) else _file_rows(name, data)
    loaded = Loaded(Examples([], []), source)
    index = {label: place for place, label in enumerate(labels)}
    for number, row in rows:
        for column in (data.text_column, data.label_column):
            if column not in row:
                raise DataError(
                    f"{source}: row {number} has no column {column!r}; its columns are: {_columns(row, column, data)}"
                )
        text, label = row[data.text_column], row[data.label_column]
        if any(isinstance(value, str) and _is_broken(value) for value in (text, label)):
            loaded.not_utf8.append(number)
            continue
        if not isinstance(text, str) or not text.strip():
            loaded.empty.append(number)
            continue
        if label is None:
            raise DataError(
                f"{source}: row {number} has a text and no label: are there too few fields, or an unclosed quote in it "
                "or above it? Give each row both"
            )
        known = data.label_names.get(str(label), str(label))
        if known not in index:
            raise DataError(
                f"{source}: row {number} has the label {label!r}; the task's labels are {list(labels)}; "
                "say in data.label_names which of them it is"
            )
        loaded.examples.texts.append(" ".join(text.split()))
        loaded.examples.labels.append(index[known])
    return loaded


def _columns(found: Iterable[str], wanted: str, data: DataConfig) -> str:
    """What columns there are, and how to have them read."""
    names = list(map(str, found))
    told = ", ".join(names)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return f"{told}; separate fields by commas"
    return f"{told}; name yours in data.{'text_column' if wanted == data.text_column else 'label_column'}"


def dirichlet_split(
    labels: Sequence[int], num_clients: int, alpha: float, rows_per_client: int | None, seed: int
) -> list[list[int]]:
    """Rows for each client, with a label mix of its own, after Hsu et al. 2019 (section 5.1, [36]).

    Each client draws ``q ~ Dir(alpha * p)``, p being the label shares of all rows, and then rows
    without replacement, each of a label drawn from q; when a label runs out, from the labels left.

    Args:
        labels: label index of each row.
        num_clients: how many parts.
        alpha: concentration; towards 0 each client has one label, towards infinity all have p.
        rows_per_client: at most so many; an equal share of all rows if None.
        seed: everything random follows from it.

    Returns:
        For each client indices into ``labels``; no row is in two parts.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    left = [generator.permutation(np.flatnonzero(np.asarray(labels) == label)).tolist() for label in classes]
    share = len(labels) // num_clients
    size = share if rows_per_client is None else min(rows_per_client, share)
    parts: list[list[int]] = []
    for _ in range(num_clients):
        mix = generator.dirichlet(alpha * counts / counts.sum())
        part: list[int] = []
        for _ in range(size):
            weights = np.where([bool(rows) for rows in left], mix, 0.0)
            if weights.sum() <= 0:  # the labels of this client's mix are used up
                weights = np.array([float(len(rows)) for rows in left])
            part.append(left[generator.choice(len(classes), p=weights / weights.sum())].pop())
        parts.append(part)
    return parts


def sample(examples: Examples, rows: int | None, seed: int) -> Examples:
    """At most so many rows, drawn without replacement."""
    if rows is None or rows >= len(examples):
        return examples
    return examples.take(np.random.default_rng(seed).permutation(len(examples))[:rows].tolist())


def balanced_sample(examples: Examples, rows: int | None, num_classes: int, seed: int) -> Examples:
    """At most so many rows, as evenly over the labels as there are rows for it."""
    if rows is None or rows >= len(examples):
        return examples
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    by_label = [[row for row in order if examples.labels[row] == label] for label in range(num_classes)]
    in_turn = [queue[place] for place in range(max(map(len, by_label))) for queue in by_label if place < len(queue)]
    return examples.take(in_turn[:rows])


def _file_rows(name: str, data: DataConfig) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    path = find_file(name, data)
    text = read_text(path)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        header = _csv_header(path, reader)
        for column in (data.text_column, data.label_column):
            if column not in header:
                raise DataError(f"{path}: no column {column!r}; its columns are: {_columns(header, column, data)}")
        return str(path), _csv_rows(path, reader)
    if kind == ".jsonl":
        return str(path), _json_rows(path, text)
    raise DataError(f"{path}: must be .csv, .csv.gz, .jsonl or .jsonl.gz")


def read_text(path: Path) -> str:
    """A file's text, unpacked if it is gzipped; bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; name one that is there") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read; is the file whole, and yours to read? {error}") from error


def readable_lines(path: Path, warn: Callable[[str], None]) -> list[str]:
    """Lines of a text file, those that are not UTF-8 left out; ``warn`` is told of them.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    everything = [line for line in read_text(path).splitlines() if line.strip()]
    lines = [line for line in everything if not _is_broken(line)]
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
    if broken := [number for number, line in enumerate(text.splitlines(), start=1) if _is_broken(line)]:
        raise DataError(f"{path}: line {broken[0]} is not UTF-8; write the file anew as UTF-8, or without that line")
    return text


def _csv_header(path: Path, reader: "csv.DictReader[str]") -> list[str]:
    try:
        return list(reader.fieldnames or [])
    except csv.Error as error:
        raise DataError(f"{path}: line 1 is not CSV; it must name the columns: {error}") from error


def _csv_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{path}: line {reader.line_num} has more fields than the header; put texts with commas in quotes"
                )
            yield number, row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV (an unclosed quote?): {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON; each line must be an object: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} must be an object with the columns as keys, found {line[:60]!r}")
        yield number, row


def is_there(name: str, data: DataConfig) -> bool:
    """Whether :func:`find_file` would find it."""
    try:
        find_file(name, data)
    except DataError:
        return False
    return True


def find_file(name: str, data: DataConfig) -> Path:
    """The file of this name in ``data.dir``, or the same with ``.gz``.

    Raises:
        DataError: neither is there.
    """
    path = expanded(data.dir) / name
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    hint = " (packaged configurations bring no data; crosslm demo fetches those of demo)"
    is_packaged = path.parent in {file.parent for file in packaged().values()}
    raise DataError(
        f"{path}: no such file; set data.dir or --data-dir to the folder that it is in, or name another file in the "
        f"configuration (--set data.train=FILE, for one){hint if is_packaged else ''}"
    )


def _is_broken(value: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in value)


def _counted(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''} ({shown})"
