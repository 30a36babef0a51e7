"""How a stage tells what it is doing. The library only calls; the command line draws."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[float], None]


class Display(Protocol):
    """Shows one stage at a time."""

    def stage(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Show a stage; the function that it gives is called with what was done since."""

    def note(self, message: str) -> None:
        """Show a line of news."""


class Silent:
    """A display that shows nothing."""

    def stage(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Do nothing with it."""
        return nullcontext(lambda _: None)

    def note(self, message: str) -> None:
        """Do nothing with it."""


class Progress:
    """Times the stages of a run by name and passes them to a display."""

    def __init__(self, display: Display | None = None) -> None:
        self.display = display or Silent()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str, detail: str, total: float, unit: str) -> Iterator[Advance]:
        """Run a stage: ``name`` is what its time is added to, ``detail`` what is shown."""
        started = time.perf_counter()
        with self.display.stage(f"{name}: {detail}" if detail else name, total, unit) as advance:
            try:
                yield advance
            finally:
                self.seconds[name] += time.perf_counter() - started

    def note(self, message: str) -> None:
        """Pass a line of news to the display."""
        self.display.note(message)
