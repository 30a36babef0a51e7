"""Runs that are killed: one process that imports everything once and forks a child for every run.

``python crash_driver.py FOLDER CONFIG`` reads one JSON object a line, ``{"folder", "point", "count", "after"}``:
a child runs in that folder and is killed with SIGKILL the ``count``-th time that it comes to ``point``, or
``after`` so many seconds; then another child goes on with the run, but with ``"goes_on": false``.
``{"folder", "whole": true}`` is a run that nobody kills. Answers one JSON object a line. No line of the package knows
of this: the points are put around its functions here.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

from crosslm import client, evaluate, experiment, llm_update, server
from crosslm.config_file import load
from crosslm.federation import local
from crosslm.models import llm, slm
from crosslm.runs import checkpoint, journal, rundir

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

POINTS = {
    "begin a write": (rundir.RunDir, "write_data"),
    "fsync": (rundir.os, "fsync"),
    "rename": (rundir.Path, "replace"),
    "an event": (rundir.RunDir, "event"),
    "folder of a model": (rundir.RunDir, "_write_folder"),
    "keep a blob": (checkpoint.Checkpoints, "put"),
    "prune": (checkpoint.Checkpoints, "prune"),
    "client trains": (client.Client, "train"),
    "client installs": (client.Client, "install"),
    "epoch of an SLM": (slm.SLM, "_epoch"),
    "intake": (experiment.Intake, "upload"),
    "client's intake": (experiment.Intake, "download"),
    "generation": (llm.LLM, "generate"),
    "update": (llm_update, "backward"),
    "selection": (server, "select"),
    "SLM on synthetic text": (server, "train_on_synthetic"),
    "baseline": (journal, "data_free_kd"),
    "journal": (journal.RunJournal, "served"),
    "send": (local.LocalExchange, "send"),
    "judge": (evaluate, "train_judge"),
    "final measures": (experiment._Run, "_finish"),
    "summary": (rundir.RunDir, "summarise"),
}


def armed(point, count):
    """Have the process die the so-many-th time that it comes to a point."""
    owner, name = POINTS[point]
    function, left = getattr(owner, name), [count]

    def dies(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, dies)


def child(folder, config, point=None, count=0):
    """A run, or going on with one, in a process of its own; gives its id."""
    process = os.fork()
    if process:
        return process
    try:
        if point:
            armed(point, count)
        experiment.run_local(load(config), Path(folder), Path(folder).parent, resume=True)
        os._exit(0)
    except BaseException:  # noqa: BLE001  a child must end here, whatever happens
        traceback.print_exc()
        os._exit(1)


def ended(process, seconds=None):
    """Wait for a child; kill it after so many seconds. Gives how it ended and how long it took."""
    started = time.monotonic()
    while seconds is not None and time.monotonic() - started < seconds:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.005)
    if seconds is not None:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), time.monotonic() - started


def main():
    config = sys.argv[1]
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("whole"):  # in this process, so that the children find every module imported
            started = time.monotonic()
            experiment.run_local(load(config), Path(order["folder"]), Path(order["folder"]).parent)
            answer = {"seconds": time.monotonic() - started}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            continue
        point = order.get("point")
        killed, seconds = ended(child(order["folder"], config, point, order.get("count", 1)), order.get("after"))
        gone_on = ended(child(order["folder"], config))[0] if killed and order.get("goes_on", True) else 0
        sys.stdout.write(json.dumps({"killed": killed, "gone_on": gone_on, "seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
