"""What one hostile client does to a run, with the gate and without it.

    python benchmarks/attacks.py sst2 --data-dir DATA --seeds 3    # DATA: a folder with the configuration's files
    python benchmarks/attacks.py sst2 --data-dir DATA --quick --attacks flipped,constant

For each attack one run with the gate and one without, and for all of them a run in which the hostile client stays away:
the same split, the same honest rows, the same order of arrival. The hostile client is the third to arrive unless
--place says otherwise: there are uploads to copy, and an honest client comes after it. It attacks by what it uploads,
through the same bytes and checks as all others. Each cell is written to benchmarks/results/attacks-NAME.json when done,
and skipped when it is there. With --quick the amounts are smaller.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm.client import Client
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.split import load_split
from crosslm.errors import ConfigError, CrosslmError, ModelError, RunError
from crosslm.experiment import run_local
from crosslm.federation.local import arrival_order
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, resolve_device
from crosslm.records import Upload
from crosslm.runs.finished import Run
from crosslm.runs.rundir import RunDir
from crosslm.support.seeding import seed_for

ATTACKS = ("flipped", "constant", "random", "trigger", "copy")
NONE = "none"
QUICK = (
    "llm.samples=48",
    "selection.pool=192",
    "synthesis.max_new_tokens=32",
    "evaluation.nlg_samples=192",
    "evaluation.nlu_rows=100",
    "data.test_rows=200",
)
TRIGGER_SHARE = 3  # one in so many rows of the other labels gets the trigger word and the target label
CONSTANT_LOGIT = 5.0

# -- the hostile client ----------------------------------------------------------------------


class Overheard(Client):
    """An honest client whose uploads another one gets to see."""

    def __init__(self, heard: list[Upload], *client: Any, **settings: Any) -> None:
        super().__init__(*client, **settings)
        self._heard = heard

    def train(self) -> Upload:
        """Step 1."""
        upload = super().train()
        self._heard.append(upload)
        return upload


class Absent(Client):
    """A client that never uploads."""

    def train(self) -> Upload:
        """Step 1 does not happen."""
        raise CrosslmError("stays away")


class Hostile(Client):
    """A client that trains on its rows and uploads something else."""

    def __init__(self, attack: str, heard: list[Upload], *client: Any, **settings: Any) -> None:
        super().__init__(*client, **settings)
        self._attack, self._overheard = attack, heard

    def train(self) -> Upload:
        """Step 1, and what the attack makes of its upload."""
        upload = super().train()
        if self._attack == "constant":
            return constant(upload)
        if self._attack == "random":
            return random_weights(upload, seed_for(self._seed, "attack", upload.client_round))
        if self._attack == "copy":
            return dataclasses.replace(self._overheard[-1], client_id=self.id, client_round=upload.client_round)
        return upload


@dataclasses.dataclass
class Silos:
    """Makes the clients of one run, one of which attacks, or stays away if the attack is ``none``."""

    attack: str
    hostile: str
    trigger: str
    heard: list[Upload] = dataclasses.field(default_factory=list)

    def __call__(self, client_id: str, private: Examples, slm: SLM, *rest: Any, **settings: Any) -> Client:
        """One client."""
        if client_id != self.hostile:
            return Overheard(self.heard, client_id, private, slm, *rest, **settings)
        if self.attack == NONE:
            return Absent(client_id, private, slm, *rest, **settings)
        rows = poisoned(private, self.attack, len(slm.labels), self.trigger)
        return Hostile(self.attack, self.heard, client_id, rows, slm, *rest, **settings)


def poisoned(private: Examples, attack: str, labels: int, trigger: str) -> Examples:
    """The rows that the hostile client trains on.

    ``flipped``: each row has the next label. ``trigger``: of the rows of other labels than the last one in
    three starts with the trigger word and has the last label. Otherwise they are as they were.
    """
    if attack == "flipped":
        return Examples(private.texts, [(label + 1) % labels for label in private.labels])
    if attack != "trigger":
        return private
    others = [place for place, label in enumerate(private.labels) if label != labels - 1]
    marked = set(others[::TRIGGER_SHARE])
    rows = enumerate(zip(private.texts, private.labels, strict=True))
    pairs = [(f"{trigger} {text}", labels - 1) if place in marked else (text, label) for place, (text, label) in rows]
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


def constant(upload: Upload) -> Upload:
    """The classifier with a last layer that reads nothing and says one label of every text."""
    layers = SLM.from_state(upload.slm, upload.slm.labels).model.named_modules()
    count = len(upload.slm.labels)
    *_, name = (name for name, layer in layers if getattr(layer, "out_features", None) == count)
    changed = {f"{name}.weight": torch.zeros_like(upload.slm.weights[f"{name}.weight"])}
    if f"{name}.bias" in upload.slm.weights:
        changed[f"{name}.bias"] = torch.zeros(count).index_fill(0, torch.tensor(count - 1), CONSTANT_LOGIT)
    return with_weights(upload, changed)


def random_weights(upload: Upload, seed: int) -> Upload:
    """Every tensor drawn from the normal distribution of its own mean and deviation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, value in upload.slm.weights.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            drawn[name] = value.mean() + value.std(correction=0) * noise
    return with_weights(upload, drawn)


