"""Following a run from another terminal."""

import io
import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial

import pytest
from conftest import PATIENCE
from made_run import write_run
from rich.console import Console

from crosslm import experiment
from crosslm.errors import RunError
from crosslm.experiment import run_local
from crosslm.runs.rundir import RunDir
from crosslm.runs.watch import follow, sentence, watch


def started(folder):
    folder.mkdir()
    (folder / "config.toml").write_text("")
    return RunDir.open(folder)


@pytest.fixture
def at_work():
    """A run whose process lives."""
    with ExitStack() as held:

        def begun(folder):
            run = started(folder)
            held.enter_context(run.locked())
            return run

        yield begun


def test_a_run_whose_process_was_killed_is_not_waited_for(tmp_path):
    """Nothing tells of it but the lock, which goes with the process."""
    run = started(tmp_path / "my run")
    run.event("start")
    console = Console(file=io.StringIO(), width=80)
    assert not watch(run, console, pause=pytest.fail)
    assert console.file.getvalue().splitlines() == [
        "started, 0 clients",
        f"The run has stopped. To go on: crosslm run '{run.path}/config.toml' --output '{run.path}' --resume",
    ]


def test_events_come_as_they_are_written_and_half_a_line_waits(tmp_path, at_work):
    run = at_work(tmp_path / "run")
    seen = follow(run, pause=lambda _: None)
    assert next(seen) is None
    run.event("start")
    assert next(seen)["event"] == "start"
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "war')
    assert next(seen) is None
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('ning", "message": "ü"}\n')
    assert next(seen)["message"] == "ü"
    (run.path / "summary.json").write_text("{}")
    assert list(seen) in ([], [None])


def test_a_run_that_was_taken_back_is_followed_on(tmp_path, at_work):
    run = at_work(tmp_path / "run")
    seen = follow(run, pause=lambda _: None)
    for number in range(4):
        run.event("warning", message=f"number {number}")
    assert [next(seen)["message"] for _ in range(4)] == [f"number {number}" for number in range(4)]
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))  # as --resume does
    assert next(seen) is None
    run.event("warning", message="again")
    assert next(seen)["message"] == "again"
    path.write_bytes(b"".join(lines[:1]))  # and it is longer than before when it is looked at again
    run.event("warning", message="another" + "r" * len(lines[1]) * 2)
    run.event("warning", message="last")
    assert [event["message"][:7] for event in (next(seen), next(seen))] == ["another", "last"]


def test_it_ends_with_a_failed_run_but_not_with_one_that_was_taken_up_again(tmp_path, at_work):
    run = at_work(tmp_path / "run")
    run.event("end", error="OSError: disk full")
    run.event("start")
    seen = follow(run, pause=lambda _: None)
    assert [next(seen)["event"], next(seen)["event"], next(seen)] == ["end", "start", None]
    run.event("end", error="OSError: disk full again")
    assert [event["error"] for event in seen if event] == ["OSError: disk full again"]


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    extra = [
        {"event": "warning", "message": "few texts"},
        {"event": "failure", "client": "west", "error": "MemoryError: full"},
        {"event": "gate", "client": "east", "passed": False, "reason": "agrees with nobody"},
        {"event": "llm", "moment": "after", "nlu_accuracy": 0.8},
        {"event": "upload", "client_id": "west", "class_counts": [0, 0], "bytes": 2e6, "metrics": {}},
    ]
    console = Console(file=io.StringIO(), width=80)
    assert watch(RunDir.open(write_run(tmp_path / "run", extra=extra)), console)
    assert console.file.getvalue().splitlines() == [
        "started, 0 clients",
        "upload from north: 200 private rows, 0.0 MB of weights",
        "step 1: north 0.700 -> 0.800 (data-free KD 0.700), reward +0.20, judge 0.900",
        "upload from south: 200 private rows, 0.0 MB of weights",
        "step 2: south 0.700 -> 0.800 (data-free KD 0.700), reward +0.50, judge 0.700",
        "warning: few texts",
        "client west failed: MemoryError: full",
        "the upload of client east was quarantined: agrees with nobody",
        "LLM after: nlu_accuracy 0.800",
        "upload from west: number of private rows hidden, 2.0 MB of weights",
    ]


def test_a_table_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    assert watch(RunDir.open(write_run(tmp_path / "run")), console)
    assert "│ 2       │ south  │      0.700 │   0.800 │  +0.50 │ 0.700 │" in console.file.getvalue()


def test_a_damaged_line_is_said(tmp_path):
    run = started(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text("{\n")
    with pytest.raises(RunError, match=r"metrics.jsonl: damaged"):
        list(follow(run))


def test_a_run_that_is_stopped_tells_its_watchers(config, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.LLMMeter, "reading", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_local(config, tmp_path / "run", tmp_path)
    console = Console(file=io.StringIO(), width=80)
    assert not watch(RunDir.open(tmp_path / "run"), console)
    assert "the run ended: KeyboardInterrupt: \nThe run has stopped. To go on:" in console.file.getvalue()


def test_the_command_ends_with_the_run_and_with_130_on_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "crosslm.cli.main", "watch"]
    folder = write_run(tmp_path / "run")
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()

    def watching():
        # where the tests themselves run in the background, Ctrl-C is ignored by all that they start
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True, preexec_fn=heed)
        stack.enter_context(process)
        stack.callback(process.kill)  # comes first: to leave a process is to wait for its end
        return process

    with ExitStack() as stack:
        stack.enter_context(RunDir.open(folder).locked())
        first, second = watching(), watching()
        for process in (first, second):
            assert process.stdout.readline() == "started, 0 clients\n"
        first.send_signal(signal.SIGINT)
        assert first.wait(PATIENCE) == 130
        assert second.poll() is None
        (folder / "summary.json").write_text(summary)
        rest, _ = second.communicate(timeout=PATIENCE)
        assert second.returncode == 0
    assert "SLM accuracy on test text" in rest
    assert json.loads(summary)["task"] in rest


def test_reading_a_run_does_not_wait_for_torch():
    code = (
        "import sys, crosslm.cli.main, crosslm.runs.watch, crosslm.html_report.page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slm/crosslm": 0.81, "slm/data_free_kd": 0.8}, "in the end: north 0.810 (data-free KD 0.800)"),
        ({"slm/crosslm": 0.81}, "in the end: north 0.810"),  # between machines
        ({}, "in the end: north has been taught once more"),
    ],
)
def test_the_end_is_told_client_by_client(fields, words):
    assert sentence({"event": "closing", "client": "north", **fields}) == words
