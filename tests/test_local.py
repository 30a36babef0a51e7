"""The in-process engine and the loop: order, failures, several arrivals."""

import ctypes
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.client import Client
from crosslm.config import FitConfig
from crosslm.data.examples import Examples
from crosslm.errors import ModelError, UploadError
from crosslm.federation import exchange as exchange_module
from crosslm.federation.exchange import Served, close, serve
from crosslm.federation.local import LocalExchange, arrival_order
from crosslm.models.slm import SLM
from crosslm.records import Download, Upload
from crosslm.server import StepRecord
from crosslm.support.memory import give_back

LABELS = ("bad", "good")


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
def test_every_client_arrives_as_often_as_it_shall(clients, times, seed):
    ids = [f"client-{number}" for number in range(clients)]
    order = arrival_order(ids, times, seed)
    assert Counter(order) == dict.fromkeys(ids, times)
    assert order == arrival_order(ids, times, seed)


def test_the_order_comes_from_the_seed():
    ids = list("abcd")
    assert len({tuple(arrival_order(ids, 1, seed)) for seed in range(60)}) > 10


class EchoServer:
    """Returns what it is given, and refuses the uploads of one client."""

    def __init__(self, refused=""):
        self.refused, self.served = refused, []

    def step(self, upload):
        if upload.client_id == self.refused:
            raise UploadError(f"{upload.client_id}: no")
        self.served.append(upload.client_id)
        return Download(upload.client_id, upload.client_round, len(self.served), {}, upload.slm), StepRecord()


class Notes:
    def __init__(self):
        self.lines = []

    def uploaded(self, upload):
        self.lines.append(("uploaded", upload.client_id, upload.client_round))

    def served(self, upload, download, record):
        self.lines.append(("served", upload.client_id, download.step))

    def refused(self, upload, error):
        self.lines.append(("refused", upload.client_id, str(error)))


@pytest.fixture
def clients(models):
    examples = Examples(["a good film.", "a bad day."] * 4, [1, 0] * 4)
    return [
        Client(name, examples, SLM.load(str(models / kind), LABELS, 32, 0), FitConfig(epochs=1), 0)
        for name, kind in (("north", "bert"), ("south", "distilbert"), ("west", "bert"))
    ]


def run(clients, server, participations=1, seed=0):
    failures = []
    exchange = LocalExchange(clients, participations, seed, lambda who, error: failures.append((who, str(error))))
    notes = Notes()
    serve(exchange, server, notes, exchange.exhausted)
    return exchange, notes.lines, failures


def test_one_slm_an_arrival_in_the_seeds_order(clients):
    server = EchoServer()
    exchange, lines, failures = run(clients, server, participations=2, seed=5)
    assert server.served == arrival_order(["north", "south", "west"], 2, 5)
    assert [line[1] for line in lines if line[0] == "uploaded"] == server.served
    assert Counter(line[2] for line in lines if line[0] == "uploaded") == {0: 3, 1: 3}
    assert not failures
    assert all(exchange.bytes_up[name] > 10_000 for name in ("north", "south", "west"))
    assert all(exchange.bytes_down[name] > 10_000 for name in ("north", "south", "west"))


def test_what_is_returned_is_installed_and_trained_on_next_time(clients, monkeypatch):
    before, began, fit = clients[0].slm, [], SLM.fit

    def spied(slm, *arguments, **settings):
        began.append((slm, {name: value.clone() for name, value in slm.model.state_dict().items()}))
        return fit(slm, *arguments, **settings)

    monkeypatch.setattr(SLM, "fit", spied)
    server, returned = EchoServer(), []
    step = server.step

    def keep(upload):
        download, record = step(upload)
        returned.append((upload.client_id, download))
        return download, record

    monkeypatch.setattr(server, "step", keep)
    run(clients[:1], server, participations=2)
    assert clients[0].slm is not before
    assert clients[0].rounds == 2
    (first, _), (second, weights) = began
    assert first is before
    assert second is not before
    assert all(torch.equal(value, weights[name]) for name, value in returned[0][1].slm.weights.items())


def test_each_training_of_each_client_has_a_seed_of_its_own(clients, monkeypatch):
    seeds = set()
    monkeypatch.setattr(SLM, "fit", lambda slm, rows, fit, seed, *_, **__: seeds.add(seed) or {})
    for client in clients * 2:
        client.train()
    assert len(seeds) == 6


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt()])
def test_a_training_that_fails_leaves_the_slm_as_it_was(clients, monkeypatch, error):
    client, epoch, calls = clients[0], SLM._epoch, []
    client._fit = FitConfig(epochs=2, patience=0)
    before = {name: value.clone() for name, value in client.slm.model.state_dict().items()}

    def fails(slm, *arguments):
        calls.append(slm)
        if len(calls) == 2:
            assert any(not torch.equal(value, before[name]) for name, value in slm.model.state_dict().items())
            raise error
        return epoch(slm, *arguments)

    monkeypatch.setattr(SLM, "_epoch", fails)
    with pytest.raises(type(error)):
        client.train()
    assert client.rounds == 0
    assert all(torch.equal(value, before[name]) for name, value in client.slm.model.state_dict().items())


