"""What a run keeps of each arrival, to go on from after a crash and to go back to.

``checkpoints/arrival-0003.json`` is one arrival: its cause, and the state after it. Numbers are in it,
tensors in ``checkpoints/blobs/`` under their SHA-256, so that what did not change is kept once and what
is damaged is noticed. The JSON file is written last and renamed into place: what has none does not
exist. The rule of pruning: of the last ``checkpoint.keep`` arrivals, and of the beginning, all is kept;
of every other arrival the LLM's adapter and the cause.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from crosslm.errors import RunError
from crosslm.runs.rundir import RunDir

FOLDER, VERSION = "checkpoints", 3
BLOB = re.compile(r"[0-9a-f]{64}")


class Checkpoints:
    """The checkpoints in a run folder."""

    def __init__(self, run: RunDir, keep: int = 20) -> None:
        self.run = run
        self.keep = keep

    def put(self, data: bytes) -> str:
        """Keep these bytes; gives the name to get them by."""
        name = hashlib.sha256(data).hexdigest()
        path = self.run.path / _blob(name)
        if not path.is_file() or path.read_bytes() != data:  # not there, or damaged
            self.run.write_data(_blob(name), data)
        return name

    def get(self, name: str) -> bytes:
        """The bytes of this name.

        Raises:
            RunError: they are not there, or are not what was put there.
        """
        path = self.run.path / _blob(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}; to go on, {_hint()}") from error
        if hashlib.sha256(data).hexdigest() != name:
            raise RunError(f"{path}: damaged (its SHA-256 is not its name); to go on, {_hint()}")
        return data

    def numbers(self) -> list[int]:
        """The arrivals that are kept, from 0, the beginning."""
        files = (self.run.path / FOLDER).glob("arrival-*.json")
        return sorted(int(path.stem.removeprefix("arrival-")) for path in files)

    def write(self, number: int, cause: dict[str, Any], adapter: str, state: dict[str, Any]) -> None:
        """Keep an arrival, and prune by the rule."""
        self._write(number, {"version": VERSION, "arrival": number, "cause": cause, "adapter": adapter, "state": state})
        self.prune()

    def read(self, number: int) -> dict[str, Any]:
        """An arrival.

        Raises:
            RunError: it is not there, or damaged.
        """
        path = self.run.path / _file(number)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            record: dict[str, Any] = entry["record"]
            whole = entry["sha256"] == _digest(record) and record["version"] == VERSION
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged: {error}; to go on, {_hint(number)}") from error
        if not whole:
            raise RunError(
                f"{path}: damaged (its checksum does not match, or it is of another version); to go on, {_hint(number)}"
            )
        return record

    def last(self) -> dict[str, Any] | None:
        """The newest arrival, or None where there is none yet."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def take(self, other: "Checkpoints", records: list[dict[str, Any]]) -> None:
        """Copy arrivals of another run, with all that they name."""
        for record in records:
            for name in _names(record):
                self.put(other.get(name))
            self._write(record["arrival"], record)

    def prune(self) -> str:
        """Of arrivals before the last so many keep the adapter and the cause; delete bytes that nobody names.

        Returns:
            Why nothing was deleted, where an arrival cannot be read, since it may name any of these bytes; else "".
        """
        numbers = self.numbers()
        try:
            records = {number: self.read(number) for number in numbers}
        except RunError as error:
            return f"nothing in {FOLDER}/ is deleted any more: {error}"
        for number in numbers[1 : -self.keep]:
            if records[number]["state"] is not None:
                records[number] |= {"state": None}
                self._write(number, records[number])
        wanted = set(_names(list(records.values())))
        for path in (self.run.path / FOLDER / "blobs").iterdir():
            if path.stem not in wanted:
                path.unlink()
        return ""

    def _write(self, number: int, record: dict[str, Any]) -> None:
        self.run.write(_file(number), json.dumps({"sha256": _digest(record), "record": record}, indent=1) + "\n")


def _hint(number: int | None = None) -> str:
    if number is None:
        return "remove the newest file in checkpoints/: the run goes on from the arrival before"
    return f"remove it: the run goes on from the arrival before {number}"


def _names(value: Any) -> Iterator[str]:
    """Every name of kept bytes in a record."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from _names(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _names(entry)
    elif isinstance(value, str) and BLOB.fullmatch(value):
        yield value


def _blob(name: str) -> str:
    return f"{FOLDER}/blobs/{name}.bin"


def _file(number: int) -> str:
    return f"{FOLDER}/arrival-{number:04}.json"


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
