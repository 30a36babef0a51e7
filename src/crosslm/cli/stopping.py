"""Ctrl-C: a stop at the next safe point."""

import signal
from types import FrameType, TracebackType
from typing import Self

from crosslm.cli.app import errors


class StopRequest:
    """The first Ctrl-C asks for a stop at the next safe point; the second one ends the process at once.

    A context: Ctrl-C is heard within it, and does afterwards what it did before.
    """

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked

    def __enter__(self) -> Self:
        """Hear Ctrl-C from now on."""
        self._former = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Put the former handler back."""
        # None: it was not set from Python, and cannot be set again from there
        signal.signal(signal.SIGINT, signal.SIG_DFL if self._former is None else self._former)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        errors.print("stopping after this arrival; Ctrl-C again stops at once, and loses only this arrival's work")
