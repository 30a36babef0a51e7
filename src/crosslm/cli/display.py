"""Progress on the terminal: a bar with rate and time left, or plain lines where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from crosslm.support.progress import Advance, Display

PLAIN_SECONDS = 15.0


class _Rate(ProgressColumn):
    """Things done a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.1f} {task.fields['unit']}/s", style="dim")


class BarDisplay:
    """One live bar a stage, which becomes a line when the stage ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Show a stage."""
        described = TextColumn("{task.description}", markup=False)  # a label may be [good]
        columns = (SpinnerColumn(finished_text="✓"), described, BarColumn(bar_width=20))
        with Progress(*columns, _Rate(), TimeRemainingColumn(elapsed_when_finished=True), console=self._console) as bar:
            task = bar.add_task(title, total=total, unit=unit)
            yield lambda done: bar.update(task, advance=done)
            bar.update(task, completed=total)

    def note(self, message: str) -> None:
        """Show a line of news."""
        self._console.print(message, highlight=False, markup=False)


class PlainDisplay:
    """A line when a stage starts, one every 15 seconds, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Show a stage."""
        started = last = time.monotonic()
        finished = 0.0
        self.note(f"{title} ({total:g} {unit})")

        def advance(done: float) -> None:
            nonlocal finished, last
            finished += done
            now = time.monotonic()
            if now - last >= PLAIN_SECONDS and finished:
                last = now
                rate = finished / (now - started)
                left = (total - finished) / rate
                self.note(f"  {title}: {finished:g}/{total:g} {unit}, {rate:.1f}/s, {left:.0f} s left")

        yield advance
        self.note(f"  done in {time.monotonic() - started:.1f} s")

    def note(self, message: str) -> None:
        """Show a line of news."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


def display_for(console: Console) -> Display:
    """Bars on a terminal, plain lines elsewhere."""
    return BarDisplay(console) if console.is_terminal else PlainDisplay(console)
