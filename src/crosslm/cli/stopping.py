"""Ctrl-C: a stop at the next safe point."""

import signal
from types import FrameType

from crosslm.cli.app import errors


class StopRequest:
    """The first Ctrl-C asks for a stop at the next safe point; the second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked

    def listen(self) -> "StopRequest":
        """Hear Ctrl-C from now on."""
        signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        errors.print("stopping after this arrival; Ctrl-C again stops at once, and loses only this arrival's work")
