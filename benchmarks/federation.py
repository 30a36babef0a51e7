"""The federation's transport: ours against bare Flower messages, ten large uploads in a row, fifty silos at once.

`--size`: a BERT of that many megabytes goes up and down through the exchange (spool, journal, the intake's checks and
decoding included) and, as one array each tensor, through bare Flower messages, in turn, over the same grid in memory of
real Flower objects (serialised, hashed and inflated as Flower does it). Ten times the largest one through one exchange.
`--silos`: tiny uploads of so many silos at once. What is compared is what we add to Flower; its sockets and processes
are left out here, and are in `federation_live.py`.

Keys: `ratio_time` and `ratio_memory` (ours over bare, each side's memory from a process of its own), `in_a_row`
(seconds of each round trip), `arrivals_a_minute`, `latency_idle` and `latency_loaded` (seconds from upload to
download), `memory_over_time` (seconds, resident bytes of the process that holds server and silos).

A part that is done is kept in the file of `--parts`; the same command goes on after it, unless the commit differs.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before flwr is imported

import psutil
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from measure import arguments, finish, in_turn, peak_memory, peak_of, ratio, spread
from random_bert import random_bert

from crosslm.config import FederationConfig, IntakeConfig
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.intake import Intake
from crosslm.federation.messages import encode
from crosslm.federation.spool import Spool
from crosslm.models.slm import SLM
from crosslm.records import Download, Upload
from crosslm.support.files import parts_of

LABELS = ("bad", "good")
TINY = 0.1  # megabytes
PATIENCE = 3600.0  # seconds


def upload_of(megabytes: float) -> Upload:
    """An upload of a BERT of about this size that has learned nothing."""
    with tempfile.TemporaryDirectory() as folder:
        random_bert(Path(folder), megabytes)
        state = SLM.load(folder, LABELS, 8, 0).to_state()
    return Upload("silo", 0, (1, 1), {}, state)


def carried(message: Message) -> Message:
    """A message as it comes out at the other end: every object serialised, hashed and inflated."""
    contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


class Wire:
    """Flower's grid in memory: silos that answer each request with the same SLM, carried as Flower carries it."""

    def __init__(self, upload: Upload, silos: list[str], folder: Path) -> None:
        self.upload, self.silos, self.replies = upload, silos, {}
        self.writing = threading.Lock()
        self.file = folder / "upload"  # a silo sends what it has on its disk

    def get_nodes(self) -> list:
        """All silos are connected."""
        return [type("Node", (), {"name": name, "node_id": place}) for place, name in enumerate(self.silos, start=1)]

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Carry a request there; the silo's answer can be pulled from now on."""
        message = carried(messages[0])
        name, number = self.silos[message.metadata.dst_node_id - 1], int(message.content["request"]["round"])
        message.metadata.__dict__["_message_id"] = name  # which Flower's grid gives it, and an answer names
        content = RecordDict({"reply": ConfigRecord({"status": "ok"})})
        if message.metadata.message_type == "train.upload":
            with self.writing:
                self.file.write_bytes(encode(replace(self.upload, client_id=name, client_round=number)))
                content["message"] = split(parts_of(self.file))
        else:
            content["reply"]["size"] = sum(map(len, joined(message.content["message"], IntakeConfig().max_bytes)))
        self.replies[name] = Message(content, reply_to=message)
        return [name]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        """Carry an answer back."""
        return [carried(self.replies.pop(ids[0]))] if ids[0] in self.replies else []


def through_ours(upload: Upload, silos: list[str], folder: Path, rounds: int = 1) -> list:
    """Uploads up through exchange, spool and intake, and down again as they are; gives the journal's arrivals."""
    spool = Spool(folder)
    config, intake = FederationConfig(participations=rounds), Intake(LABELS, IntakeConfig())
    exchange = FlowerExchange(Wire(upload, silos, folder), spool, "bench", silos, config, intake)
    exchange.start()
    while not exchange.finished():
        if (received := exchange.receive()) is not None:
            exchange.send(Download(received.client_id, received.client_round, 1, {}, received.slm))
    assert not exchange.drain(PATIENCE)
    arrivals = spool.arrivals()
    spool.close()
    assert [arrival.state for arrival in arrivals] == ["delivered"] * len(silos) * rounds, arrivals
    return arrivals


def ours(upload: Upload) -> None:
    """One upload there and back."""
    with tempfile.TemporaryDirectory() as folder:
        through_ours(upload, ["silo"], Path(folder))


def bare(upload: Upload) -> None:
    """The same tensors as one array each, up and down, as Flower's examples do."""
    request = Message(RecordDict({"request": ConfigRecord({"round": 0})}), 1, "train.upload", ttl=600)
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in upload.slm.weights.items()})
    up = carried(Message(RecordDict({"arrays": arrays}), reply_to=carried(request)))
    returned = {name: torch.from_numpy(array.numpy()) for name, array in up.content["arrays"].items()}
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in returned.items()})
    down = carried(Message(RecordDict({"arrays": arrays}), 1, "train.install", ttl=600))
    assert sum(array.numpy().nbytes for array in down.content["arrays"].values())