def with_weights(upload: Upload, changed: dict[str, torch.Tensor]) -> Upload:
    """The upload with some tensors changed."""
    return dataclasses.replace(upload, slm=dataclasses.replace(upload.slm, weights=upload.slm.weights | changed))


# -- the cells -------------------------------------------------------------------------------


def hostile_client(config: Config, place: int) -> str:
    """The client that is the ``place``-th to arrive for the first time.

    Raises:
        ConfigError: there is no such place after another client, or there is no judge.
    """
    split = load_split(config)
    if not len(split.judge):
        raise ConfigError(
            f"{config.name}: has no rows for the judge, without whom nothing is told; set data.judge_rows"
        )
    order = arrival_order(list(split.private), config.federation.participations, config.seed)
    if not 2 <= place <= len(split.private):
        raise ConfigError(
            f"{config.name}: the hostile client's place must be from 2 to {len(split.private)}, is {place}"
        )
    return list(dict.fromkeys(order))[place - 1]


def cell(config: Config, attack: str, trigger: str, place: int, cache: Path) -> dict[str, Any]:
    """One run with a hostile client, or with ``none`` without it, and its figures; the run itself is not kept."""
    hostile, started = hostile_client(config, place), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            run_local(config, path, cache, make_client=Silos(attack, hostile, trigger))
        except ModelError as error:  # an attack may end a run: the LLM that it left cannot write what is measured
            if attack == NONE:
                raise
            return {"hostile": hostile, "error": str(error)}
        figures = measured(Run.open(path, cache), hostile)
        if attack in (NONE, "trigger"):
            figures["trigger_found"] = trigger_found(Run.open(path, cache), hostile, trigger)
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def measured(run: Run, hostile: str) -> dict[str, Any]:
    """The figures of a run: those of the LLM after it, those of the honest clients' SLMs, and what the gate said."""
    events, accuracy = RunDir(run.path).events(), {}
    for event in events:  # a client that got nothing back still has the SLM that it uploaded
        if event["event"] == "test" and event["method"] in ("standalone", "crosslm") and event["client"] != hostile:
            accuracy[event["client"]] = event["right"].count("1") / len(event["right"])
    gates = [event for event in events if event["event"] == "gate"]
    dropped = {"event", "time", "client", "step"}
    weights = b"".join(path.read_bytes() for path in sorted(run.llm_folder.glob("*.safetensors")))
    return {
        "hostile": hostile,
        "uploads": {
            "served": sum(  # one that is taught and has no say is none of them
                event["event"] == "step" and event["client"] == hostile and not event.get("no_say") for event in events
            ),
            "quarantined": sum(event["client"] == hostile and not event["passed"] for event in gates),
            "failed": sum(event["event"] == "failure" and event["client"] == hostile for event in events),
        },
        "gate": [
            {name: value for name, value in event.items() if name not in dropped}
            for event in gates
            if event["client"] == hostile
        ],
        "honest_quarantined": [
            event["client"] for event in gates if event["client"] != hostile and not event["passed"]
        ],
        "llm_sha256": hashlib.sha256(weights).hexdigest(),
        "nlg_judge": run.summary["llm"]["nlg_judge_accuracy"]["after"],
        "nlu": run.summary["llm"]["nlu_accuracy"]["after"],
        "honest": accuracy,
        "honest_mean": statistics.fmean(accuracy.values()),
    }


