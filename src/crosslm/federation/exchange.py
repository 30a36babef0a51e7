"""The seam between the method and whatever carries messages, and the asynchronous loop."""

from collections.abc import Callable
from typing import Protocol

from crosslm.errors import UploadError
from crosslm.records import Download, Upload
from crosslm.server import Server, StepRecord


class Exchange(Protocol):
    """Brings uploads in the order of their arrival and takes downloads back."""

    def receive(self) -> Upload | None:
        """The next upload that has arrived, or None when nobody is waiting."""

    def send(self, download: Download) -> None:
        """Return an enhanced SLM to its client."""


class Journal(Protocol):
    """Is told what happens, and keeps what it wants of it."""

    def uploaded(self, upload: Upload) -> None:
        """An SLM has arrived."""

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """A step is done; its download has not been sent yet."""

    def refused(self, upload: Upload, error: UploadError) -> None:
        """An upload could not be used; the loop goes on."""


def serve(exchange: Exchange, server: Server, journal: Journal, stop: Callable[[], bool]) -> None:
    """Train on each SLM when it arrives (section 4.1, step 2), whoever it comes from, in any order.

    Args:
        exchange: where uploads come from.
        server: meets one at a time.
        journal: is told of each.
        stop: asked before each receipt whether to end.
    """
    while not stop():
        upload = exchange.receive()
        if upload is None:
            continue
        try:
            journal.uploaded(upload)
            download, record = server.step(upload)
        except UploadError as error:
            journal.refused(upload, error)
            continue
        journal.served(upload, download, record)
        exchange.send(download)
