"""Doing many cells: one after the other, or several at a time in processes of their own.

A run of a small model leaves most of a GPU idle, so that several get more done there. Two CPU cores are full with one.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from crosslm.errors import CrosslmError
from crosslm.models.sources import resolve_device
from crosslm.progress import Display, Silent
from crosslm.provenance import commit, machine
from crosslm.quiet import quiet_libraries
from crosslm.reproduce.plan import RUN, Cell, Choice
from crosslm.reproduce.store import Store
from crosslm.reproduce.work import do, settings_of
from crosslm.rundir import versions


@dataclass(frozen=True)
class Work:
    """What every cell is done with."""

    choice: Choice
    output: Path
    cache: Path
    commit: str
    versions: dict[str, str]

    @classmethod
    def begin(cls, choice: Choice, output: Path, cache: Path) -> "Work":
        """With the code as it is loaded now, whatever comes later."""
        return cls(choice, output, cache, commit(), versions())

    def do(self, cell: Cell, display: Display) -> list[str]:
        """Do a cell and keep it; a line if it failed, since one that fails must not cost a night's others."""
        store, started = Store(self.output, self.choice.split), time.perf_counter()
        device = resolve_device(self.choice.cell_config(cell).device)
        origin = {"commit": self.commit, "machine": machine(device), "date": time.strftime("%Y-%m-%d")}
        settings = settings_of(cell, self.choice)  # as they are now: a file may be changed while it runs
        try:
            figures: dict[str, Any] = do(cell, self.choice, store, self.cache, display)
        except CrosslmError as error:
            return [f"{cell.path}: {error}"]
        # a run that was gone on with knows of the time before
        seconds = max(round(time.perf_counter() - started, 2), figures.get("run_seconds", 0.0))
        made = {"versions": self.versions, "seconds": seconds, "settings": settings, "figures": figures}
        store.keep(cell, origin | made)
        if cell.stage == RUN:
            store.drop_unneeded(cell)
        return []


def one_by_one(cells: Sequence[Cell], work: Work, display: Display) -> Iterator[list[str]]:
    """Do cells in this process; for each the lines of what failed."""
    for number, cell in enumerate(cells, start=1):
        display.note(f"cell {number} of {len(cells)}: {cell.path}")
        yield work.do(cell, display)


def side_by_side(cells: Sequence[Cell], work: Work, display: Display, jobs: int) -> Iterator[list[str]]:
    """Do cells in so many processes at a time; for each part of them the lines of what failed.

    A run and what begins with its LLM is one part, in that order. Whatever ends this, ends the processes.
    """
    parts: dict[Path, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(Path(cell.path).parent, []).append(cell)
    running: list[BaseProcess] = []
    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(_in_a_process, part, work, jobs, running): part for part in parts.values()}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                names = ", ".join(cell.stage for cell in futures[future])
                where = Path(futures[future][0].path).parent
                display.note(f"part {number} of {len(parts)} has ended: {where.as_posix()}: {names}")
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()


def _in_a_process(part: list[Cell], work: Work, jobs: int, running: list[BaseProcess]) -> list[str]:
    """Do cells in a new process, which a crash or too little memory cannot take the others with."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_do_part, args=(part, work, jobs, sender), daemon=True)
    process.start()
    running.append(process)
    sender.close()
    failed: list[str] = []
    left = list(part)
    try:
        while left:
            failed += receiver.recv()
            left.pop(0)
    except EOFError:
        process.join()
        code = f"ended with code {process.exitcode}"
        failed.append(f"{left[0].path}: its process {code}; if memory was short, try fewer --jobs")
    process.join()
    running.remove(process)
    return failed


def _do_part(part: list[Cell], work: Work, jobs: int, sender: Connection) -> None:
    """In the process: each cell, and then what failed of it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    try:
        for cell in part:
            sender.send(work.do(cell, Silent()))
    except KeyboardInterrupt:
        os._exit(1)  # whoever started it says so


def _end_with_parent() -> None:
    """End this process when the one that started it has been killed, which could not end it any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
