"""Large SLMs through `crosslm server` and `crosslm client` themselves, and through bare Flower on the same machine.

Ours: uploads of 440 MB in a row.
Real processes on the loopback interface: SuperLink with TLS and keys, gateway, SuperNode, both applications. The silo's
SLM is a BERT of `--size` megabytes with random weights, trained for one epoch on eight rows in each round; the LLM is
tiny, so that nearly all time is the transport's. Needs some 45 times the size on the disk. Bare: `flower_bare.py`,
whose silo trains and saves the same SLM, from SuperNode to SuperLink with the same TLS and keys, by Flower's own
programs.

Keys: `ratio_time` (ours over bare, median seconds up and down of a round after the first), `ratio_memory` (the largest
sum of all processes), `transfers` (for each round bytes, seconds from the end of the round before until the upload had
arrived, of the server's step, and of the way back), `bare` (the same), `memory_over_time` (seconds, resident bytes of
each process by its name), `errors` (how often the logs of Flower's processes say "database is locked", and the exit
codes).

With `--folder` everything is kept there, and the same command goes on where it was stopped.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from measure import arguments, finish
from random_bert import random_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from crosslm.config import Config
from crosslm.federation.arrivals_journal import Arrival
from crosslm.federation.flower.processes import Child, flwr, wait_for_port
from crosslm.federation.flower.server_processes import configure, superlink_command
from crosslm.federation.flower.silo_processes import supernode_command
from crosslm.federation.kit_texts import FLOWER_APP
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, read_server
from crosslm.federation.provision import provision
from crosslm.federation.spool import Spool

USUAL = 440.0  # megabytes; another size is kept under a name of its own
SILO = "silo"
EVERY = 2.0  # seconds between two looks at the memory
PATIENCE = 600.0  # seconds for a round
BARE_APP = (
    FLOWER_APP.replace("crosslm.federation.flower.server_app:app", "flower_bare:server_app").replace(
        "crosslm.federation.flower.client_app:app", "flower_bare:client_app"
    )
    + '\n[tool.flwr.app.config]\nrounds = 1\nfile = ""\n'
)
FIT = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-5, "patience": 0}


def tiny_llm(folder: Path) -> None:
    """A GPT-2 that writes single bytes at random; two more tokens tell the labels' words apart."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), [("Ġ", "b"), ("Ġ", "g")]
    words = {word: place for place, word in enumerate(["<bos>", "<eos>", *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(tokenizer_models.BPE(words, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)


def tiny(folder: Path, megabytes: float, clients: list[str], rounds: int) -> dict:
    """Models with random weights, and the tables of a federation with these silos that uses them."""
    torch.manual_seed(0)
    tiny_llm(folder / "llm")
    random_bert(folder / "slm", megabytes)
    random_bert(folder / "body", 0.1)
    body = Transformer(str(folder / "body"))
    SentenceTransformer(modules=[body, Pooling(32)], device="cpu").save(str(folder / "encoder"))
    return {
        "name": "transfers",
        "device": "cpu",
        "tracking": [],
        "task": {
            "labels": ["bad", "good"],
            "query": "{text} This is",
            "prompt": {label: [f'A {label} text: "'] for label in ("bad", "good")},
            "statement": {label: [f"This is {label}."] for label in ("bad", "good")},
            "verbalizer": {"bad": "bad", "good": "good"},
        },
        "data": {"test": "test.csv", "judge_rows": 0},
        "clients": [{"id": name, "train": "rows.csv", "model": str(folder / "slm")} for name in clients],
        "slm": {"models": [{"model": str(folder / "slm")}], "max_length": 16, "private": FIT, "synthetic": FIT},
        "llm": {"model": str(folder / "llm"), "samples": 8, "batch_size": 8, "learning_rate": 1e-4, "lora_rank": 2},
        "synthesis": {"max_new_tokens": 12, "max_attempts": 100},
        "selection": {"pool": 8, "fraction": 0.5, "encoder": str(folder / "encoder")},
        "federation": {"participations": rounds},
        "gate": {"enabled": False},
        "acceptance": {"enabled": False},
        "checkpoint": {"keep": 1},
        "evaluation": {"nlg_samples": 8},
    }


def write_rows(kit: Path) -> None:
    """Eight rows of a silo's own."""
    rows = [f"w{place} w{place + 1},{('bad', 'good')[place % 2]}" for place in range(8)]
    (kit / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def make(folder: Path, megabytes: float, rounds: int) -> None:
    """Models, rows, and kits for each side."""
    config = Config.model_validate(tiny(folder, megabytes, [SILO], rounds))
    make_kits(config, folder / "bare", gateway=False)
    make_kits(config, folder / "kits", gateway=True)


def make_kits(config: Config, folder: Path, gateway: bool) -> None:
    """Kits on free ports of the loopback interface; without a gateway the silo asks the SuperLink itself."""
    outer, runtime = _free_port(), _free_port()
    inner = _free_port() if gateway else outer
    provision(config, f"localhost:{outer}", folder)
    server, silo = kits_of(folder)
    text = (server / SERVER_FILE).read_text().replace("9091", str(inner)).replace("0.0.0.0", "127.0.0.1")
    (server / SERVER_FILE).write_text(text)
    (silo / SILO_FILE).write_text((silo / SILO_FILE).read_text().replace("9094", str(runtime)))
    write_rows(silo)


def kits_of(folder: Path) -> tuple[Path, Path]:
    """The server's kit and the silo's."""
    return folder / "server", folder / "silos" / SILO


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(folder: Path) -> tuple[list[list], list[int]]:
    """Both commands until they end; gives memory over time and their exit codes."""
    parties = []
    for command, kit in zip(("server", "client"), kits_of(folder / "kits"), strict=True):
        environment = {**os.environ, "HOME": str(folder / command), "CROSSLM_CACHE": str(folder / command / "cache")}
        with (folder / f"{command}.log").open("ab") as log:
            program = [sys.executable, "-m", "crosslm.cli.main", command, str(kit)]
            parties.append(subprocess.Popen(program, stdout=log, stderr=log, env=environment))
    samples = []
    try:
        while any(party.poll() is None for party in parties):
            samples.append(sample(parties))
            if any(party.poll() for party in parties):  # one has failed, and the other would wait for it
                break
            time.sleep(EVERY)
    finally:
        for party in parties:
            if party.poll() is None:
                party.terminate()
        codes = [party.wait() for party in parties]
    return samples, codes


def run_bare(folder: Path, rounds: int) -> tuple[list[list], list[dict]]:
    """Flower's own programs with `flower_bare.py`; gives memory over time and the seconds of each round."""
    kit, silo = kits_of(folder)
    app, told = folder / "app", folder / "seconds.json"
    app.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("flower_bare.py"), app)
    (app / "pyproject.toml").write_text(BARE_APP)
    link = Child("superlink", superlink_command(kit), kit)
    words = supernode_command(silo)
    place = words.index("--isolation")
    node = Child("supernode", words[:place] + words[place + 2 :], silo)
    configure(kit)
    samples = []
    try:
        link.start()
        wait_for_port("127.0.0.1", read_server(kit).superlink_port, link)
        flwr(kit, "supernode", "register", str(kit / "silos" / f"{SILO}.pub"), "crosslm", "--name", SILO)
        node.start()
        flwr(kit, "run", str(app), "crosslm", "--run-config", f'rounds={rounds} file="{told}"')
        while not told.exists():
            samples.append(sample([link.process, node.process]))
            if link.died() or node.died() or samples[-1][0] - samples[0][0] > PATIENCE * rounds:
                sys.exit(f"bare Flower did not end; logs are in {kit / 'logs'} and {silo / 'logs'}")
            time.sleep(EVERY)
    finally:
        node.stop()
        link.stop()
    return samples, json.loads(told.read_text())


def sample(parties: list[subprocess.Popen]) -> list:
    """The time, and the memory of both sides' processes now."""
    return [round(time.time(), 1), _resident(parties)]


def _resident(parties: list[subprocess.Popen]) -> dict[str, int]:
    """Resident bytes by program; of each side's processes of a name the sum."""
    found: dict[str, int] = {}
    for party, side in zip(parties, ("server", "client"), strict=True):
        try:
            top = psutil.Process(party.pid)
            for process in [top, *top.children(recursive=True)]:
                words = [Path(word).name for word in process.cmdline()]
                name = next((word for word in words if word.startswith(("flower-", "flwr-"))), f"crosslm {side}")
                found[f"{side}: {name}"] = found.get(f"{side}: {name}", 0) + process.memory_info().rss
        except psutil.Error:
            continue
    return found


def transfer(arrival: Arrival, after: float) -> dict:
    """One round by the journal; ``after`` is when the round before ended, or the server began."""
    return {
        "bytes": arrival.bytes,
        "state": arrival.state,
        "up": round(arrival.received_at - after, 1),
        "step": round((arrival.served_at or 0) - arrival.received_at, 1),
        "down": round((arrival.delivered_at or 0) - (arrival.served_at or 0), 1),
    }


def middle(ways: list[dict]) -> float:
    """Median seconds of a round, up and down, after the first."""
    return statistics.median(way["up"] + way["down"] for way in ways[1:])


def largest(samples: list[list]) -> int:
    """The largest sum of all processes."""
    return max(sum(sizes.values()) for _, sizes in samples)


def locked(folder: Path) -> int:
    """How often the logs of Flower's processes speak of a lock."""
    logs = (folder / "kits").rglob("*.log")
    return sum(log.read_text(errors="replace").count("database is locked") for log in logs)


def main() -> None:
    """Measure."""
    more = {
        "size": {"type": float, "help": "megabytes (440)"},
        "transfers": {"type": int, "help": "rounds in a row (10)"},
        "folder": {"type": Path, "help": "keep everything there"},
    }
    options = arguments(__doc__, **more)
    size = options.size or (1.0 if options.quick else USUAL)
    rounds = options.transfers or (2 if options.quick else 10)
    bare_rounds = min(rounds, 4)
    folder = (options.folder or Path(tempfile.mkdtemp())).absolute()
    if not (folder / "kits").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, size, rounds)
    kept = folder / "bare" / "kept.json"
    if not kept.exists():
        kept.write_text(json.dumps(run_bare(folder / "bare", bare_rounds)))
    bare_samples, bare = json.loads(kept.read_text())
    samples, codes = run(folder)
    spool = Spool(folder / "kits" / "server" / "spool")
    arrivals, began = spool.arrivals(), float(spool.fact("started") or 0)
    spool.close()
    ends = [began, *(arrival.delivered_at or arrival.received_at for arrival in arrivals)]
    if len(arrivals) < rounds or any(codes):
        sys.exit(f"not complete; logs are in {folder}, and --folder {folder} goes on")
    transfers = [transfer(arrival, end) for arrival, end in zip(arrivals, ends, strict=False)]
    figures = {
        "ratio_time": round(middle(transfers) / middle(bare), 2),
        "ratio_memory": round(largest(samples) / largest(bare_samples), 2),
        "megabytes": size,
        "transfers": transfers,
        "bare": bare,
        "memory_over_time": [[round(at - samples[0][0], 1), sizes] for at, sizes in samples],
        "errors": {"database is locked": locked(folder), "exit codes": codes},
    }
    finish("federation_live" if size == USUAL else f"federation_live_{size:g}", figures, options)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
