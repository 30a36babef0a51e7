"""The default engine: all clients in this process, arrivals in an order drawn from the seed.

Asynchrony is real, one SLM an arrival in any order, yet a run is repeatable and needs no thread or
port. Every upload and download passes through the bytes of :mod:`crosslm.federation.messages`.
"""

import random
from collections.abc import Callable, Sequence

from crosslm.client import Client
from crosslm.federation.messages import decode_download, decode_upload, encode
from crosslm.records import Download, Upload
from crosslm.seeding import seed_for


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
    ) -> None:
        self._clients = {client.id: client for client in clients}
        self._waiting = arrival_order(list(self._clients), participations, seed)
        self._on_failure = on_failure
        self.bytes_up = dict.fromkeys(self._clients, 0)
        self.bytes_down = dict.fromkeys(self._clients, 0)

    def exhausted(self) -> bool:
        """Whether every client has arrived as often as it will."""
        return not self._waiting

    def receive(self) -> Upload | None:
        """Train the next client and receive its upload; None if it failed, which is reported."""
        client_id = self._waiting.pop(0)
        try:
            data = encode(self._clients[client_id].train())
            self.bytes_up[client_id] += len(data)
            return decode_upload(data)
        except Exception as error:  # noqa: BLE001  a client's failure is an event of the run, not its end
            self._on_failure(client_id, error)
            return None

    def send(self, download: Download) -> None:
        """Return an enhanced SLM; a client that cannot install it is reported."""
        data = encode(download)
        self.bytes_down[download.client_id] += len(data)
        try:
            self._clients[download.client_id].install(decode_download(data))
        except Exception as error:  # noqa: BLE001
            self._on_failure(download.client_id, error)
