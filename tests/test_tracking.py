"""Tracking: names, axes, and that no tracker can harm a run. Each tracker is tested where it is installed."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from crosslm import experiment
from crosslm.config import Config
from crosslm.errors import ConfigError
from crosslm.experiment import run_local
from crosslm.runs import tracking
from crosslm.runs.rundir import RunDir
from crosslm.runs.tracking import figures_of, tracked, wanted


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


UPDATE = {"event": "update", "time": 1.0, "step": 1, "client": "a", "number": 0, "loss": 2.0, "kl_loss": 0.5}
STEP = {
    "event": "step",
    "time": 2.0,
    "step": 1,
    "client": "a",
    "slm/accuracy": 0.8,
    "reward/pool": 0.4,
    "selected": 4.0,
}
LLM = {"event": "llm", "time": 3.0, "moment": "after", "arrival": 1, "nlu_accuracy": 0.7}


def test_names_are_those_of_the_design():
    assert figures_of(UPDATE, 7) == ({"llm/loss": 2.0, "llm/kl_loss": 0.5}, "update", 7)
    assert figures_of(STEP, 7) == (
        {"slm/accuracy": 0.8, "reward/pool": 0.4, "selection/selected": 4.0, "slm/accuracy/a": 0.8},
        "arrival",
        1,
    )
    told = {name: value for name, value in STEP.items() if name != "slm/accuracy"} | {"round": 0}  # no test rows
    assert figures_of(told, 7)[0] == {"reward/pool": 0.4, "selection/selected": 4.0}
    closing = {"event": "closing", "client": "b", "step": 4, "accepted": True, "selected": 9.0, "slm/crosslm": 0.8}
    assert figures_of(closing | {"slm/data_free_kd": 0.7}, 7) == (
        {"slm/accuracy/b": 0.8, "slm/data_free_kd/b": 0.7},
        "arrival",
        5,
    )
    assert figures_of(closing, 7)[0] == {"slm/accuracy/b": 0.8}
    assert figures_of(LLM, 7) == ({"llm/nlu_accuracy": 0.7}, "arrival", 1)
    assert figures_of({"event": "upload", "bytes": 7}, 0)[0] == {}
    assert figures_of({"event": "warning", "message": "x"}, 0)[0] == {}


class Keeps:
    """A tracker in memory."""

    def __init__(self, path, config):
        self.logged, self.closed, self.config = [], False, config

    def log(self, figures, axis, place):
        self.logged.append((figures, axis, place))

    def close(self):
        self.closed = True


def track(run, config, monkeypatch, maker, notes):
    monkeypatch.setattr(tracking, "wanted", lambda _: ("mine",))
    monkeypatch.setitem(tracking.TRACKERS, "mine", maker)
    return tracked(run, config, notes.append)


def test_a_whole_run_is_tracked(config, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tracking, "wanted", lambda _: ("mine",))
    monkeypatch.setitem(tracking.TRACKERS, "mine", lambda *given: made.append(Keeps(*given)) or made[0])
    run_local(config, tmp_path / "run", tmp_path)
    (tracker,) = made
    assert tracker.closed
    assert tracker.config["task"]["labels"] == ["bad", "good"]
    places = {}
    for figures, axis, place in tracker.logged:
        for name in figures:
            places.setdefault(name, []).append((axis, place))
    assert places["slm/accuracy"] == [("arrival", 1), ("arrival", 2)]
    assert places["llm/kl_loss"] == [("update", number) for number in range(1, 5)]
    for name in ("llm/nlu_accuracy", "llm/nlg_accuracy", "llm/perplexity"):
        assert places[name] == [("arrival", 0), ("arrival", 2)]
    assert all(isinstance(value, float) for figures, _, _ in tracker.logged for value in figures.values())


def test_a_run_that_goes_on_has_the_axis_of_one_that_was_never_stopped(config, tmp_path, monkeypatch):
    made, save, saved = [], experiment._Run._save, []
    monkeypatch.setattr(tracking, "wanted", lambda _: ("mine",))
    monkeypatch.setitem(tracking.TRACKERS, "mine", lambda *given: made.append(Keeps(*given)) or made[-1])

    def stops(run, cause):
        saved.append(cause)
        if len(saved) == 3:  # its second arrival is in the events, and in no checkpoint
            raise KeyboardInterrupt
        save(run, cause)

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_save", stops)
        with pytest.raises(KeyboardInterrupt):
            run_local(config, tmp_path / "run", tmp_path)
    run_local(config, tmp_path / "run", tmp_path, resume=True)
    run_local(config, tmp_path / "whole", tmp_path)
    updates = [[place for _, axis, place in tracker.logged if axis == "update"] for tracker in made]
    assert updates == [[1, 2, 3, 4], [3, 4], [1, 2, 3, 4]]


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(config, tmp_path, monkeypatch):
    class Fails(Keeps):
        def log(self, figures, axis, place):
            raise ConnectionError("no route")

    run, notes = RunDir.create(tmp_path / "run", config), []
    with track(run, config, monkeypatch, Fails, notes):
        run.event(**{"kind": "step", **{k: v for k, v in STEP.items() if k not in ("event", "time")}})
        run.event(**{"kind": "step", **{k: v for k, v in STEP.items() if k not in ("event", "time")}})
    assert notes == ["warning: tracking by mine stopped: no route"]
    assert len(run.events()) == 2


def test_one_that_cannot_be_started_is_an_error(config, tmp_path, monkeypatch):
    def fails(path, config):
        raise RuntimeError("no account")

    config = config.model_copy(update={"tracking": ("mlflow",)})  # something is named
    run = RunDir.create(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"tracking: mine cannot be started: no account"):
        track(run, config, monkeypatch, fails, []).__enter__()


def test_one_that_nobody_asked_for_and_cannot_be_started_is_left_out(settings, tmp_path, monkeypatch):
    def fails(path, config):
        raise ImportError("another protobuf is needed")

    config, notes = Config.model_validate(settings), []
    assert config.tracking is None
    run = RunDir.create(tmp_path / "run", config)
    monkeypatch.setattr(tracking, "_installed", lambda name: name == "tensorboard")
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", fails)
    with tracked(run, config, notes.append):
        run.event(**{"kind": "step", **{k: v for k, v in STEP.items() if k not in ("event", "time")}})
    (note,) = notes
    assert note.startswith("warning: tracking by tensorboard, which is installed, cannot be started and is left out: ")
    named = Config.model_validate({**settings, "tracking": ["tensorboard"]})
    with pytest.raises(ConfigError, match="another protobuf"):
        tracked(run, named, notes.append).__enter__()


def test_what_is_asked_for(settings, monkeypatch):
    def of(value):
        return wanted(Config.model_validate({**settings, **({} if value is None else {"tracking": value})}))

    monkeypatch.setattr(tracking, "_installed", lambda name: name == "tensorboard")
    assert of(None) == ("tensorboard",)
    assert of([]) == ()
    with pytest.raises(ConfigError, match=r"tracking names 'mlflow', which is not installed: pip install mlflow"):
        of(["mlflow"])
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    assert of(None) == ()


def test_the_field_goes_round(settings):
    config = Config.model_validate({**settings, "tracking": ["wandb"]})
    assert tomllib.loads(config.dump())["tracking"] == ["wandb"]
    assert "tracking" not in tomllib.loads(Config.model_validate(settings).dump())


def logged_to(name, settings, tmp_path):
    """A run folder whose three events went to this tracker."""
    config = Config.model_validate({**settings, **({"tracking": [name]} if name else {})})
    run, notes = RunDir.create(tmp_path / "run", config), []
    with tracked(run, config, notes.append):
        for event in (UPDATE, STEP, LLM):
            run.event(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})
    assert notes == []
    return run.path


@needs("tensorboard")
@pytest.mark.parametrize("name", ["tensorboard", None])
def test_tensorboard_asked_for_and_by_default(settings, tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged_to(name, settings, tmp_path) / "tensorboard")).Reload()
    assert {"llm/loss", "slm/accuracy", "slm/accuracy/a", "llm/nlu_accuracy"} <= set(events.Tags()["scalars"])
    (scalar,) = events.Scalars("slm/accuracy")
    assert (scalar.step, scalar.value) == (1, pytest.approx(0.8))


def test_wandb_gets_figures_and_no_console_code_or_git_state(tmp_path, monkeypatch):
    """Without W&B, whose ``Settings`` of 0.31 has these fields; with it the test below starts it for good."""
    given, logged = {}, []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)
    fake = SimpleNamespace(Settings=SimpleNamespace, init=lambda **told: given.update(told) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = tracking.TRACKERS["wandb"](tmp_path / "run", {"seed": 1})
    tracker.log({"llm/loss": 2.0}, "update", 3)
    tracker.close()
    assert vars(given.pop("settings")) == {"console": "off", "disable_git": True, "save_code": False}
    assert given == {"project": "crosslm", "name": "run", "config": {"seed": 1}, "dir": str(tmp_path / "run")}
    assert logged == [{"llm/loss": 2.0, "update": 3}]


LOG = """
import os
import sys
from pathlib import Path
from crosslm.runs.tracking import TRACKERS
tracker = TRACKERS[sys.argv[1]](Path.cwd(), {"seed": 1, "task": {"labels": ["a", "b"]}})
tracker.log({"llm/loss": 2.0}, "update", 1)
tracker.log({"slm/accuracy": 0.8, "slm/accuracy/a": 0.8}, "arrival", 1)
tracker.close()
print(os.environ.get("MLFLOW_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize(
    ("name", "left"),
    [
        pytest.param("mlflow", "m.db", marks=[needs("mlflow"), needs("sqlalchemy")]),
        pytest.param("wandb", "wandb/offline-run-*/*.wandb", marks=needs("wandb")),
        pytest.param("trackio", "trackio/*.db", marks=needs("trackio")),
    ],
)
def test_the_others_keep_figures_on_this_machine(name, left, tmp_path):
    # in a process of its own: W&B speaks to a helper of its through a Unix socket
    where = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    command = [sys.executable, "-c", LOG, name]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"} | where
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = list(tmp_path.glob(left))
    assert kept
    if name == "mlflow":
        assert b"slm/accuracy" in kept[0].read_bytes()
        assert done.stdout.split()[-1] == "true"  # its own telemetry is off
    if name == "trackio":
        assert any(b'"slm/accuracy":0.8' in path.read_bytes() for path in kept)
