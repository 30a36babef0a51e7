"""Rows of text in and out: files, standard input and standard output; CSV, JSONL or a text a line."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from crosslm.errors import DataError, RunError
from crosslm.support.files import partial_of
from crosslm.support.writing import writing

Row = dict[str, object]
UTF_8 = "utf-8"
NOT_UTF8 = "\ufffd"
"""What stands in the place of bytes that are not UTF-8."""
SHOWN, SHOWN_WORDS = 40, 3  # letters and words of what an error shows as the name of a label or column


class RowFormat(StrEnum):
    """How rows are written down."""

    csv = "csv"
    jsonl = "jsonl"
    text = "text"


SUFFIXES = {".csv": RowFormat.csv, ".jsonl": RowFormat.jsonl, ".txt": RowFormat.text}


def format_of(path: Path) -> RowFormat:
    """What a file's name says of its format.

    Raises:
        DataError: nothing.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: must be .csv, .jsonl or .txt (or one of these with .gz), or say --format; in a spreadsheet save "
            "as CSV UTF-8"
        )
    return SUFFIXES[suffix]


def suffix_of(path: Path) -> str:
    """How a file's name ends, in small letters, before a ``.gz`` if it has one."""
    return Path(path.stem if _is_gzipped(path) else path.name).suffix.lower()


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def is_utf8(encoding: str) -> bool:
    """Whether an encoding is UTF-8, under whichever of its names, with a mark at the beginning or not."""
    return codecs.lookup(encoding).name in (UTF_8, "utf-8-sig")


def content_of(path: Path, encoding: str = UTF_8) -> bytes:
    """The bytes of a text file, unpacked if it is gzipped.

    Args:
        path: of the file.
        encoding: that it is to have.

    Raises:
        DataError: it cannot be read, or is a spreadsheet's own file, or UTF-16 where it is to be something else.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if _is_gzipped(path) else content
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; name one that is there") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read; is the file whole, and yours to read? {error}") from error
    if content.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: is a spreadsheet's own file (or a ZIP archive) and must be text: save as CSV UTF-8")
    is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not is_wide:
        wanted = "UTF-8" if is_utf8(encoding) else f"UTF-8 or {encoding}"
        raise DataError(f"{path}: is UTF-16 and must be {wanted}; save it so (in a spreadsheet: CSV UTF-8)")
    return content


def is_text(name: str) -> bool:
    """Whether what should be the name of a label or column is so long that it may be a private text."""
    return len(name) > SHOWN or len(name.split()) > SHOWN_WORDS


def label_of(value: object) -> str:
    """A label in the words of a row; nothing where it has none.

    JSON's true and false are called so, and 1.0, which some programs write for 1 where a label is missing, is 1.
    """
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()  # "None" may be the name of a label


def rows_of_file(
    path: Path, text_column: str, kind: RowFormat, on_broken: Callable[[], None] = lambda: None
) -> Iterator[Row]:
    """Rows of a file, gzipped or not, as :func:`rows_of`.

    Raises:
        DataError: it cannot be read, is no text in UTF-8, or a row is not of the format.
    """
    return rows_of(io.BytesIO(content_of(path)), str(path), text_column, kind, on_broken)


def rows_of(
    stream: BinaryIO, source: str, text_column: str, kind: RowFormat, on_broken: Callable[[], None] = lambda: None
) -> Iterator[Row]:
    """Rows as they come: ``text``: a text a line; ``csv`` with a header; ``jsonl``: an object a line.

    Bytes that are not UTF-8, and halves of a character that JSON has escaped, become U+FFFD, so that no row is lost.

    Args:
        stream: is read no further than needed.
        source: its name, for messages.
        text_column: the column that is classified; every row of ``csv`` and ``jsonl`` must have it.
        kind: the format.
        on_broken: told of each line with such.

    Raises:
        DataError: a row is not of the format, or has no such column.
    """
    opened = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    if kind is RowFormat.jsonl:
        for number, row in json_rows(opened, source):
            if text_column not in row:
                raise _no_column(source, number, text_column, row)
            yield _encodable(row, on_broken)
        return
    lines = _readable(opened, on_broken)
    if kind is RowFormat.text:
        for line in lines:
            yield {text_column: line.rstrip("\r\n")}
        return
    for _, row in csv_rows(lines, source, partial(_check_header, source, text_column)):
        yield row


def check_output(path: Path | None) -> None:
    """Find out that a file may be written, before a model is loaded.

    Raises:
        RunError: it is there already, or its folder is not.
    """
    if path is not None and path.exists():
        raise RunError(f"{path}: is there already and nothing is written over; name another --output")
    if path is not None and not path.absolute().parent.is_dir():
        raise RunError(f"{path}: there is no folder {path.parent}; make it, or name another --output")


def write_rows(rows: Iterable[Row], kind: RowFormat, path: Path | None) -> int:
    """Write rows as they come; ``text`` is the column ``text`` alone.

    Returns:
        How many.

    Raises:
        RunError: the file cannot be written.
    """
    count = 0
    with _opened(path) as file:
        writer = None
        for row in rows:
            if kind is RowFormat.csv:
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n", restval="", extrasaction="ignore")
                    writer.writeheader()
                writer.writerow({name: "" if value is None else value for name, value in row.items()})
            else:
                file.write((str(row["text"]) if kind is RowFormat.text else json.dumps(row, ensure_ascii=False)) + "\n")
            count += 1
            file.flush()
    return count


def _readable(lines: Iterable[str], on_broken: Callable[[], None]) -> Iterator[str]:
    for line in lines:
        whole = without_surrogates(line)
        if whole != line:
            on_broken()
        yield whole


def _encodable(row: Row, on_broken: Callable[[], None]) -> Row:
    """A row without bytes that are not UTF-8 and halves of characters, in whatever depth."""
    written = json.dumps(row, ensure_ascii=False)
    whole = without_surrogates(written)
    if whole == written:
        return row
    on_broken()
    mended: Row = json.loads(whole)
    return mended


def without_surrogates(text: str) -> str:
    """A text with a mark in the place of what could not be decoded, so that it can be shown and written."""
    return "".join(NOT_UTF8 if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def csv_rows(
    lines: Iterable[str], source: str, check_header: Callable[[list[str]], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file with their numbers, the first row of data being 1.

    Args:
        lines: of the file, with their ends.
        source: its name, for messages.
        check_header: told of the columns before any row; may raise.

    Raises:
        DataError: it is not CSV, as with a quote that is not closed, or a row has too many fields.
    """
    csv.field_size_limit(2**31 - 1)  # a long text is no error; a quote without an end is (strict)
    reader, line = csv.DictReader(lines, strict=True), 1
    try:
        above = (row for row in reader.reader if any(map(str.strip, row)))  # blank lines may stand above the names
        reader.fieldnames = _each_named([name.strip() for name in next(above, [])])
        check_header(list(reader.fieldnames))
        line = reader.reader.line_num + 1
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{source}: line {reader.line_num} has more fields than the header; put texts with commas in quotes"
                )
            yield number, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: line {line} is not CSV, or begins a row that is not: is there a quote that is not closed, or "
            f"one within a quoted text that is not doubled? {error}"
        ) from error


