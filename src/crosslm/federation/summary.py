"""``summary.json`` of a run between machines: the keys of a run in one process, null where only a silo could know."""

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from crosslm import evaluate
from crosslm.config import Config
from crosslm.data.examples import Examples
from crosslm.federation.spool import Spool
from crosslm.models.dtypes import fit_dtype
from crosslm.privacy.bounds import privacy_summary, uploads_told
from crosslm.runs import arrivals
from crosslm.runs.measures import LLM_MEASURES, peak_memory_bytes
from crosslm.runs.rundir import ENGINE, METHODS, RunDir
from crosslm.support.provenance import versions

Event = Mapping[str, Any]


def summary_of(
    run: RunDir, config: Config, spool: Spool, silos: Iterable[str], test: Examples | None, counted: Mapping[str, Any]
) -> dict[str, Any]:
    """What the server knows at the end of a run.

    ``slm`` and ``confusion`` are of the server's own test rows. Where it has none, the figures of ``slm`` are null:
    what a classifier is worth is then measured at its silo. ``data_free_kd`` is always null, for that baseline is no
    part of a run between machines, and so are ``judge_accuracy``, since nobody's text is held out, and each client's
    ``decision`` and model name, which are the silo's own. ``rows`` are as the upload tells them, perhaps with noise, or
    0. ``peak_memory_bytes`` is of the server application since its last start. ``arrivals`` is the spool's journal,
    ``not_delivered`` who has not taken its download, ``not_uploaded`` who never sent, with the last that is known.

    Args:
        run: whose events say what happened.
        config: of the run.
        spool: whose journal says what came and went.
        silos: all that have a kit.
        test: the server's test rows, if it has any.
        counted: ``seconds`` by stage, ``tokens_generated``, ``texts_removed``; and ``llm_dtype``.
    """
    events, journal = run.events(), spool.arrivals()
    served = list(dict.fromkeys(event["client"] for event in events if event["event"] == "step"))
    began = next(event["time"] for event in events if event["event"] == "start")
    measured = {event["moment"]: event for event in events if event["event"] == "llm"}
    accuracy = accuracies(events)
    return {
        "task": config.name,
        "preset": config.preset,
        "seed": config.seed,
        "engine": ENGINE,
        "versions": versions(),
        "device": config.device,
        "llm_dtype": counted["llm_dtype"],
        "slm_dtype": {"synthetic": str(fit_dtype(config.slm.synthetic, config.device)).removeprefix("torch.")},
        "seconds": {**counted["seconds"], "total": round(events[-1]["time"] - began, 2)},
        "slm": {method: _with_mean(served, accuracy.get(method, {})) for method in METHODS},
        "confusion": {method: _confusion(run, method, accuracy.get(method, {}), served, config) for method in METHODS},
        "llm": {
            name: {moment: measured.get(moment, {}).get(name) for moment in ("before", "after")}
            for name in LLM_MEASURES
        },
        "tokens_generated": counted["tokens_generated"],
        "texts_removed": counted["texts_removed"],
        "judge_accuracy": None,
        "nlu_rows": None if test is None else len(evaluate.nlu_rows(config, test)),
        "reward_hacking": arrivals.reward_hacking(events),
        "test_rows": {client: None if test is None else len(test) for client in served},
        "no_say": arrivals.without_a_say(events),
        "clients": _clients(events, spool, config.task.labels),
        "privacy": privacy_summary(uploads_told(events)),
        "peak_memory_bytes": peak_memory_bytes(),
        "arrivals": [vars(arrival) for arrival in journal],
        "not_delivered": spool.not_delivered(silos),
        "not_uploaded": {
            silo: (spool.fact(f"silo/{silo}") or "").partition(" ")[2]
            for silo in silos
            if silo not in {arrival.silo for arrival in journal}
        },
    }


def accuracies(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """For each method the last accuracy of each client that was measured."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event["event"] == "test":
            right = event["right"]
            found.setdefault(event["method"], {})[event["client"]] = right.count("1") / len(right)
    return found


def _with_mean(served: list[str], accuracy: Mapping[str, float]) -> dict[str, float | None]:
    known = [accuracy[client] for client in served if client in accuracy]
    mean = statistics.fmean(known) if known and len(known) == len(served) else None
    return {client: accuracy.get(client) for client in served} | {"mean": mean}


def _confusion(
    run: RunDir, method: str, accuracy: Mapping[str, float], served: list[str], config: Config
) -> dict[str, list[list[int]]]:
    counts = {}
    for client in (client for client in served if client in accuracy):
        kept = json.loads((run.path / "predictions" / "slm" / method / f"{client}.json").read_text(encoding="utf-8"))
        counts[client] = evaluate.confusion_counts(kept["predicted"], kept["gold"], len(config.task.labels))
    return counts


def _clients(events: Iterable[Event], spool: Spool, labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Those whose uploads were worked on, by their last one."""
    clients = {}
    for event in (event for event in events if event["event"] == "upload"):
        mine = spool.of(event["client_id"])
        down = [spool.download_file(arrival.silo, arrival.round) for arrival in mine if arrival.download_sha256]
        down.append(spool.closing_file(event["client_id"]))
        clients[event["client_id"]] = {
            "model": {"model": None, "num_hidden_layers": None, "type": event["model_type"]},
            "rows": dict(zip(labels, event["class_counts"], strict=False)),
            "bytes_up": sum(arrival.bytes for arrival in mine),
            "bytes_down": sum(path.stat().st_size for path in down if path.exists()),
            "decision": None,
        }
    return clients
