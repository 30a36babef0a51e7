"""Federations without machines: kits, silos, and Flower's grid in memory. A plugin: its fixtures are every test's."""

import copy
import random
import threading
import time

import httpx
import pytest
from conftest import PATIENCE, tiny_llm

from crosslm.config import Config, FederationConfig
from crosslm.federation.flower import client_app, gateway
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.processes import is_free
from crosslm.federation.intake import Intake
from crosslm.federation.kits import KIT, SILO_FILE, dump, read_server, read_silo, server_config
from crosslm.federation.messages import decode_upload
from crosslm.federation.provision import provision
from crosslm.federation.silo import Silo
from crosslm.federation.spool import Spool
from crosslm.models.encoder import SentenceEncoder
from crosslm.records import Download
from crosslm.server import Server
from crosslm.task import Task

from flwr.app import Context, RecordDict  # isort: skip
from flwr.supercore import task_identity  # isort: skip


GIVEN = set()


def free_ports(count):
    """Ports of this machine that nobody has, each given once by this process.

    They are below those that the system gives to whoever asks for any, since some time goes by until they are used.
    """
    ports = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        if port not in GIVEN and is_free("127.0.0.1", port):
            GIVEN.add(port)
            ports.append(port)
    return ports


@pytest.fixture
def federated(settings, models, data_folder):
    """The configuration of a run with two silos that have files of their own."""
    tables = copy.deepcopy(settings)
    rows = (data_folder / "train.csv").read_text().splitlines()
    mixed = [*rows[1:31:2], *rows[31:61:2]]
    for number, part in enumerate((mixed[::2], mixed[1::2])):
        (data_folder / f"silo-{number}.csv").write_text("\n".join([rows[0], *part]) + "\n")
    for key in ("train", "num_clients", "alpha"):
        tables["data"].pop(key)
    tables["data"]["judge_rows"] = 0
    tables["federation"] = {"closing": False}  # else a silo stays until all have come; test_closing.py is of that
    tables["clients"] = [
        {"id": "silo-0", "train": "silo-0.csv", "model": str(models / "bert")},
        {"id": "silo-1", "train": "silo-1.csv", "model": str(models / "distilbert")},
    ]
    return tables


@pytest.fixture
def kits(federated, tmp_path, data_folder):
    """Kits of that run, with each silo's text in its kit."""
    folder = tmp_path / "kits"
    provision(Config.model_validate(federated), "localhost:9400", folder)
    for number in (0, 1):
        kit = folder / "silos" / f"silo-{number}"
        (kit / f"silo-{number}.csv").write_bytes((data_folder / f"silo-{number}.csv").read_bytes())
    return folder


@pytest.fixture
def silo(kits, tmp_path):
    return Silo(kits / "silos" / "silo-0", tmp_path / "cache")


def change(kit, **fields):
    settings = read_silo(kit).model_copy(update=fields)
    (kit / SILO_FILE).write_text(dump(settings))


def answer(silo, config, models):
    """What the server returns for the silo's first upload, from the method itself."""
    upload = decode_upload(silo.upload(silo.settings.experiment, 0).read_bytes())
    server = Server(
        config, Task.from_config(config.task), tiny_llm(models, "gpt2"), SentenceEncoder(str(models / "encoder"))
    )
    download, _ = server.step(upload)
    return upload, download


class Node:
    def __init__(self, name, node_id):
        self.name, self.node_id = name, node_id


class MemoryGrid:
    """Flower's grid as far as the exchange uses it; ``silos`` answer through the real client application."""

    def __init__(self, handlers):
        self.handlers = handlers  # name: what answers a message
        self.online = list(handlers)
        self.pushed, self.ttls = [], set()
        self._replies = {}
        self._one_at_a_time = threading.Lock()  # the silos of a test share a process and its environment

    def get_nodes(self):
        return [Node(name, 100 + place) for place, name in enumerate(self.handlers) if name in self.online]

    def push_messages(self, messages):
        (message,) = messages
        name = list(self.handlers)[message.metadata.dst_node_id - 100]
        with self._one_at_a_time:
            self.ttls.add(message.metadata.ttl)
            self.pushed.append((name, message.metadata.message_type, int(message.content["request"]["round"])))
            number = message.metadata.__dict__["_message_id"] = str(len(self.pushed))  # as Flower's grid gives it one
            self._replies[number] = self.handlers[name](message)
        return [number]

    def pull_messages(self, ids):
        return [reply for reply in (self._replies.pop(number, None) for number in ids) if reply is not None]


def before(transport, kit, monkeypatch):
    """A gateway whose SuperLink is this transport of httpx: the application, and what makes a client of it."""
    real = httpx.AsyncClient

    def superlink(base_url, **_):
        return real(base_url=base_url, transport=transport)

    monkeypatch.setattr(gateway.httpx, "AsyncClient", superlink)
    outer = gateway.gateway("https://127.0.0.1:9091", kit)
    return outer, lambda: real(transport=httpx.ASGITransport(outer), base_url="https://server")


@pytest.fixture
def flower_run(monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(task_identity.TaskIdentity, name, 1, raising=False)


def from_kit(kit, monkeypatch):
    """A silo's real application."""

    def answered(message):
        monkeypatch.setenv(KIT, str(kit))
        return client_app.app(message=message, context=Context(1, 1, {}, RecordDict(), {}))

    return answered


@pytest.fixture
def exchange(kits, tmp_path, flower_run, monkeypatch):
    spool = Spool(tmp_path / "spool")
    grid = MemoryGrid({name: from_kit(kits / "silos" / name, monkeypatch) for name in ("silo-0", "silo-1")})
    experiment, config = read_server(kits / "server").experiment, server_config(kits / "server")
    intake = Intake(config.task.labels, config.intake)
    return FlowerExchange(grid, spool, experiment, ["silo-0", "silo-1"], FederationConfig(), intake)


def turn(exchange, times=1):
    for _ in range(times):
        for line in exchange.carrier.lines.values():
            exchange.carrier.move(line, exchange.carrier.online())


def wait_until(happened):
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def echo(upload):
    return Download(upload.client_id, upload.client_round, 1, {}, upload.slm)
