"""Cells that take a moment or never end, for processes of their own, which import nothing else of the tests."""

import os
import time
from pathlib import Path

from crosslm.errors import RunError
from crosslm.reproduce.jobs import Work, side_by_side
from crosslm.reproduce.plan import Cell, Variation
from crosslm.support import provenance
from crosslm.support.progress import Silent

BASE = Variation("base")
BOTH = [Cell("sst2", "paper", BASE, 0, "run"), Cell("sst2", "ceiling", BASE, 0, "ceiling")]
THREE = [Cell("sst2", "paper", BASE, 0, stage) for stage in ("run", "cola", "rte")]


class Dying(Work):
    """Stands in for a process that is killed for its memory."""

    def do(self, cell, display):
        if cell.stage == "run":
            os._exit(9)
        return [f"{cell.path}: as usual"]


class Recording(Work):
    """Cells of a moment, each longer than the next."""

    def do(self, cell, display):
        time.sleep({"run": 1.0, "cola": 0.5}.get(cell.stage, 0))
        with (self.output / "order").open("a") as file:
            file.write(f"{cell.method} {cell.stage} {os.getpid()} {self.commit == provenance.commit()}\n")
        return []


class Failing(Work):
    """As with a disk that is full."""

    def do(self, cell, display):
        with (self.output / "begun").open("a") as file:
            file.write(f"{cell.method}\n")
        raise RunError("cannot be written; choose another --output")


class Sleeping(Work):
    """A run that would take an hour."""

    def do(self, cell, display):
        if cell.stage == "run":
            (self.output / "pid.partial").write_text(str(os.getpid()))
            (self.output / "pid.partial").rename(self.output / "pid")
            time.sleep(3600)
        return []


def sleep_side_by_side(folder):
    """In another process, which is killed."""
    list(side_by_side(THREE[:1], Sleeping(None, Path(folder), None), Silent(), 2))
