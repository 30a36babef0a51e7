"""The default engine: all clients in this process, arrivals in an order drawn from the seed.

Asynchrony is real, one SLM an arrival in any order, yet a run is repeatable and needs no thread or
port. Every upload and download passes through the bytes of :mod:`crosslm.federation.messages` and the
checks of :mod:`crosslm.federation.intake`.
"""

import random
from collections.abc import Callable, Sequence

from crosslm.client import Client, Decision
from crosslm.federation.intake import Intake
from crosslm.federation.messages import decode_download, decode_upload, encode
from crosslm.records import Download, Upload
from crosslm.support.seeding import seed_for


def arrival_order(client_ids: Sequence[str], participations: int, seed: int) -> list[str]:
    """Who arrives when: each client so often, in an order drawn from the seed."""
    arrivals = [client_id for client_id in client_ids for _ in range(participations)]
    random.Random(seed_for(seed, "arrivals")).shuffle(arrivals)
    return arrivals


class LocalExchange:
    """Asks the next client in the order of arrival to train, and hands bytes over."""

    def __init__(
        self,
        clients: Sequence[Client],
        participations: int,
        seed: int,
        on_failure: Callable[[str, Exception], None] = lambda *_: None,
        intake: Intake | None = None,
        on_decision: Callable[[Client, Decision], None] = lambda *_: None,
    ) -> None:
        self.clients = {client.id: client for client in clients}
        self.arrivals = 0
        """How many places of the order of arrival are done with, those of clients that failed included."""
        self._waiting = list(enumerate(arrival_order(list(self.clients), participations, seed), start=1))
        self._on_failure = on_failure
        self._intake = intake
        self._on_decision = on_decision
        self.bytes_up = dict.fromkeys(self.clients, 0)
        self.bytes_down = dict.fromkeys(self.clients, 0)

    def go_on(self, arrivals: int, excluded: Sequence[str] = ()) -> None:
        """Start after so many places of the order, without some clients from there on."""
        self.arrivals = arrivals
        self._waiting = [(place, who) for place, who in self._waiting if place > arrivals and who not in excluded]

    def exhausted(self) -> bool:
        """Whether every client has arrived as often as it will."""
        return not self._waiting

    def receive(self) -> Upload | None:
        """Train the next client and receive its upload; None if it failed or is refused, which is reported."""
        self.arrivals, client_id = self._waiting.pop(0)
        try:
            data = encode(self.clients[client_id].train())
            self.bytes_up[client_id] += len(data)
            return self._intake.upload(data, client_id) if self._intake else decode_upload(data)
        except Exception as error:  # noqa: BLE001  a client's failure is an event of the run, not its end
            self._on_failure(client_id, error)
            return None

    def send(self, download: Download, closing: bool = False) -> None:
        """Return an enhanced SLM, at any time; a client that refuses or cannot install it is reported."""
        data = encode(download)
        who = download.client_id
        self.bytes_down[who] += len(data)
        try:
            checked = self._intake.download(data, who) if self._intake else decode_download(data)
            decision = self.clients[who].install(checked)
        except Exception as error:  # noqa: BLE001
            self._on_failure(who, error)
        else:
            self._on_decision(self.clients[who], decision)
