"""The seam between the method and whatever carries messages, and the asynchronous loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from crosslm.errors import FederationError, UploadError
from crosslm.records import Download, SyntheticSet, Upload
from crosslm.server import Closing, Server, StepRecord
from crosslm.support.memory import give_back


@dataclass(frozen=True)
class Served:
    """A client's last upload that was served."""

    read: Callable[[], Upload]
    """Gives it: all at once may be more than memory holds. Raises a FederationError where it is lost."""
    refusal: str
    """Why it has no say; empty where it has."""


class Exchange(Protocol):
    """Brings uploads in the order of their arrival and takes downloads back."""

    def receive(self) -> Upload | None:
        """The next upload that has arrived, or None when nobody is waiting."""

    def send(self, download: Download, closing: bool = False) -> None:
        """Return an enhanced SLM to its client; ``closing``: once more, when no more uploads come."""


class Journal(Protocol):
    """Is told what happens, and keeps what it wants of it."""

    def uploaded(self, upload: Upload) -> None:
        """An SLM has arrived."""

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """A step is done; its download has not been sent yet."""

    def refused(self, upload: Upload, error: UploadError) -> None:
        """An upload could not be used; the loop goes on."""

    def last_served(self) -> Sequence[Served]:
        """The last upload of each client that is still to be closed.

        Of nobody where a single client was served, for nothing has been learned since.
        """

    def written(self) -> tuple[SyntheticSet, SyntheticSet]:
        """What the original LLM wrote, and the pool of the last step."""

    def closing(self, pool: SyntheticSet) -> None:
        """No more uploads come, and these texts are for all who were served."""

    def not_closed(self, message: str) -> None:
        """Somebody has no step 5 in the end, and goes on with what it got at once."""

    def closed(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """A client's SLM has had step 5 once more; its download has not been sent yet."""


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
        if upload is not None:
            _meet(exchange, server, journal, upload)
            del upload  # before its memory can be given back
            give_back()


def _meet(exchange: Exchange, server: Server, journal: Journal, upload: Upload) -> None:
    try:
        journal.uploaded(upload)
        download, record = server.step(upload)
    except UploadError as error:
        journal.refused(upload, error)
        return
    journal.served(upload, download, record)
    exchange.send(download)


def close(exchange: Exchange, server: Server, journal: Journal, between: Callable[[], object]) -> None:
    """When no more uploads come, step 5 once more for all who were served (``federation.closing``).

    Args:
        exchange: takes the downloads.
        server: has met them all.
        journal: knows who they are, and is told of each.
        between: called before each client; what it raises ends this.
    """
    clients = journal.last_served()
    if not clients:
        return
    closing = server.for_all(*journal.written(), (client.refusal for client in clients))
    journal.closing(closing.pool)
    for client in clients:
        between()
        _teach_once_more(exchange, server, journal, client, closing)
        give_back()


def _teach_once_more(exchange: Exchange, server: Server, journal: Journal, client: Served, closing: Closing) -> None:
    try:
        upload = client.read()
    except FederationError as error:  # the disk has lost it; the others are taught all the same
        journal.not_closed(f"a client has no step 5 in the end and goes on with what it got: {error}")
        return
    try:
        download, record = server.close(upload, client.refusal, closing)
    except UploadError as error:
        journal.not_closed(f"{upload.client_id} has no step 5 in the end and goes on with what it got: {error}")
        return
    journal.closed(upload, download, record)
    exchange.send(download, closing=True)