def _each_named(header: list[str]) -> list[str]:
    """Names of columns: of several without one, as where a spreadsheet ends, each gets one, since one would be lost."""
    if header.count("") < 2:
        return header
    return [name or f"unnamed {place}" for place, name in enumerate(header, start=1)]


def json_rows(lines: Iterable[str], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file with the numbers of their lines; empty lines are passed over.

    Raises:
        DataError: a line is not a JSON object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: line {number} is not JSON; each line must be an object: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"{source}: line {number} must be an object with the columns as keys, found a {kind}")
        yield number, row


def _check_header(source: str, text_column: str, header: list[str]) -> None:
    """The texts are there, and of two columns of one name one would be lost."""
    check_not_empty(source, header)
    if text_column not in header:
        raise _no_column(source, 1, text_column, header)
    for name in filter(None, header):
        if header.count(name) > 1:
            raise DataError(f"{source}: has the column {_shown(name)} twice; give each a name of its own")


def _no_column(source: str, number: int, text_column: str, columns: Iterable[str]) -> DataError:
    told = told_columns(columns, "name the right one with --text-column")
    return DataError(f"{source}: row {number} has no column {text_column!r}; its columns are: {told}")


def check_not_empty(source: str, header: list[str]) -> None:
    """Find out that a CSV file has names of columns.

    Raises:
        DataError: it has none.
    """
    if not any(header):
        raise DataError(f"{source}: is empty; it must begin with the names of its columns and have a row below them")


def told_columns(columns: Iterable[str], how: str) -> str:
    """What columns there are, those that have the names of columns, and how to have them read.

    Args:
        columns: that were found.
        how: to name another one, where they look as they should.
    """
    names = list(map(str, columns))
    told = ", ".join("..." if is_text(name) else name for name in names)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return f"{told}; separate fields by commas"
    if any(map(is_text, names)):
        return f"{told}; is the first line one of names? Put them there"
    return f"{told}; {how}"


def _shown(name: str) -> str:
    return "..." if is_text(name) else repr(name)


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # data, whatever the terminal can show
        yield sys.stdout
        return
    begun = partial_of(path)
    with writing(path, "or name another --output"):
        try:
            with begun.open("w", encoding="utf-8", newline="") as file:
                yield file
            begun.replace(path)
        finally:
            begun.unlink(missing_ok=True)
