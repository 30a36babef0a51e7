"""What a silo remembers on its own disk from one request of the server to the next, and its private text.

The client application may run in a new process for each message, so everything is kept in the kit's
``state`` folder. Nothing here loads a model, or PyTorch: the process that stays connected needs neither.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosslm.config import DataConfig
from crosslm.data.examples import Examples
from crosslm.data.texts import is_there, load_examples
from crosslm.errors import DataError, KeptFileError
from crosslm.federation.kits import SILO_FILE, SiloSettings, read_silo
from crosslm.support.files import partial_of, rename, write_whole


class SiloState:
    """A silo's kit, its private text, and how far it has come."""

    def __init__(self, kit: Path) -> None:
        """Open a kit.

        Raises:
            FederationError: it is not a silo's.
        """
        self.kit = kit
        self.settings: SiloSettings = read_silo(kit)
        self.state = kit / "state"

    @property
    def installed(self) -> int:
        """How many rounds are complete: uploaded, enhanced and installed."""
        path = self.state / "installed.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0

    @property
    def agreed(self) -> int:
        """Rounds that this silo agrees to; the closing download counts as one more."""
        return self.settings.max_participations + self.settings.closing

    @property
    def complete(self) -> int:
        """How many of them are complete; all, where the server has sent its closing download or says there is none."""
        return self.agreed if self.closed is not None else self.installed

    @property
    def answered(self) -> int:
        """How many downloads this silo has answered to."""
        return self.installed + (self.closed is not None and not self.closed.get("none"))

    @property
    def closed(self) -> dict[str, Any] | None:
        """What was done with the closing download and why, ``none`` where there is none; None where that is open."""
        path = self.state / "closed.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @property
    def confirmed(self) -> bool:
        """Whether all rounds are complete and the server was told so."""
        path = self.state / "confirmed.json"
        told = int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0
        return told >= self.agreed

    def confirm(self) -> None:
        """Remember that the server was told of all rounds that are complete."""
        told = {"rounds": self.complete, "time": time.time()}
        self._write(self.state / "confirmed.json", [json.dumps(told).encode()])

    def nothing_more(self) -> None:
        """The server says that no more comes to this silo."""
        now = self.doing()
        refused = {"last_refused": now["why"]} if now and now["now"] == "refused" and not self.installed else {}
        self._close({"accepted": False, "rows": 0, "none": True, **refused})

    def _close(self, decision: Mapping[str, Any]) -> None:
        kept = {**decision, "rounds": self.installed}
        self._write(self.state / "closed.json", [json.dumps(kept, indent=1).encode()])
        self.now("closed")

    def _complete(self, number: int, decision: Mapping[str, Any]) -> None:
        self._write(self.state / f"decision-{number:04}.json", [json.dumps(dict(decision), indent=1).encode()])
        self._write(self.state / "installed.json", [json.dumps({"rounds": number + 1, "time": time.time()}).encode()])
        self.now("complete", number)

    def now(self, what: str, number: int | None = None, why: str = "") -> None:
        """Remember for ``crosslm status`` what goes on since now: training, waiting, complete or refused."""
        fields = {"now": what, "round": number, "why": why, "since": time.time(), "pid": os.getpid()}
        self._write(self.state / "now.json", [json.dumps(fields).encode()])

    def doing(self) -> dict[str, Any] | None:
        """What goes on at this silo, as :meth:`now` was told last; None before anything did."""
        path = self.state / "now.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def decision(self, number: int) -> dict[str, Any]:
        """What was done with the SLM that a round brought, and why."""
        path = self.state / f"decision-{number:04}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def private(self, warn: Callable[[str], None] = lambda _: None) -> Examples:
        """The private rows; ``warn`` is told of rows that were left out.

        Raises:
            DataError: the file is not there or cannot be used; names file and row.
        """
        data, name = self._data(), self.settings.data.train
        if not is_there(name, data):
            raise DataError(
                f"{Path(data.dir) / name}: no such file; put the labelled text there, "
                f"or change [data] of {self.kit / SILO_FILE}"
            )
        rows = self._rows(name, warn)
        if not len(rows):
            raise DataError(f"{self.kit / SILO_FILE}: data.train = {name!r} has no usable rows; put some there")
        return rows

    def test(self, warn: Callable[[str], None] = lambda _: None) -> Examples | None:
        """The rows of ``data.test``; None where it is not set or not there, or has no rows.

        Raises:
            DataError: the file cannot be used; names file and row.
        """
        name = self.settings.data.test
        if name is None or not is_there(name, self._data()):
            return None
        return self._rows(name, warn) or None

    def _data(self) -> DataConfig:
        data = self.settings.data
        return DataConfig(
            dir=str((self.kit / data.dir).absolute()),
            train=data.train,
            test=data.test or data.train,
            text_column=data.text_column,
            label_column=data.label_column,
            encoding=data.encoding,
            label_names=data.label_names,
            skip_labels=data.skip_labels,
        )

    def _rows(self, name: str, warn: Callable[[str], None]) -> Examples:
        loaded = load_examples(name, self._data(), self.settings.labels)
        for warning in loaded.warnings():
            warn(warning)
        return loaded.examples

    def receipts(self) -> list[dict[str, Any]]:
        """What left this silo so far, one receipt an upload."""
        paths = sorted((self.state / "receipts").glob("upload-*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _keep_receipt(self, kind: str, number: int, receipt: Mapping[str, Any]) -> None:
        """Keep what leaves, before it does."""
        kept = {"time": time.time(), "server": self.settings.server, **receipt}
        path = self.state / "receipts" / f"{kind}-{number:04}.json"
        self._write(path, [(json.dumps(kept, indent=1) + "\n").encode()])

    def _sent(self, number: int) -> Path:
        return self.state / f"upload-{number:04}.safetensors"

    def _metadata(self, number: int) -> Path:
        return self.state / f"upload-{number:04}.json"

    def _unrounded(self, number: int) -> Path:
        return self.state / f"trained-{number:04}.safetensors"

    def _downloaded(self, number: int) -> Path:
        return self.state / f"download-{number:04}.safetensors"

    def _write(self, path: Path, parts: Iterable[bytes]) -> None:
        """Write a file of the state whole; what is there is for its owner alone."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, parts)

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a file whole, and before it its SHA-256, so that every file has one."""
        self._write(_digest_of(path), [hashlib.sha256(data).hexdigest().encode()])
        self._write(path, [data])

    @contextmanager
    def _incoming(self, parts: Iterable[bytes]) -> Iterator[Path]:
        """What comes in parts, in a file for as long as it is looked at, unless :meth:`_keep_file` gives it a name."""
        path = self.state / "incoming.safetensors"
        try:
            self._write(path, parts)
            yield path
        finally:
            path.unlink(missing_ok=True)
            partial_of(path).unlink(missing_ok=True)

    def _keep_file(self, path: Path, file: Path) -> None:
        """Keep a file that is in the same folder as :meth:`_keep` would, under this name."""
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        self._write(_digest_of(path), [digest.encode()])
        rename(file, path)

    def _was_kept(self, path: Path) -> bool:
        """Whether :meth:`_keep` has written a file of this name, though it may be gone."""
        return path.exists() or _digest_of(path).exists()

    def _kept(self, path: Path) -> bytes:
        """What :meth:`_keep` wrote.

        Raises:
            KeptFileError: it cannot be read, or has changed. Nothing is decided then: put back, all goes on.
        """
        hint = f"{path.name} and {_digest_of(path).name} back as they were, from a copy of the kit"
        try:
            data, digest = path.read_bytes(), _digest_of(path).read_bytes()
        except OSError as error:
            raise KeptFileError(
                f"silo {self.settings.id}: {error.filename} cannot be read: {error.strerror}; put {hint}"
            ) from error
        if hashlib.sha256(data).hexdigest().encode() != digest:
            raise KeptFileError(f"silo {self.settings.id}: {path} has changed since it was written; put {hint}")
        return data


def _digest_of(path: Path) -> Path:
    """The file beside a kept one that has its SHA-256."""
    return path.with_name(path.name + ".sha256")
