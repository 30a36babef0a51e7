"""A crash loses nothing: killed anywhere, a run goes on and ends as one that never was killed."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w
from conftest import PATIENCE, smallest, write_data
from crash_driver import POINTS
from safetensors.torch import load_file, save_file

from crosslm import experiment
from crosslm.client import Client, Decision
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import RunError, StoppedError
from crosslm.experiment import run_local
from crosslm.federation.local import arrival_order
from crosslm.models.slm import SLM
from crosslm.runs import rundir
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.rollback import roll_back
from crosslm.runs.rundir import RunDir

CLOCK = ("time", "seconds", "peak_memory_bytes")
"""What differs between any two runs: wall-clock time, and the memory of the process."""
UNCOMPARED = ("sessions.jsonl", ".lock")
TRACKER = "tensorboard/"
"""A tracker's files: one for each session, named by time and process. They show the run and are none of its results."""


def without_clock(value):
    if isinstance(value, dict):
        return {name: without_clock(entry) for name, entry in value.items() if name not in CLOCK}
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def contents(folder):
    """Every file of a run by name: its bytes' SHA-256, or for JSON all but the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in UNCOMPARED or name.startswith(TRACKER):
            continue
        if path.name == "metrics.jsonl":
            found[name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "summary.json":
            found[name] = without_clock(json.loads(path.read_text()))
        elif name.startswith("checkpoints/arrival-"):
            record = json.loads(path.read_text())["record"]
            if record["state"]:
                record["state"]["events"] = 0  # the time is now longer, now shorter
            found[name] = without_clock(record)
        else:
            data = path.read_bytes().replace(str(folder.parent).encode(), b"HERE")
            found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture
def small(settings):
    """Two clients that arrive twice each, with everything that has a state switched on."""
    fit = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "patience": 0}
    settings["slm"] |= {"private": fit | {"epochs": 8, "learning_rate": 1e-2}, "synthetic": fit, "weigh_judges": True}
    settings["llm"] |= {"samples": 4, "iterations": 2, "gamma_anchor": 0.5, "anchors": 2}
    settings["selection"] |= {"pool": 6}
    settings["synthesis"] |= {"max_new_tokens": 6}
    settings["evaluation"] |= {"nlu_rows": 4, "nlg_samples": 4, "perplexity_tokens": 50, "judge": fit}
    settings["federation"] = {"participations": 2}
    # a gate that lets in who has learned its rows: they outnumber what models this small write, which has no label
    settings["gate"] = {
        "enabled": True,
        "min_texts": 1,
        "texts": 2,
        "confidence": 0.999999,
        "max_share": 1.0,
        "min_correlation": -1.0,
        "public_texts": "train.csv",
    }
    settings["checkpoint"] = {"keep": 2}
    return settings


@pytest.fixture
def small_file(small, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(small))
    return path


@pytest.fixture
def driver(small_file):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("crash_driver.py")), str(small_file)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:

        def order(folder, **fields):
            process.stdin.write(json.dumps({"folder": str(folder), **fields}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield order
        process.stdin.close()


KILLED_AT = (
    ("begin a write", 5), ("judge", 1), ("client trains", 2), ("update", 3), ("send", 2), ("client's intake", 1),
    ("final measures", 1),
), (
    ("fsync", 1), ("fsync", 30), ("baseline", 1), ("intake", 2), ("selection", 1), ("client installs", 2),
    ("summary", 1),
), (
    ("rename", 1), ("rename", 22), ("epoch of an SLM", 3), ("SLM on synthetic text", 2), ("journal", 2),
), (
    ("an event", 12), ("prune", 2), ("keep a blob", 8), ("generation", 4), ("folder of a model", 2),
)  # fmt: skip
"""Of each run: where it is killed, again and again; the so-many-th time that it comes there."""


def test_killed_again_and_again_and_at_random_times_a_run_ends_the_same(driver, tmp_path):
    assert {point for points in KILLED_AT for point, _ in points} == set(POINTS)
    seconds = driver(tmp_path / "whole", whole=True)["seconds"]
    expected = contents(tmp_path / "whole")
    assert {"summary.json", "llm/adapter_model.safetensors", "synthetic/final.jsonl"} <= set(expected)
    for place, points in enumerate(KILLED_AT):
        folder = tmp_path / f"killed-{place}"
        for number, (point, count) in enumerate(points, start=1):
            answer = driver(folder, point=point, count=count, goes_on=number == len(points))
            assert answer["killed"] == -signal.SIGKILL, point
        assert answer["gone_on"] == 0
        assert contents(folder) == expected, points
    for number in range(2):
        folder = tmp_path / f"at-random-{number}"
        answer = driver(folder, after=random.Random(number).uniform(0.1, 0.9) * seconds)
        assert answer["killed"] in (0, -signal.SIGKILL)
        assert answer["gone_on"] == 0
        assert contents(folder) == expected


def test_a_client_shut_out_by_a_rollback_leaves_no_trace(small_file, small, tmp_path, monkeypatch, command):
    small["gate"] = {"enabled": False}
    small["data"]["num_clients"] = 3
    small_file.write_text(tomli_w.dumps(small))
    assert command("run", small_file, "--output", tmp_path / "run")[0] == 0
    before = contents(tmp_path / "run")
    code, out, err = command("status", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "complete, 6 arrivals done" in out
    assert "arrival 0: beginning" in out
    assert "(only the adapter is kept)" in out
    order = [line.split(": ")[1] for line in out.splitlines() if line.startswith("arrival") and "served" in line]
    first, other = order[0], next(name for name in order if name != order[0])
    target = tmp_path / f"run-without-{first}"
    neighbour = target.with_name(f"{target.name}.partial") / "mine.txt"
    neighbour.parent.mkdir()
    neighbour.write_text("mine")
    code, out, err = command("rollback", tmp_path / "run", "--client", first)
    assert (code, err) == (0, "")
    assert f"after arrival 0, without {first}" in " ".join(out.split())
    assert contents(tmp_path / "run") == before
    assert neighbour.read_text() == "mine"
    assert target.stat().st_mode & 0o777 == 0o700
    monkeypatch.chdir(tmp_path / "run")
    code, _, err = command("rollback", ".", "--client", first)
    assert code == 2
    assert f"{target}: holds another run already" in err
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr("crosslm.cli.recovery.finish", lambda *_, **__: None)
    assert command("rollback", ".", "--client", first, "--output", elsewhere)[0] == 0
    assert RunDir(elsewhere).rolled_back_from() == ["run"]
    monkeypatch.undo()

    ordered = experiment.LocalExchange.__init__

    def without(exchange, *arguments, **options):
        ordered(exchange, *arguments, **options)
        exchange.go_on(0, [first])

    monkeypatch.setattr(experiment.LocalExchange, "__init__", without)
    run_local(load(small_file), tmp_path / "never", tmp_path)
    found, expected = contents(target), contents(tmp_path / "never")
    assert found.pop("rollback.json")
    for name in [name for name in {**found, **expected} if name.startswith("checkpoints/")]:
        found.pop(name, None), expected.pop(name, None)
    assert found == expected
    assert not (target / "slm" / first).exists()
    assert (target / "slm" / other).is_dir()
    monkeypatch.setattr("crosslm.cli.recovery.finish", lambda *_, **__: None)
    assert command("rollback", target, "--client", other, "--output", tmp_path / "again")[0] == 0
    assert RunDir(tmp_path / "again").rolled_back_from() == ["run", target.name]
    assert RunDir(tmp_path / "again").barred() == sorted([first, other])  # who was shut out first stays so

    code, _, err = command("rollback", tmp_path / "run", "--client", "nobody")
    assert code == 2
    assert "'nobody' has not changed the LLM; those that have: client-0, client-1, client-2" in err


def test_a_rollback_keeps_the_uploads_of_those_who_do_not_come_again(settings, tmp_path, command):
    settings["gate"] = {"enabled": False}
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(settings))
    run = tmp_path / "run"
    assert command("run", file, "--output", run)[0] == 0
    first, second = (Checkpoints(RunDir(run)).read(number)["cause"]["client"] for number in (1, 2))
    assert command("rollback", run, "--client", second)[0] == 0
    copy = tmp_path / f"run-without-{second}"
    assert contents(copy / "uploads") == {
        name: data for name, data in contents(run / "uploads").items() if name.startswith(f"{first}/")
    }
    assert not (copy / "uploads" / second).exists()
    code, _, err = command("rollback", copy, "--client", first)
    assert code == 2
    assert f"{copy}: {first} is the only client left: there is nothing to run without it" in err
    assert not copy.with_name(f"{copy.name}-without-{first}").exists()


def test_a_rollback_that_could_not_be_gone_on_with_writes_nothing(
    settings, models, data_folder, tmp_path, monkeypatch, command
):
    settings["gate"] = {"enabled": False}
    settings["selection"]["encoder"] = "./encoder"
    file, run, copy = tmp_path / "tiny.toml", tmp_path / "run", tmp_path / "copy"
    file.write_text(tomli_w.dumps(settings))
    monkeypatch.chdir(models)
    assert command("run", file, "--output", run)[0] == 0
    client = Checkpoints(RunDir(run)).read(1)["cause"]["client"]
    back = ("rollback", run, "--client", client, "--output")
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*back, copy)
    assert code == 2
    assert "selection.encoder = './encoder'" in err
    monkeypatch.chdir(models)
    train = (data_folder / "train.csv").read_text()
    (data_folder / "train.csv").write_text(train + "a new row.,good\n")
    code, _, err = command(*back, copy)
    assert code == 2
    assert f"{run}: the data files have changed since this run began" in err
    (data_folder / "train.csv").write_text(train)
    (tmp_path / "file").write_text("")
    code, _, err = command(*back, tmp_path / "file" / "copy")
    assert code == 2
    assert "file/copy: cannot be written: " in err
    assert "or name another --output" in err
    assert not copy.exists()
    monkeypatch.setattr("crosslm.cli.recovery.finish", lambda *_, **__: None)
    assert command(*back, copy)[0] == 0
    code, _, err = command(*back, copy)  # as it says after a rollback that was interrupted
    assert code == 2
    assert f"or go on with it: crosslm run {copy / 'config.toml'} --output {copy} --resume" in err


@pytest.mark.parametrize("takes", [True, False])
def test_a_rollback_keeps_the_predictions_that_nothing_in_the_end_replaced(
    settings, tmp_path, monkeypatch, command, takes
):
    settings["gate"], settings["acceptance"] = {"enabled": False}, {"enabled": True, "margin": 0.99}
    file, run, installed, install = tmp_path / "tiny.toml", tmp_path / "run", [], Client.install
    file.write_text(tomli_w.dumps(settings))

    def in_the_end(client, download):
        installed.append(client.id)
        return install(client, download) if takes or len(installed) <= 2 else Decision(False, 2, 0.5, 0.0, True)

    monkeypatch.setattr(Client, "install", in_the_end)
    assert command("run", file, "--output", run)[0] == 0
    assert installed[:2] == installed[2:]
    first, second = installed[:2]
    assert command("rollback", run, "--client", second)[0] == 0
    kept = f"predictions/slm/crosslm/{first}.json"
    assert (tmp_path / f"run-without-{second}" / kept).exists() != takes
    roll_back(RunDir.open(run), second, tmp_path / "copy")  # the command has gone on from it
    of_the_end = f"predictions/slm/data_free_kd/{first}.json"  # by the judgement of the one that is left out, too
    assert (run / of_the_end).exists()
    assert not (tmp_path / "copy" / of_the_end).exists()


def test_a_rollback_to_what_was_pruned_says_so(small_file, small, tmp_path, command):
    small["gate"] = {"enabled": False}
    small["checkpoint"] = {"keep": 1}
    small_file.write_text(tomli_w.dumps(small))
    assert command("run", small_file, "--output", tmp_path / "run")[0] == 0
    causes = [Checkpoints(RunDir(tmp_path / "run")).read(number)["cause"] for number in range(1, 5)]
    late = next(cause["client"] for cause in causes if cause["client"] != causes[0]["client"])
    code, _, err = command("rollback", tmp_path / "run", "--client", late)
    assert code == 2
    assert f"the first of {late}, has been pruned (checkpoint.keep)" in err


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """What the run leaves that nothing stops."""
    here = tmp_path_factory.mktemp("whole")
    run_local(Config.model_validate(smallest(models, write_data(here / "data"))), here / "my run", here)
    return contents(here / "my run")


@pytest.fixture
def stopped(config, tmp_path):
    """A run that was asked to stop after its first arrival."""
    folder, asked = tmp_path / "my run", iter([False, True])
    with pytest.raises(StoppedError, match=r"stopped after arrival 1; .* To go on: crosslm run '.*my run' --resume"):
        run_local(config, folder, tmp_path, stop_requested=lambda: next(asked))
    return folder


def test_a_stopped_run_says_how_to_go_on_and_ends_the_same(config, config_file, stopped, tmp_path, command, whole):
    code, out, _ = command("status", stopped)
    assert code == 0
    assert f"{stopped}: stopped, 1 arrivals done" in out
    assert f"To go on: crosslm run '{stopped / 'config.toml'}' --output '{stopped}' --resume" in out
    code, _, err = command("run", config_file, "--output", stopped)
    assert code == 2
    assert f"or go on with it: crosslm run '{stopped / 'config.toml'}' --output '{stopped}' --resume" in err
    code, out, err = command("run", config_file, "--output", stopped, "--resume")
    assert (code, err) == (0, "")
    assert f"{stopped}: going on after arrival 1" in out
    assert contents(stopped) == whole
    code, out, _ = command("run", config_file, "--output", stopped, "--resume")
    assert code == 0
    assert "the run is complete already" in out


def test_who_goes_on_deletes_what_a_killed_one_had_not_and_nothing_where_an_arrival_is_damaged(
    config, stopped, tmp_path
):
    unnamed = stopped / "checkpoints" / "blobs" / "of-a-run-that-was-killed"
    unnamed.write_bytes(b"")
    with pytest.raises(StoppedError):
        run_local(config, stopped, tmp_path, resume=True, stop_requested=lambda: True)
    assert not unnamed.exists()
    (stopped / "checkpoints" / "arrival-0000.json").write_text("{")  # which nobody needs to go on
    unnamed.write_bytes(b"")
    run_local(config, stopped, tmp_path, resume=True)
    assert unnamed.exists()
    assert (stopped / "summary.json").exists()
    events = map(json.loads, (stopped / "metrics.jsonl").read_text().splitlines())
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert warning.startswith("nothing in checkpoints/ is deleted any more: ")
    assert "arrival-0000.json: damaged: " in warning


def test_another_configuration_or_other_data_are_refused(config, config_file, stopped, data_folder, command):
    code, _, err = command("run", config_file, "--output", stopped, "--resume", "--set", "llm.samples=9")
    assert code == 2
    assert "its run has another configuration (different: llm.samples)" in err
    before = contents(stopped)
    with (data_folder / "train.csv").open("a") as file:
        file.write("a new row.,good\n")
    code, _, err = command("run", config_file, "--output", stopped, "--resume")
    assert code == 2
    assert "the data files have changed since this run began" in err
    after = contents(stopped)
    # the last event says how the last session ended, for who follows the run
    ended, refused = before["metrics.jsonl"].pop(), after["metrics.jsonl"].pop()
    assert ended["event"] == refused["event"] == "end"
    assert refused["error"].startswith("RunError: ")
    assert "the data files have changed" in refused["error"]
    assert after == before


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_another_llm_in_the_same_folder_is_refused(settings, models, tmp_path, adapter):
    folder = shutil.copytree(models / settings["llm"]["model"], tmp_path / "llm")
    settings["llm"] |= {"model": str(folder), "adapter": adapter}
    config, asked = Config.model_validate(settings), iter([False, True])
    with pytest.raises(StoppedError):
        run_local(config, tmp_path / "run", tmp_path, stop_requested=lambda: next(asked))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.c_fc.weight"))
    save_file(weights | {name: weights[name] * 1.1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="the original LLM has changed since this run began"):
        run_local(config, tmp_path / "run", tmp_path, resume=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert run_local(config, tmp_path / "run", tmp_path, resume=True)["seed"] == config.seed


@pytest.fixture
def folders(settings, models, tmp_path):
    """Of two clients' own models."""
    folders = [shutil.copytree(models / settings["slm"]["models"][0]["model"], tmp_path / name) for name in ("a", "b")]
    del settings["data"]["train"], settings["data"]["num_clients"]
    settings["clients"] = [
        {"id": name, "train": "train.csv", "model": str(folder)}
        for name, folder in zip(("client-0", "client-1"), folders, strict=True)
    ]
    return folders


