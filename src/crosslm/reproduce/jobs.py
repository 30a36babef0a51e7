"""Doing many cells: one after the other, or several at a time in processes of their own.

A run of a small model leaves most of a GPU idle, so that several get more done there. Two CPU cores are full with one.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from crosslm.errors import CrosslmError
from crosslm.models.sources import resolve_device
from crosslm.reproduce.plan import RUN, Cell, Choice
from crosslm.reproduce.store import Store
from crosslm.reproduce.work import do, settings_of
from crosslm.support.progress import Display, Silent
from crosslm.support.provenance import commit, machine, versions
from crosslm.support.quiet import quiet_libraries

logger = logging.getLogger(__name__)

PROCESSES = multiprocessing.get_context("spawn")  # what has used CUDA cannot be forked


@dataclass(frozen=True)
class Work:
    """What every cell is done with."""

    choice: Choice
    output: Path
    cache: Path
    llm_cache: Path | None = None
    """Of what the LLM does in runs, for all cells."""
    commit: str = field(default_factory=commit)
    """Of the code that is loaded when this is made, whatever comes later."""
    versions: dict[str, str] = field(default_factory=versions)

    def do(self, cell: Cell, display: Display) -> list[str]:
        """Do a cell and keep it.

        Returns:
            A line if it failed, since one that fails must not cost a night's others.

        Raises:
            CrosslmError: the device cannot be used, or the cell cannot be kept: so it would be with all others.
        """
        store, started = Store(self.output, self.choice.split), time.perf_counter()
        device = resolve_device(self.choice.cell_config(cell).device)
        origin = {"commit": self.commit, "machine": machine(device), "date": time.strftime("%Y-%m-%d")}
        settings = settings_of(cell, self.choice)  # as they are now: a file may be changed while it runs
        try:
            figures: dict[str, Any] = do(cell, self.choice, store, self.cache, display, self.llm_cache)
        except CrosslmError as error:
            return [f"{cell.path}: {error}"]
        except Exception as error:  # as memory that is short, or a mistake of ours: the others are done all the same
            logger.exception("%s failed", cell.path, exc_info=error)
            return [f"{cell.path}: {type(error).__name__}: {error}"]
        # a run that was gone on with knows of the time before
        seconds = max(round(time.perf_counter() - started, 2), figures.get("run_seconds", 0.0))
        made = {"versions": self.versions, "seconds": seconds, "settings": settings, "figures": figures}
        store.keep(cell, origin | made)
        if cell.stage == RUN:
            store.drop_unneeded(cell)
        return []


def one_by_one(cells: Sequence[Cell], work: Work, display: Display) -> Generator[list[str], None, None]:
    """Do cells in this process; for each the lines of what failed.

    Raises:
        CrosslmError: as :meth:`Work.do`.
    """
    for number, cell in enumerate(cells, start=1):
        display.note(f"cell {number} of {len(cells)}: {cell.path}")
        yield work.do(cell, display)


def side_by_side(cells: Sequence[Cell], work: Work, display: Display, jobs: int) -> Generator[list[str], None, None]:
    """Do cells in so many processes at a time; for each part of them the lines of what failed.

    A run and what begins with its LLM is one part, in that order. Whatever ends this, ends the processes. These begin
    with an import of the main module, as ``multiprocessing`` says of ``spawn``.

    Raises:
        CrosslmError: as :meth:`Work.do`.
    """
    parts: dict[Path, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(Path(cell.path).parent, []).append(cell)
    processes = _Processes(work, display, jobs)
    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(processes.do, part): place for place, part in parts.items()}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                yield future.result()
                display.note(f"part {number} of {len(parts)} has ended: {futures[future].as_posix()}")
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            processes.end()


class _Processes:
    """Those that are at work, each started by a thread of its own."""

    def __init__(self, work: Work, display: Display, jobs: int) -> None:
        self._work, self._display = work, display
        self._threads = max(1, torch.get_num_threads() // jobs)
        self._running: list[BaseProcess] = []
        self._lock, self._has_ended = threading.Lock(), False

    def end(self) -> None:
        """End those that run; no other is started."""
        with self._lock:
            self._has_ended = True
            for process in self._running:
                process.terminate()

    def do(self, part: list[Cell]) -> list[str]:
        """Do cells in a new process, which takes no others with it when it dies; lines of what failed."""
        started = self._start(part)
        if started is None:
            return []
        process, receiver = started
        failed: list[str] = []
        left = list(part)
        try:
            while left:
                said = receiver.recv()
                if isinstance(said, CrosslmError):
                    raise said
                failed += said
                left.pop(0)
        except (EOFError, OSError):
            process.join()
            died = f"its process ended with code {process.exitcode}; what it printed says why"
            failed.append(f"{left[0].path}: {died}; if memory was short, try fewer --jobs")
            return failed + (self.do(left[1:]) if left[1:] else [])
        finally:
            process.join()
            with self._lock:
                self._running.remove(process)
        return failed

    def _start(self, part: list[Cell]) -> tuple[BaseProcess, Connection] | None:
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_do_part, args=(part, self._work, self._threads, sender), daemon=True)
        # an interrupt from a terminal goes to all its processes; they are ended by this one
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with self._lock:
            if self._has_ended:
                return None
            process.start()
            self._running.append(process)
        sender.close()
        self._display.note(f"begun: {', '.join(cell.path for cell in part)}")
        return process, receiver


def _do_part(part: list[Cell], work: Work, threads: int, sender: Connection) -> None:
    """In the process: each cell, and then what failed of it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    torch.set_num_threads(threads)
    work = replace(work, commit=commit(), versions=versions())  # of what was loaded here
    try:
        for cell in part:
            sender.send(work.do(cell, Silent()))
    except CrosslmError as error:
        sender.send(error)


def _end_with_parent() -> None:
    """End this process when the one that started it has been killed, which could not end it any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
