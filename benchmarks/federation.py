"""The federation's transport: ours against bare Flower messages, and fifty silos at once.

`--size`: an SLM-sized message goes up and down through the exchange, spool included, and through bare Flower messages
with the same bytes, in turn, over the same in-memory grid of real Flower objects (serialised and inflated as Flower
does it). `--silos`: tiny uploads of so many silos at once through exchange and spool. Neither needs a port: what is
compared is what we add to Flower, and Flower's own sockets are the same on both sides.

Keys: `ratio_time` and `ratio_memory` (ours over bare, each side's memory from a process of its own),
`arrivals_a_minute`, `latency_idle` and `latency_loaded` (seconds from upload to download), `memory_growth_bytes`.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from measure import arguments, finish, in_turn, peak_memory, ratio, spread

from crosslm.config import FederationConfig
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.messages import encode
from crosslm.federation.spool import Spool
from crosslm.records import Download, SlmState, Upload

MEGABYTE = 10**6


def weights(megabytes: float) -> dict[str, torch.Tensor]:
    """So many bytes in 200 tensors, as a model of BERT's size has."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(megabytes * MEGABYTE / 4 / 200))
    return {f"layer.{place}": torch.randn(count, generator=generator) for place in range(200)}


def upload(silo: str, tensors: dict[str, torch.Tensor]) -> Upload:
    """An upload with these weights; nobody builds a model of it."""
    return Upload(silo, 0, (1, 1), {}, SlmState({}, {}, ("a", "b"), 8, tensors))


def carried(message: Message) -> Message:
    """A message as it comes out at the other end: every object serialised, hashed and inflated."""
    contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


class Wire:
    """Flower's grid in memory: one silo's answer to each request, carried as Flower carries it."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers, self.replies = answers, {}

    def get_nodes(self) -> list:
        """All silos are connected."""
        names = list(self.answers)
        return [type("Node", (), {"name": name, "node_id": place + 1}) for place, name in enumerate(names)]

    def push_messages(self, messages: list[Message]) -> list[str]:
        """Carry a request there; the silo's answer can be pulled from now on."""
        message = carried(messages[0])
        name = list(self.answers)[message.metadata.dst_node_id - 1]
        if message.metadata.message_type == "train.upload":
            content = RecordDict({"reply": ConfigRecord({"status": "ok"}), "message": split(self.answers[name])})
        else:
            size = sum(map(len, joined(message.content["message"])))
            content = RecordDict({"reply": ConfigRecord({"status": "ok", "size": size})})
        self.replies[f"{name}/{message.metadata.message_type}"] = Message(content, reply_to=message)
        return [f"{name}/{message.metadata.message_type}"]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        """Carry an answer back."""
        return [carried(self.replies.pop(ids[0]))] if ids[0] in self.replies else []


def ours(data: bytes, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Up through exchange and spool, decoded, and down again."""
    exchange = FlowerExchange(Wire({"silo": data}), Spool(folder), "bench", ["silo"], FederationConfig())
    exchange.start()
    while (received := exchange.receive()) is None:
        pass
    exchange.send(Download("silo", 0, 1, {}, received.slm))
    assert not exchange.drain(600)
    exchange.spool.close()


def bare(tensors: dict[str, torch.Tensor]) -> None:
    """The same tensors as one array each, up and down, as Flower's examples do."""
    request = Message(RecordDict({"request": ConfigRecord({"round": 0})}), 1, "train.upload", ttl=600)
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
    up = carried(Message(RecordDict({"arrays": arrays}), reply_to=carried(request)))
    returned = {name: torch.from_numpy(array.numpy()) for name, array in up.content["arrays"].items()}
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in returned.items()})
    down = carried(Message(RecordDict({"arrays": arrays}), 1, "train.install", ttl=600))
    assert sum(array.numpy().nbytes for array in down.content["arrays"].values())


def one_side(side: str, megabytes: float) -> None:
    """Run one side once and print this process's peak memory."""
    tensors = weights(megabytes)
    if side == "ours":
        data = encode(upload("silo", tensors))
        del tensors
        with tempfile.TemporaryDirectory() as folder:
            ours(data, {}, Path(folder))
    else:
        bare(tensors)
    print(peak_memory())


def memory(side: str, megabytes: float) -> int:
    """Peak memory of one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--size", str(megabytes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def crowd(silos: int) -> dict:
    """Tiny uploads of many silos at once: each download is the upload, so that only the transport is timed."""
    answers = {f"silo-{place:02}": encode(upload(f"silo-{place:02}", weights(0.1))) for place in range(silos)}
    with tempfile.TemporaryDirectory() as folder:
        names = list(answers)
        latencies, start_memory = {}, peak_memory()
        for kind, who in (("idle", names[:1]), ("loaded", names)):
            spool = Spool(Path(folder) / kind)
            exchange = FlowerExchange(
                Wire({name: answers[name] for name in who}), spool, "bench", who, FederationConfig()
            )
            started = time.perf_counter()
            exchange.start()
            while not exchange.finished():
                if (received := exchange.receive()) is not None:
                    exchange.send(Download(received.client_id, 0, 1, {}, received.slm))
            assert not exchange.drain(600)
            seconds = time.perf_counter() - started
            latencies[kind] = spread([arrival.delivered_at - arrival.received_at for arrival in spool.arrivals()])
            spool.close()
    return {
        "arrivals_a_minute": round(silos / seconds * 60, 1),
        "latency_idle": latencies["idle"],
        "latency_loaded": latencies["loaded"],
        "memory_growth_bytes": peak_memory() - start_memory,
    }


def main() -> None:
    """Measure."""
    more = {
        "size": {"type": float, "action": "append", "help": "megabytes; may be given several times"},
        "silos": {"type": int, "default": 50},
        "side": {"choices": ["ours", "bare"], "help": "run one side once and print its peak memory"},
    }
    options = arguments(__doc__, **more)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    sizes = options.size or ([9.0] if options.quick else [90.0, 440.0])
    if options.side:
        one_side(options.side, sizes[0])
        return
    figures: dict = {"sizes": {}}
    for megabytes in sizes:
        tensors = weights(megabytes)
        data = encode(upload("silo", tensors))
        with tempfile.TemporaryDirectory() as folder:
            count = iter(range(1000))
            sides = {
                "ours": lambda data=data, folder=folder, count=count: ours(data, {}, Path(folder) / str(next(count))),
                "bare": lambda tensors=tensors: bare(tensors),
            }
            seconds = in_turn(sides, 1 if options.quick else 3)
        peaks = {side: memory(side, megabytes) for side in sides}
        figures["sizes"][f"{megabytes:g} MB"] = {
            "ratio_time": ratio(seconds["ours"], seconds["bare"]),
            "ratio_memory": round(peaks["ours"] / peaks["bare"], 2),
            "seconds": {side: spread(values) for side, values in seconds.items()},
            "peak_bytes": peaks,
        }
    largest = figures["sizes"][f"{max(sizes):g} MB"]
    figures |= {"ratio_time": largest["ratio_time"], "ratio_memory": largest["ratio_memory"]}
    figures |= {"silos": options.silos, **crowd(options.silos)}
    finish("federation", figures, options)


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    assert threading.current_thread() is threading.main_thread()
    main()