def another_model(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("intermediate.dense.weight"))
    save_file(weights | {name: weights[name] * 1.1}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_client_that_a_rollback_has_shut_out_may_have_another_model(settings, folders, tmp_path):
    settings["gate"] = {"enabled": False}
    config, run = Config.model_validate(settings), tmp_path / "run"
    run_local(config, run, tmp_path)
    first, _ = arrival_order(["client-0", "client-1"], 1, config.seed)
    roll_back(RunDir.open(run), first, tmp_path / "without")
    another_model(folders[int(first[-1])])
    kept = load(tmp_path / "without" / "config.toml")
    assert first not in run_local(kept, tmp_path / "without", tmp_path, resume=True)["slm"]["crosslm"]


def test_another_model_of_a_client_that_is_still_to_come_is_refused(settings, folders, tmp_path):
    config, asked = Config.model_validate(settings), iter([False, True])
    with pytest.raises(StoppedError):
        run_local(config, tmp_path / "run", tmp_path, stop_requested=lambda: next(asked))
    _, comes = (folders[int(who[-1])] for who in arrival_order(["client-0", "client-1"], 1, config.seed))
    whole = {folder: load_file(folder / "model.safetensors") for folder in folders}
    for folder in folders:
        another_model(folder)
    with pytest.raises(RunError, match=r"the model that client-\d begins with has changed since this run began"):
        run_local(config, tmp_path / "run", tmp_path, resume=True)
    save_file(whole[comes], comes / "model.safetensors", metadata={"format": "pt"})  # the other's is kept with the run
    assert run_local(config, tmp_path / "run", tmp_path, resume=True)["seed"] == config.seed


@pytest.mark.parametrize(("section", "name"), [("gate", "public_texts"), ("evaluation", "perplexity_text")])
def test_other_texts_beside_the_rows_are_refused_too(settings, data_folder, tmp_path, section, name):
    settings[section] = settings.get(section, {}) | {name: "beside.csv"}
    (data_folder / "beside.csv").write_text("text,label\na good film.,good\na bad day.,bad\n")
    config, asked = Config.model_validate(settings), iter([False, True])
    with pytest.raises(StoppedError):
        run_local(config, tmp_path / "run", tmp_path, stop_requested=lambda: next(asked))
    (data_folder / "beside.csv").write_text("text,label\na kind film.,good\na bad day.,bad\n")
    with pytest.raises(RunError, match="the data files have changed since this run began"):
        run_local(config, tmp_path / "run", tmp_path, resume=True)


@pytest.mark.parametrize("how", ["cut", "changed", "blob cut", "blob gone"])
def test_a_broken_checkpoint_is_named_and_the_one_before_still_serves(config, stopped, tmp_path, how, whole):
    path = stopped / "checkpoints" / "arrival-0001.json"
    record = json.loads(path.read_text())["record"]
    if how.startswith("blob"):
        path = stopped / "checkpoints" / "blobs" / f"{record['adapter']}.bin"
    if how == "blob gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if "cut" in how else data.replace(b'"steps": 1', b'"steps": 2'))
    with pytest.raises(RunError, match=rf"{path.name}: (damaged|cannot be read)"):
        run_local(config, stopped, tmp_path, resume=True)
    (stopped / "checkpoints" / "arrival-0001.json").unlink()  # as the message says
    run_local(config, stopped, tmp_path, resume=True)
    assert contents(stopped) == whole


def test_what_is_damaged_of_a_checkpoint_is_whole_once_it_is_kept_again(tmp_path):
    checkpoints = Checkpoints(RunDir(tmp_path))
    name = checkpoints.put(b"weights")
    (blob,) = (tmp_path / "checkpoints" / "blobs").iterdir()
    blob.write_bytes(b"weigh")
    with pytest.raises(RunError, match="damaged"):
        checkpoints.get(name)
    assert checkpoints.put(b"weights") == name
    assert checkpoints.get(name) == b"weights"


@pytest.mark.parametrize("lost", ["all", "half", "file", "other lines"])
def test_events_that_a_checkpoint_knows_of_and_that_are_gone_are_not_gone_on_without(
    config, stopped, tmp_path, lost, whole
):
    path = stopped / "metrics.jsonl"
    data = path.read_bytes()
    if lost == "file":
        path.unlink()
    else:
        left = {"all": b"", "half": data[: len(data) // 2], "other lines": b"x" * len(data) + b"\n"}[lost]
        path.write_bytes(left)
    with pytest.raises(RunError, match=r"metrics.jsonl: has lost its end .* put it back as it was"):
        run_local(config, stopped, tmp_path, resume=True)
    assert not path.exists() if lost == "file" else path.read_bytes() == left  # what is to be mended grows no longer
    assert not (stopped / "summary.json").exists()
    path.write_bytes(data)
    run_local(config, stopped, tmp_path, resume=True)
    assert contents(stopped) == whole


def test_two_runs_in_one_folder_are_one_too_many(config, stopped, tmp_path, command):
    with RunDir(stopped).locked():
        assert RunDir(stopped).is_locked()
        with pytest.raises(RunError, match="another process is at work on this run"):
            run_local(config, stopped, tmp_path, resume=True)
        code, out, _ = command("status", stopped)
        assert code == 0
        assert "at work" in out
    assert not RunDir(stopped).is_locked()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_state(config, stopped, tmp_path, monkeypatch, name, whole):
    before = contents(stopped)
    left = [3]
    owner = {"fsync": rundir.os, "replace": rundir.Path}[name]
    function = getattr(owner, name)

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(
            RunError,
            match="cannot be written: No space left on device; make room there, and give the same command again",
        ):
            run_local(config, stopped, tmp_path, resume=True)
    kept = contents(stopped)
    assert {name: kept[name] for name in before if name.startswith("checkpoints/arrival")} == {
        name: before[name] for name in before if name.startswith("checkpoints/arrival")
    }
    run_local(config, stopped, tmp_path, resume=True)
    assert contents(stopped) == whole


FULL = """\
import json, resource, sys
from pathlib import Path
from crosslm.errors import RunError
from crosslm.models.slm import SLM
from crosslm.records import Upload
from crosslm.runs.rundir import METRICS, SESSIONS, RunDir

slm, run = SLM.load_trained(sys.argv[1]), RunDir(Path(sys.argv[2]))
upload = Upload("north", 0, (1, 1), {}, slm.to_state())
run.save_upload(upload)
run.save_slm("north", slm)
for name in (METRICS, SESSIONS):
    (run.path / name).write_bytes(b"x" * 4989 + b"\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for write in (
    lambda: run.save_upload(upload),
    lambda: run.save_slm("north", slm),
    lambda: run.event("note"),
    lambda: run.note_session("start"),
    lambda: run.write("long.txt", "x" * 6000),
):
    try:
        write()
    except RunError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_an_error_in_words_for_every_file(models, tmp_path):
    """The system's own refusal, and not one that a test has put in its place: every library words it in its own way."""
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    slm.save(str(tmp_path / "slm"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", FULL, str(tmp_path / "slm"), str(tmp_path / "run")]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    run = tmp_path / "run"
    places = ["uploads/north", "slm/north", "metrics.jsonl", "sessions.jsonl", "long.txt"]
    assert [line.split(": ")[0] for line in told] == [str(run / place) for place in places]
    for line in told:
        assert "cannot be written: " in line
        assert "(os error 27)" in line or "File too large" in line
    for name in ("metrics.jsonl", "sessions.jsonl"):  # some bytes of the line found room, and were taken away again
        assert (run / name).read_bytes() == b"x" * 4989 + b"\n"
    for folder in ("uploads", "slm"):  # what was there is there, and nothing half written beside it
        assert [path.name for path in (run / folder).iterdir()] == ["north"]
        assert SLM.load_trained(str(run / folder / "north")).labels == ("bad", "good")


def test_half_an_event_of_a_killed_process_is_in_nobodys_way(config, stopped, tmp_path, whole):
    before = RunDir(stopped).events()
    with (stopped / "metrics.jsonl").open("ab") as file:
        file.write('{"event": "warning", "message": "ü'.encode()[:-1])
    assert RunDir(stopped).events() == before
    asked = iter([True])
    with pytest.raises(StoppedError):
        run_local(config, stopped, tmp_path, resume=True, stop_requested=lambda: next(asked))
    run_local(config, stopped, tmp_path, resume=True)
    assert contents(stopped) == whole


def test_an_event_after_half_a_line_is_a_line_of_its_own(tmp_path):
    run = RunDir(tmp_path)
    run.event("note", message="first")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "war')
    run.event("end", error="OSError: disk full")
    assert [event["event"] for event in run.events()] == ["note", "end"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("words", ["No space left on device (os error 28)", "a mistake in the program"])
def test_an_exception_that_is_not_of_the_disk_is_not_called_so(tmp_path, words):
    """The tokenizers' own exception is a plain one."""

    class Broken:
        def save(self, folder):
            Path(folder).mkdir(parents=True)
            raise Exception(words)

    of_the_disk = "os error" in words
    with pytest.raises(RunError if of_the_disk else Exception, match="slm/north: cannot be" if of_the_disk else words):
        RunDir(tmp_path).save_slm("north", Broken())
    assert list((tmp_path / "slm").iterdir()) == []


def test_status_shows_the_arrivals_that_can_be_read_beside_one_that_is_damaged(stopped, command):
    path = stopped / "checkpoints" / "arrival-0000.json"
    path.write_text(path.read_text()[:100])
    code, out, _ = command("status", stopped)
    assert code == 0
    assert "stopped, 1 arrivals done" in out
    assert "arrival 1: " in out
    assert f"{path}: damaged" in out
    assert "To go on: crosslm run" in out


def test_a_folder_that_cannot_be_made_is_an_error_in_words(config, tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        run_local(config, Path("/proc/crosslm"), tmp_path)


def begun(sessions):
    return len(sessions.read_text().splitlines()) if sessions.exists() else 0


def test_ctrl_c_stops_at_the_safe_point_with_130_and_again_at_once(small_file, tmp_path):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-m", "crosslm.cli.main", "run", str(small_file), "--output", str(folder), "--resume"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    for presses in (1, 2):
        with ExitStack() as stack:
            run = stack.enter_context(subprocess.Popen(call, **pipes))
            stack.callback(run.kill)  # comes first: to leave a process is to wait for its end
            sessions, metrics = folder / "sessions.jsonl", folder / "metrics.jsonl"
            deadline = time.monotonic() + PATIENCE
            # the second press must come while an arrival is at work, or there is nothing to stop at once
            while not (begun(sessions) >= presses and (presses == 1 or '"upload"' in metrics.read_text())):
                assert run.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            run.send_signal(signal.SIGINT)
            err = ""
            while presses == 2 and "stopping after this arrival" not in err:  # two at a time would count as one
                line = run.stderr.readline()
                assert line, err
                err += line
            if presses == 2:
                run.send_signal(signal.SIGINT)
            err += run.communicate(timeout=PATIENCE)[1]
        assert run.returncode == 130, err
        assert "--resume" in err
        assert ("stopped at once" in err) == (presses == 2)
    assert len(Checkpoints(RunDir(folder)).numbers()) <= 2


def test_a_client_that_fails_right_after_it_was_served_is_told_apart(small, tmp_path, monkeypatch):
    small["gate"] = {"enabled": False}
    train = experiment.Client.train
    monkeypatch.setattr(experiment, "LocalExchange", in_turn(experiment.LocalExchange))

    def fails_later(client):
        if client.rounds == 1:
            raise MemoryError("no memory at this silo")
        return train(client)

    monkeypatch.setattr(experiment.Client, "train", fails_later)
    run_local(Config.model_validate(small | {"checkpoint": {"keep": 9}}), tmp_path / "run", tmp_path)
    checkpoints = Checkpoints(RunDir(tmp_path / "run"))
    outcomes = [checkpoints.read(number)["cause"]["outcome"] for number in checkpoints.numbers()]
    assert outcomes == ["beginning", "served", "failed", "served", "failed"]


def in_turn(exchange_class):
    """An engine in which each client comes twice in a row."""

    def made(*arguments):
        exchange = exchange_class(*arguments)
        order = sorted(who for _, who in exchange._waiting)
        exchange._waiting = list(enumerate(order, start=1))
        return exchange

    return made