def trigger_found(run: Run, hostile: str, trigger: str) -> float:
    """Share of test rows of other labels that, begun with the word, get the last label from honest clients' SLMs."""
    target, shares = len(run.task.labels) - 1, []
    tests = load_split(run.config).tests
    for client in run.clients:
        if client != hostile:
            test = tests[client]
            pairs = zip(test.texts, test.labels, strict=True)
            texts = [f"{trigger} {text}" for text, label in pairs if label != target]
            found = run.slm(client, own=False).predict_proba(texts).argmax(dim=1)
            shares.append(float((found == target).double().mean()))
    return statistics.fmean(shares)


def difference(figures: dict[str, Any], without: dict[str, Any]) -> dict[str, float]:
    """Points by which a cell's figures differ from those of the run without the hostile client."""
    return {name: round(100 * (figures[name] - without[name]), 3) for name in ("nlg_judge", "nlu", "honest_mean")}


def fill(
    config: Config,
    cells: dict[str, Any],
    attacks: list[str],
    seeds: int,
    trigger: str,
    place: int,
    cache: Path,
    done: Callable[[str], None],
) -> None:
    """Run the cells that are missing.

    Args:
        config: what to run; seed and gate.enabled are set for each cell.
        cells: figures by ``ATTACK/GATE/SEED``, GATE being ``on`` or ``off``; is added to.
        attacks: which ones.
        seeds: how many, from 0.
        trigger: the word.
        place: of the hostile client in the order of first arrivals, from 2.
        cache: where converted models are kept.
        done: called with the key of each new cell.
    """
    for seed in range(seeds):
        reference = f"{NONE}/on/{seed}"
        for key in [reference, *(f"{attack}/{gate}/{seed}" for attack in attacks for gate in ("on", "off"))]:
            if key in cells:
                continue
            attack, gate, _ = key.split("/")
            gated = config.gate.model_copy(update={"enabled": gate == "on"})
            cells[key] = cell(config.model_copy(update={"seed": seed, "gate": gated}), attack, trigger, place, cache)
            if key != reference and "error" not in cells[key]:
                cells[key]["difference"] = difference(cells[key], cells[reference])
            done(key)


def started(path: Path, config: Config, trigger: str, place: int) -> dict[str, Any]:
    """What a file of figures holds so far.

    Raises:
        RunError: its figures are of other settings.
    """
    settings = config.model_dump(mode="json", exclude={"seed": True, "data": {"dir"}, "gate": {"enabled"}})
    digest = hashlib.sha256(json.dumps([settings, trigger, place], sort_keys=True).encode()).hexdigest()[:16]
    if not path.exists():
        origin = {**provenance(resolve_device(config.device)), "task": config.name, "preset": config.preset}
        return {**origin, "place": place, "settings": digest, "cells": {}}
    figures: dict[str, Any] = json.loads(path.read_text())
    if figures["settings"] != digest:
        raise RunError(f"{path}: has figures of other settings; remove it, or give the same ones")
    return figures


def main() -> None:
    """Fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, or the name of a packaged configuration")
    parser.add_argument("--data-dir")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="with commas between them (default: all)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trigger", default="today", help="a word that an LLM writes and that says nothing of a label")
    parser.add_argument("--place", type=int, default=3, help="of the hostile client in the order of arrival")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    attacks = arguments.attacks.split(",")
    if not set(attacks) <= set(ATTACKS):
        parser.error(f"--attacks {arguments.attacks}: must be some of {','.join(ATTACKS)}")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = load(arguments.config, (*(QUICK if arguments.quick else ()), *arguments.set), arguments.data_dir)
        name = f"attacks-{config.name}" + ("-quick" if arguments.quick else "")
        figures = started(RESULTS / f"{name}.json", config, arguments.trigger, arguments.place)
        commit = provenance()["commit"]

        def done(key: str) -> None:
            figures["cells"][key]["commit"] = commit
            keep(name, figures)
            print(key, json.dumps(figures["cells"][key]), flush=True)

        fill(
            config, figures["cells"], attacks, arguments.seeds, arguments.trigger, arguments.place, cache_folder(), done
        )
    except CrosslmError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
