"""The run folder: the only place that writes what a run leaves behind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslm.config import Config
from crosslm.errors import RunError
from crosslm.runs.folders import KIT_FILE, kits_in, listed, make_private
from crosslm.runs.synthetic_rows import as_lines, read_receipts_of, read_texts
from crosslm.support.commands import command
from crosslm.support.files import (
    PARTIAL,
    alone,
    append_line,
    clear_partial,
    is_held,
    missing,
    replace_folder,
    whole_lines,
    write_whole,
)
from crosslm.support.writing import writing

if TYPE_CHECKING:  # the commands that only read a run must not wait for torch
    from torch import Tensor

    from crosslm.models.llm import LLM
    from crosslm.models.slm import SLM
    from crosslm.records import Receipt, SyntheticSet, Upload

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
METHODS = ("standalone", "data_free_kd", "crosslm")
CLOSING_POOL = "closing-pool"
"""Name of the texts that all learn from when no more uploads come."""
SEEDS = "seeds.json"
"""Of a folder with runs of several seeds: what they have in common."""
LOCK, ROLLBACK = ".lock", "rollback.json"
SESSIONS = "sessions.jsonl"
ENGINE = "flower"
"""What carried the messages of a run between machines: a field of its first event and of its summary."""
AGAIN = "and give the same command again"
GO_ON = f"{AGAIN}, crosslm run with --resume: nothing that was there is lost"


class RunDir:
    """``config.toml``, ``metrics.jsonl``, ``summary.json``, ``synthetic/``, ``uploads/``, ``slm/``, ``llm/``."""

    def __init__(self, path: Path, hint: str = "") -> None:
        self.path = path
        self._hint = hint
        """What to do where it cannot be written, if neither to go on with the run nor to give the command again."""
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with every event after it is written."""

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Find out that a new run may be written here.

        Raises:
            RunError: the folder holds something already.
        """
        begun = (LOCK, CONFIG + PARTIAL)  # by a run that was killed before it was one
        if path.is_file() or (path.is_dir() and any(entry.name not in begun for entry in path.iterdir())):
            unfinished = (path / CONFIG).exists() and not (path / SUMMARY).exists()
            what = "another run" if (path / CONFIG).exists() else "other files"
            hint = f", or go on with it: {cls(path).resuming()}" if unfinished else ""
            raise RunError(f"{path}: holds {what} already and nothing is written over; choose another --output{hint}")

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDir:
        """A new run folder with the resolved configuration in it, for its owner alone to read.

        A folder that is there already keeps the rights that it has.

        Raises:
            RunError: the folder holds something already, or cannot be written.
        """
        cls.check_free(path)
        try:
            make_private(path)
            run = cls(path)
            run.write(CONFIG, config.dump())
        except OSError as error:
            raise RunError(f"{path}: cannot be written; choose another --output: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run folder.

        Raises:
            RunError: there is no run in it.
        """
        if (path / KIT_FILE).is_file():
            raise RunError(f"{path}: is a server's kit; its run folder is {path / 'run'}: give that")
        if not (path / CONFIG).is_file() and cls(path).is_locked():
            raise RunError(f"{path}: its run has not begun yet, models are being loaded; try again in a minute")
        if not path.exists():
            raise RunError(f"{missing(path)}; give a run folder that crosslm run has made")
        if not (path / CONFIG).is_file() and (runs := listed(path.glob(f"seed-*/{CONFIG}"))):
            raise RunError(f"{path}: has runs of several seeds; give one of them: {runs}")
        if not (path / CONFIG).is_file() and (kits := kits_in(path)):
            raise RunError(f"{path}: has the kits of a federation in it; give one of them: {kits}")
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: not a run folder (it has no {CONFIG}); give one that crosslm run has made")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from working in this folder; a process that dies lets go by itself.

        Raises:
            RunError: another one is at work here, or the folder cannot be written.
        """
        with ExitStack() as held:
            try:
                make_private(self.path)
                held.enter_context(alone(self.path / LOCK))
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process is at work on this run; wait for it, stop it, or use another folder"
                ) from error
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written: {error}; choose another --output") from error
            yield

    def is_locked(self) -> bool:
        """Whether a process is at work here."""
        return is_held(self.path / LOCK)

    def write(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        self.write_data(name, text.encode("utf-8"))

    def write_data(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all (:func:`crosslm.support.files.write_whole`).

        Raises:
            RunError: it cannot be written; what was there before is still there.
        """
        target = self.path / name
        with writing(target, self._what_then()):
            write_whole(target, [data])

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to ``metrics.jsonl``, at once and whole.

        Raises:
            RunError: it cannot be written; the events before it are still there.
        """
        event = {"event": kind, "time": round(time.time(), 3), **fields}
        with writing(self.path / METRICS, self._what_then()):
            append_line(self.path / METRICS, json.dumps(event, ensure_ascii=False))
        for listen in self.listeners:
            listen(event)

    def keep_events(self) -> int:
        """Bring ``metrics.jsonl`` to the disk; gives its size.

        Raises:
            RunError: it cannot be written.
        """
        with writing(self.path / METRICS, self._what_then()), (self.path / METRICS).open("a") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def go_back(self, events: int) -> None:
        """Take away what was written after ``metrics.jsonl`` had this size and could not be finished.

        Raises:
            RunError: it is shorter, or its lines end elsewhere: what happened before would be lost without a word.
        """
        path = self.path / METRICS
        if path.exists() or events:
            kept = path.read_bytes()[:events] if path.exists() else b""
            if len(kept) < events or not kept.endswith(b"\n" if events else b""):
                raise RunError(
                    f"{path}: has lost its end (or other lines), and a checkpoint knows of {events} bytes; put it back "
                    f"as it was, or run the {CONFIG} beside it again with another --output"
                )
            with path.open("r+b") as file:
                file.truncate(events)
        clear_partial(self.path)

    def note_session(self, kind: str) -> None:
        """Append a line to ``sessions.jsonl``: a process began to work here. No part of the run's results.

        Raises:
            RunError: it cannot be written.
        """
        line = json.dumps({"event": kind, "time": round(time.time(), 3), "pid": os.getpid()})
        with writing(self.path / SESSIONS, self._what_then()):
            append_line(self.path / SESSIONS, line)

    def barred(self) -> list[str]:
        """Clients that a rollback has shut out from the beginning of this folder's own arrivals."""
        return list(self._rollback().get("clients", []))

    def rolled_back_from(self) -> list[str]:
        """The names of the runs that ``crosslm rollback`` copied this one from, the first one first."""
        earlier = self._rollback().get("of", [])
        return [earlier] if isinstance(earlier, str) else list(earlier)  # older versions knew of one alone

    def _rollback(self) -> dict[str, Any]:
        path = self.path / ROLLBACK
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened so far."""
        return [json.loads(line) for line in whole_lines(self.path / METRICS)]

    def is_between_machines(self) -> bool:
        """Whether this is a run of ``crosslm server``, whose private rows and silos are elsewhere."""
        lines = whole_lines(self.path / METRICS)
        return any(f'"engine": "{ENGINE}"' in line and json.loads(line)["event"] == "start" for line in lines)

    def check_in_one_process(self, wish: str) -> None:
        """Find out that all clients of this run were in one process.

        Args:
            wish: what is to be done, as in "cannot be WISH".

        Raises:
            RunError: they were not; what is wanted needs private rows, which are at the silos.
        """
        if self.is_between_machines():
            raise RunError(
                f"{self.path}: is of a run between machines and cannot be {wish} here: private rows, and the training "
                "on them, are at the silos. Give a run of crosslm run with rows of your own and the same configuration"
            )

    def save_synthetic(
        self,
        name: str,
        labels: tuple[str, ...],
        synthetic: SyntheticSet,
        rewards: Tensor | None = None,
        receipts: list[Receipt] | None = None,
        receipts_of: Mapping[str, Sequence[Receipt]] | None = None,
    ) -> None:
        """Write texts with all that is known of each (:func:`crosslm.runs.synthetic_rows.as_lines`)."""
        self.write(f"synthetic/{name}.jsonl", as_lines(labels, synthetic, rewards, receipts, receipts_of))

    def synthetic(self, name: str, labels: tuple[str, ...]) -> SyntheticSet:
        """The texts that :meth:`save_synthetic` wrote under this name.

        Raises:
            RunError: they cannot be read.
        """
        return read_texts(self.path / "synthetic" / f"{name}.jsonl", labels)

    def receipts_of(self, name: str) -> dict[str, list[Receipt]]:
        """The receipts by client that :meth:`save_synthetic` wrote with texts for several.

        Raises:
            RunError: they cannot be read.
        """
        return read_receipts_of(self.path / "synthetic" / f"{name}.jsonl")

    def save_quarantined(self, name: str, upload: bytes, reason: str, figures: dict[str, float]) -> Path:
        """Keep an upload that may not be used, and why; gives where."""
        self.write_data(f"quarantine/{name}.safetensors", upload)
        self.write(f"quarantine/{name}.json", json.dumps({"reason": reason, **figures}, indent=2) + "\n")
        return self.path / "quarantine"

    def save_predictions(self, name: str, gold: Sequence[int], predicted: Sequence[int]) -> None:
        """Write what was predicted for each row beside what is right, as places in the task's labels."""
        self.write(f"predictions/{name}.json", json.dumps({"gold": gold, "predicted": predicted}) + "\n")

    def save_slm(self, client_id: str, slm: SLM, folder: str = "slm") -> None:
        """Write a classifier folder for transformers."""
        self._write_folder(f"{folder}/{client_id}", slm.save)

    def save_upload(self, upload: Upload) -> None:
        """Write a client's classifier as it came, for ``crosslm audit``; a later one takes the place of an earlier."""
        from crosslm.models.slm import SLM

        self.save_slm(upload.client_id, SLM.from_state(upload.slm, upload.slm.labels), "uploads")

    def save_llm(self, llm: LLM) -> None:
        """Write the adapter folder for PEFT, or the whole model after full fine-tuning."""
        self._write_folder("llm", llm.save)

    def _write_folder(self, name: str, save: Callable[[str], None]) -> None:
        """Write a folder whole or not at all (:func:`crosslm.support.files.replace_folder`).

        Raises:
            RunError: it cannot be written; what was there before is still there.
        """
        target = self.path / name
        with writing(target, self._what_then()):
            replace_folder(target, lambda folder: save(str(folder)))

    def resuming(self) -> str:
        """The command that goes on with this run."""
        if self.is_between_machines():
            return command("server", self.path.parent)
        return command("run", self.path / CONFIG, "--output", self.path, "--resume")

    def _what_then(self) -> str:
        """What to do when a file that could not be written can be: a run goes on, of a complete one nothing is left."""
        return self._hint or (AGAIN if (self.path / SUMMARY).exists() else GO_ON)

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its presence says that the run is complete."""
        self.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def summary(self, also: Iterable[str] = ()) -> dict[str, Any]:
        """Read ``summary.json``.

        Args:
            also: what it must have beside the accuracies and the clients.

        Raises:
            RunError: the run has not been completed, or the file is damaged.
        """
        path = self.path / SUMMARY
        if not path.is_file():
            how = f"go on with it: {self.resuming()}"
            if self.is_locked():
                how = f"it is at work: {command('watch', self.path)}"
            if self.is_between_machines():
                seen = command("status", self.path.parent)
                how = f"start it again with {self.resuming()}, and see with {seen} who is waited for"
            raise RunError(f"{self.path}: the run is not complete (it has no {SUMMARY}); {how}")
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path}: damaged; run the {CONFIG} beside it again: {error}") from error
        if lacking := _lacking(loaded, also):
            raise RunError(
                f"{path}: has no {', '.join(lacking)}: damaged, or of an earlier version; "
                f"run the {CONFIG} beside it again"
            )
        return loaded


def _lacking(summary: Any, also: Iterable[str]) -> list[str]:
    """What a summary does not have of all that is read of one."""
    if not isinstance(summary, dict):
        return ["figures (it must be an object)"]
    slm, clients = summary.get("slm"), summary.get("clients")
    are_there = isinstance(slm, dict) and all(isinstance(slm.get(method), dict) for method in METHODS)
    lacking = [] if are_there else [f"figures of classifiers (slm with {', '.join(METHODS)})"]
    lacking += [] if isinstance(clients, dict) else ["clients"]
    return lacking + [name for name in also if name not in summary]