def test_a_training_that_ends_in_weights_that_are_not_finite_is_undone(clients, monkeypatch):
    client = clients[0]
    before = {name: value.clone() for name, value in client.slm.model.state_dict().items()}
    fit = SLM.fit

    def diverges(slm, *arguments, **more):
        metrics = fit(slm, *arguments, **more)
        with torch.no_grad():
            next(slm.model.parameters()).view(-1)[0] = torch.nan
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(SLM, "fit", diverges)
        with pytest.raises(ModelError, match=f"client {client.id}: step 1 left weights that are not finite"):
            client.train()
    assert client.rounds == 0
    assert all(torch.equal(value, before[name]) for name, value in client.slm.model.state_dict().items())
    assert client.train().client_round == 0  # with another rate, say, it can go on


def test_under_dp_weights_that_are_not_finite_are_uploaded_and_counted(clients, monkeypatch):
    class Training:
        def fit(self, slm, *_):
            with torch.no_grad():
                next(slm.model.parameters()).view(-1)[0] = torch.nan
            return {"dp/epsilon": 1.0}

        def class_counts(self, counts):
            return counts

    client = clients[0]
    monkeypatch.setattr(client, "_privacy", Training())
    assert client.train().metrics == {"dp/epsilon": 1.0}
    assert (client.rounds, client.told_metrics) == (1, ({"dp/epsilon": 1.0},))


def test_a_client_that_fails_delays_nobody(clients, monkeypatch):
    def fail():
        raise MemoryError("no memory at this silo")

    monkeypatch.setattr(clients[1], "train", fail)
    server = EchoServer()
    _, _, failures = run(clients, server)
    assert sorted(server.served) == ["north", "west"]
    assert failures == [("south", "no memory at this silo")]


def test_a_client_that_cannot_install_is_reported(clients, monkeypatch):
    def fail(download):
        raise OSError("disk full")

    monkeypatch.setattr(clients[2], "install", fail)
    server = EchoServer()
    _, _, failures = run(clients, server)
    assert len(server.served) == 3
    assert failures == [("west", "disk full")]


def test_an_upload_that_cannot_be_used_delays_nobody(clients):
    server = EchoServer(refused="north")
    _, lines, _ = run(clients, server)
    assert sorted(server.served) == ["south", "west"]
    assert ("refused", "north", "north: no") in lines


def test_what_an_upload_took_is_given_back_when_it_has_been_served_or_refused(clients, monkeypatch):
    held, left = [], []

    class Holding(EchoServer):
        def step(self, upload):
            held.append(weakref.ref(next(iter(upload.slm.weights.values()))))
            return super().step(upload)

    monkeypatch.setattr(exchange_module, "give_back", lambda: left.append(sum(ref() is not None for ref in held)))
    run(clients, Holding(refused="north"))
    assert left == [0, 0, 0]


def test_so_is_what_one_took_that_is_taught_once_more(clients, monkeypatch):
    held, left = [], []

    class Closing(EchoServer):
        def for_all(self, *_):
            return SimpleNamespace(pool=None)

        def close(self, upload, refusal, closing):
            held.append(weakref.ref(next(iter(upload.slm.weights.values()))))
            return self.step(upload)

    def read(client):
        return lambda: Upload(client.id, 0, (4, 4), {}, client.slm.to_state())

    told = []
    journal = SimpleNamespace(
        last_served=lambda: [Served(read(client), "") for client in clients],
        written=lambda: (None, None),
        closing=lambda pool: None,
        closed=lambda upload, *_: told.append(upload.client_id),
        not_closed=told.append,
    )
    exchange = SimpleNamespace(send=lambda download, closing: None)
    monkeypatch.setattr(exchange_module, "give_back", lambda: left.append(sum(ref() is not None for ref in held)))
    close(exchange, Closing(refused="south"), journal, lambda: None)
    assert told == ["north", "south has no step 5 in the end and goes on with what it got: south: no", "west"]
    assert left == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc has it")
def test_memory_that_is_free_is_given_back():
    def held():
        (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    kept = [bytearray(50_000) for _ in range(4000)]  # smaller than what the C library asks the system for one by one
    last = bytearray(50_000)
    before = held()
    del kept
    give_back()
    assert before - held() > 100_000_000
    assert len(last) == 50_000
