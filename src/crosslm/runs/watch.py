"""Following a run from another terminal, by its ``metrics.jsonl``."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crosslm.errors import RunError
from crosslm.privacy.bounds import hidden
from crosslm.runs.report import MEASURE_NAMES
from crosslm.runs.rundir import METRICS, SUMMARY, RunDir
from crosslm.support.plain import plain

PAUSE = 0.5
LAST_LINES = 8

Event = Mapping[str, Any]


def follow(run: RunDir, pause: Callable[[float], None] = time.sleep) -> Iterator[Event | None]:
    """The events of a run, those that there are and then those that come.

    Args:
        run: a run, whether it has begun, goes on or is over.
        pause: waits for so many seconds.

    Yields:
        An event, or None after each look that found no new one.

    Raises:
        RunError: a line is damaged.
    """
    path, at, last = run.path / METRICS, 0, None
    while True:
        has_stopped = not run.is_between_machines() and not run.is_locked()  # before its last lines are read
        over = has_stopped or (run.path / SUMMARY).is_file() or (last is not None and last["event"] == "end")
        news = b""
        if path.is_file():
            with path.open("rb") as file:
                at = _start_of_line(file, at)
                news = file.read()
        whole = news[: news.rfind(b"\n") + 1]  # the last line may be half written
        at += len(whole)
        for line in whole.splitlines():
            try:
                last = json.loads(line)
            except ValueError as error:
                raise RunError(f"{path}: damaged: {error}; run it again") from error
            yield last
        if not whole:
            if over:
                return
            yield None
            pause(PAUSE)


def _start_of_line(file: BinaryIO, at: int) -> int:
    """Go to this place or, where a run that goes on has taken the end of the file back, to the last line before it."""
    at = min(at, file.seek(0, os.SEEK_END))
    while at and file.seek(at - 1) >= 0 and file.read(1) != b"\n":
        at -= 1
    return file.seek(at)


def sentence(event: Event) -> str | None:
    """An event in a line, fit for a terminal; None for those that are only of use in a report."""
    words = _words(event)
    return None if words is None else plain(words)


def _words(event: Event) -> str | None:
    match event["event"]:
        case "start":
            if event.get("engine"):
                return "started; silos come when they are ready"
            return f"started, {len(event.get('specs', {}))} clients"
        case "upload":
            counts = event["class_counts"]
            rows = "number of private rows hidden" if hidden(counts) else f"{sum(counts)} private rows"
            return f"upload from {event['client_id']}: {rows}, {event['bytes'] / 1e6:.1f} MB of weights"
        case "step":
            judge = f", judge {event['judge/pool']:.3f}" if "judge/pool" in event else ""
            kd = f" (data-free KD {event['slm/data_free_kd']:.3f})" if "slm/data_free_kd" in event else ""
            moved = ""  # between machines nobody may know
            if "slm/standalone" in event and "slm/accuracy" in event:
                moved = f" {event['slm/standalone']:.3f} -> {event['slm/accuracy']:.3f}{kd}"
            return f"step {event['step']}: {event['client']}{moved}, reward {event['reward/pool']:+.2f}{judge}"
        case "closing":
            ends = "has been taught once more"  # between machines nobody may know more
            if "slm/crosslm" in event:
                ends = f"{event['slm/crosslm']:.3f}"
            if "slm/data_free_kd" in event:
                ends += f" (data-free KD {event['slm/data_free_kd']:.3f})"
            return f"in the end: {event['client']} {ends}"
        case "llm":
            figures = [f"{name} {event[name]:.3f}" for name in MEASURE_NAMES if name in event]
            return f"LLM {event['moment']}: {', '.join(figures)}"
        case "warning":
            return f"warning: {event['message']}"
        case "failure":
            return f"{'client ' + event['client'] if event['client'] else 'the server'} failed: {event['error']}"
        case "gate" if not event["passed"]:
            what = "is taught and has no say" if "step" in event else "was quarantined"
            return f"the upload of client {event['client']} {what}: {event['reason']}"
        case "end":
            return f"the run ended: {event['error']}"
        case _:
            return None


def watch(run: RunDir, console: Console, pause: Callable[[float], None] = time.sleep) -> bool:
    """Show a run until it ends: a table that is kept up on a terminal, a line for each event elsewhere.

    Returns:
        Whether the run completed.

    Raises:
        RunError: ``metrics.jsonl`` is damaged.
    """
    if console.is_terminal:
        view = _View(run)
        with Live(console=console, get_renderable=view.render, refresh_per_second=2):
            for event in follow(run, pause):
                if event is not None:
                    view.add(event)
    else:
        for event in follow(run, pause):
            words = sentence(event) if event else None
            if words:
                console.print(words, highlight=False, markup=False, soft_wrap=True)
    is_complete = (run.path / SUMMARY).is_file()
    if not is_complete and not run.is_between_machines():
        console.print(f"The run has stopped. To go on: {run.resuming()}", highlight=False, markup=False, soft_wrap=True)
    return is_complete


class _View:
    """What a terminal shows: the arrivals so far and the last lines."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._steps: list[Event] = []
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._time: float | None = None

    def add(self, event: Event) -> None:
        self._time = event.get("time")
        if event["event"] == "step":
            self._steps.append(event)
        words = sentence(event)
        if words:
            self._lines.append(words)

    def render(self) -> Group:
        since = "" if self._time is None else f", last news {max(time.time() - self._time, 0):.0f} s ago"
        parts: list[Text | Table] = [Text(f"{self._run.path}{since}  (Ctrl-C stops watching, not the run)")]
        if self._steps:
            parts.append(self._table())
        return Group(*parts, *(Text(line) for line in self._lines))

    def _table(self) -> Table:
        table = Table(title="SLM accuracy (–: not known here)", title_justify="left")
        table.add_column("arrival")
        table.add_column("client")
        for name in ("Standalone", "CrossLM", "reward", "judge"):
            table.add_column(name, justify="right")
        for event in self._steps:
            judge = event.get("judge/pool")
            table.add_row(
                str(event["step"]),
                Text(event["client"]),
                *("–" if name not in event else f"{event[name]:.3f}" for name in ("slm/standalone", "slm/accuracy")),
                f"{event['reward/pool']:+.2f}",
                "" if judge is None else f"{judge:.3f}",
            )
        return table
