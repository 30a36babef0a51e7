"""A run without one client's influence, from where that began."""

import json
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from crosslm.errors import RunError
from crosslm.models.slm import SLM
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.folders import check_elsewhere
from crosslm.runs.preparation import Prepared
from crosslm.runs.rundir import CONFIG, METRICS, ROLLBACK, RunDir
from crosslm.runs.snapshot import inputs_digest, slm_state
from crosslm.support.writing import made_anew

ELSEWHERE = "or name another --output"


def roll_back(run: RunDir, client_id: str, output: Path, prepared: Callable[[], Prepared] | None = None) -> int:
    """Copy a run as it was before a client's SLM first changed the LLM, with that client barred from there on.

    The copy is an unfinished run: going on with it repeats the arrivals of the others. The run itself is
    left as it is.

    Args:
        run: any run with checkpoints.
        client_id: whose influence is unwanted.
        output: folder for the copy.
        prepared: finds the data and the models of the run, before anything is written; what it raises is raised.

    Returns:
        The arrival after which the copy goes on; 0 is the beginning.

    Raises:
        RunError: the client had no influence, nobody but it is left, the state before it has been pruned, the run was
            between machines, or its data files have changed.
    """
    run.check_in_one_process("rolled back")
    checkpoints = Checkpoints(run)
    records = [checkpoints.read(number) for number in checkpoints.numbers()]
    first = next((record["arrival"] for record in records if _influenced(record["cause"], client_id)), None)
    if first is None:
        served = sorted({record["cause"]["client"] for record in records if record["cause"]["outcome"] == "served"})
        raise RunError(
            f"{run.path}: {client_id!r} has not changed the LLM; those that have: {', '.join(served) or 'nobody'}; "
            "--client must name one that has"
        )
    before = [record for record in records if record["arrival"] < first]
    if before[-1]["state"] is None:
        raise RunError(
            f"{run.path}: the state before arrival {first}, the first of {client_id}, has been pruned "
            "(checkpoint.keep); its adapter is still there"
        )
    barred = sorted({*run.barred(), client_id})
    kept = before[-1]["state"]["kept"]
    everybody = kept.get("begin_with", {})  # checkpoints of earlier versions do not have it
    if everybody and not set(everybody).difference(barred):
        raise RunError(
            f"{run.path}: {client_id} is the only client left: there is nothing to run without it; --client must name "
            "one of several"
        )
    RunDir.check_free(output)
    check_elsewhere(output)
    if prepared is not None:
        found = prepared()
        if kept["inputs"] != inputs_digest(found.split, found.public, found.perplexity_text):
            raise RunError(
                f"{run.path}: the data files have changed since this run began; put them back as they were to go on "
                "without a client"
            )
    with made_anew(output, ELSEWHERE) as work:
        partial = RunDir(work, ELSEWHERE)
        _copy(run, partial, checkpoints, before)
        later = {record["cause"].get("client") for record in records if record["arrival"] >= first}
        done = [who for who in before[-1]["state"]["journal"]["returned"] if who not in later]
        _copy_predictions(run, partial, done, before[-1]["state"]["journal"]["accuracy"]["data_free_kd"])
        for who in done:  # for an audit: the others upload again
            if (uploaded := run.path / "uploads" / who).is_dir():
                shutil.copytree(uploaded, partial.path / "uploads" / who)
        origin = {
            "clients": barred,
            "of": [*run.rolled_back_from(), run.path.resolve().name],
            "after_arrival": before[-1]["arrival"],
        }
        partial.write(ROLLBACK, json.dumps(origin, indent=2) + "\n")
        if output.is_dir():
            shutil.rmtree(output)  # empty but for a lock: it was checked
    return int(before[-1]["arrival"])


def _influenced(cause: dict[str, Any], client_id: str) -> bool:
    return bool(cause.get("client") == client_id and cause["outcome"] == "served")


def _copy(run: RunDir, partial: RunDir, checkpoints: Checkpoints, records: list[dict[str, Any]]) -> None:
    """The configuration, the checkpoints, and what had been written until the last of them."""
    state = records[-1]["state"]
    partial.write(CONFIG, (run.path / CONFIG).read_text(encoding="utf-8"))
    partial.write_data(METRICS, (run.path / METRICS).read_bytes()[: state["events"]])
    target = Checkpoints(partial)
    target.take(checkpoints, records)
    steps = [f"step-{step:04}-" for step in range(1, state["steps"] + 1)]
    for path in sorted((run.path / "synthetic").iterdir()):
        if path.name.startswith(("base", *steps)):
            partial.write_data(f"synthetic/{path.name}", path.read_bytes())
    for client_id, name in state["journal"]["returned"].items():
        slm = slm_state(target.get(name))
        partial.save_slm(client_id, SLM.from_state(slm, slm.labels))
    previous = run.path / "slm-previous"
    for client_id in state["journal"]["returned"]:
        if (previous / client_id).is_dir():
            shutil.copytree(previous / client_id, partial.path / "slm-previous" / client_id)


def _copy_predictions(run: RunDir, partial: RunDir, clients: list[str], baselines: Container[str]) -> None:
    """What the LLM predicted before the run, and what the SLMs did of clients that did not come again.

    Those of a client that did were replaced then, and are of an SLM that the copy may never see; so were those of one
    that took what came in the end, and those of Data-free KD are of the end but for the clients in ``baselines``.
    """
    closed = {event["client"] for event in run.events() if event["event"] == "closing" and event["accepted"]}
    for path in sorted((run.path / "predictions").rglob("*.json")):
        name = path.relative_to(run.path).as_posix()
        is_kept = path.parts[-3] == "slm" and path.stem in clients
        was_replaced = path.stem in closed and path.parts[-2] != "standalone"
        is_of_the_end = path.parts[-2] == "data_free_kd" and path.stem not in baselines
        if name == "predictions/nlu/before.json" or (is_kept and not was_replaced and not is_of_the_end):
            partial.write_data(name, path.read_bytes())