SIDES = {"ours": ours, "bare": bare}


def side_by_side(megabytes: float, repeats: int) -> dict:
    """Ours and bare messages with an SLM of this size."""
    upload = upload_of(megabytes)
    seconds = in_turn({name: lambda side=side: side(upload) for name, side in SIDES.items()}, repeats)
    peaks = {side: peak_of(__file__, "--side", side, "--size", str(megabytes)) for side in SIDES}
    return {
        "weight_bytes": sum(weight.nbytes for weight in upload.slm.weights.values()),
        "ratio_time": ratio(seconds["ours"], seconds["bare"]),
        "ratio_memory": round(peaks["ours"] / peaks["bare"], 2),
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "peak_bytes": peaks,
    }


def in_a_row(megabytes: float, count: int) -> dict:
    """So many round trips of one silo through one exchange, one after the other."""
    upload = upload_of(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        arrivals = through_ours(upload, ["silo"], Path(folder), count)
    ends = [started, *(arrival.delivered_at for arrival in arrivals)]
    seconds = [round(end - before, 2) for before, end in pairwise(ends)]
    return {"megabytes": megabytes, "bytes": [arrival.bytes for arrival in arrivals], "seconds": seconds}


class Sampler:
    """This process's resident bytes, every so often while its block runs."""

    def __init__(self, every: float = 0.5) -> None:
        self.every, self.samples, self._over = every, [], threading.Event()

    def __enter__(self) -> "Sampler":
        self._started = time.time()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self.samples.append([round(time.time() - self._started, 1), process.memory_info().rss])
            if self._over.wait(self.every):
                return

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def crowd(silos: int) -> dict:
    """Tiny uploads of many silos at once: each download is the upload, so that only the transport is timed."""
    upload, names = upload_of(TINY), [f"silo-{place:02}" for place in range(silos)]
    with tempfile.TemporaryDirectory() as folder:
        alone = [through_ours(upload, names[:1], Path(folder) / f"alone-{number}")[0] for number in range(5)]
        started = time.time()
        with Sampler() as sampler:
            together = through_ours(upload, names, Path(folder) / "together")
        minutes = (max(arrival.delivered_at for arrival in together) - started) / 60
    latency = {
        kind: spread([arrival.delivered_at - arrival.received_at for arrival in arrivals])
        for kind, arrivals in (("idle", alone), ("loaded", together))
    }
    return {
        "silos": silos,
        "arrivals_a_minute": round(silos / minutes, 1),
        "latency_idle": latency["idle"],
        "latency_loaded": latency["loaded"],
        "memory_over_time": sampler.samples,
    }


def part(file: Path, origin: dict, name: str, measure: Callable[[], dict]) -> dict:
    """A part's figures: as they were kept in the file by this commit, or measured now and kept there."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("origin", {}).get("commit") != origin["commit"]:
        kept = {"origin": origin, "parts": {}}
    if name not in kept["parts"]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        kept["parts"][name] = measure()
        file.write_text(json.dumps(kept, indent=1) + "\n")
    return kept["parts"][name]


def main() -> None:
    """Measure."""
    more = {
        "size": {"type": float, "action": "append", "help": "megabytes; may be given several times"},
        "silos": {"type": int, "help": "how many come at once (50)"},
        "transfers": {"type": int, "help": "how many of the largest size in a row (10)"},
        "parts": {"type": Path, "default": Path("federation-parts.json"), "help": "where parts are kept when done"},
        "side": {"choices": [*SIDES], "help": "run one side once and print its peak memory"},
    }
    options = arguments(__doc__, **more)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    sizes = options.size or ([2.0] if options.quick else [90.0, 440.0])
    if options.side:
        SIDES[options.side](upload_of(sizes[0]))
        print(peak_memory())
        return
    silos = options.silos or (3 if options.quick else 50)
    transfers, repeats = options.transfers or (2 if options.quick else 10), 1 if options.quick else 3

    def kept(name: str, measure: Callable[[], dict]) -> dict:
        return part(options.parts, options.origin, name, measure)

    measured = {
        f"{size:g} MB": kept(f"{repeats} times {size:g} MB", lambda size=size: side_by_side(size, repeats))
        for size in sizes
    }
    largest = max(sizes)
    figures = {name: measured[f"{largest:g} MB"][name] for name in ("ratio_time", "ratio_memory")} | {"sizes": measured}
    row = kept(f"{transfers} of {largest:g} MB in a row", lambda: in_a_row(largest, transfers))
    together = kept(f"{silos} silos at once", lambda: crowd(silos))
    finish("federation", figures | {"in_a_row": row} | together, options)
    options.parts.unlink()


if __name__ == "__main__":
    main()
