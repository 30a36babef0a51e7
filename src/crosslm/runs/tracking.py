"""A run's figures in the trackers that people have. Numbers and the configuration go there, no text."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from crosslm.config import Config
from crosslm.errors import ConfigError
from crosslm.runs.rundir import RunDir

PROJECT = "crosslm"


class Tracker(Protocol):
    """Takes figures by name, at a place on an axis (``arrival`` or ``update``)."""

    def log(self, figures: Mapping[str, float], axis: str, place: int) -> None:
        """Keep these figures."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"))

    def log(self, figures: Mapping[str, float], axis: str, place: int) -> None:
        """Keep these figures."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, place)
        self._writer.flush()

    def close(self) -> None:
        """Nothing more comes."""
        self._writer.close()


class MLflow:
    """A run of the experiment ``crosslm``, wherever ``MLFLOW_TRACKING_URI`` says, and nothing to MLflow's makers."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it when it is imported
        import mlflow

        mlflow.set_experiment(PROJECT)
        self._mlflow = mlflow
        mlflow.start_run(run_name=path.name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, figures: Mapping[str, float], axis: str, place: int) -> None:
        """Keep these figures."""
        self._mlflow.log_metrics(dict(figures), step=place)

    def close(self) -> None:
        """Nothing more comes."""
        self._mlflow.end_run()


class WandB:
    """A run of the project ``crosslm``; ``WANDB_MODE=offline`` keeps it on this machine.

    By itself W&B would also take the terminal's output, which has numbers of private rows in it, and the git state.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, save_code=False)
        self._run = wandb.init(project=PROJECT, name=path.name, config=dict(config), dir=str(path), settings=settings)
        self._known: set[str] = set()

    def log(self, figures: Mapping[str, float], axis: str, place: int) -> None:
        """Keep these figures."""
        for name in sorted(set(figures) - self._known):
            self._run.define_metric(name, step_metric=axis)
        self._known |= set(figures)
        self._run.log({**figures, axis: place})

    def close(self) -> None:
        """Nothing more comes."""
        self._run.finish()


class Trackio:
    """A run of the project ``crosslm``, in trackio's own folder on this machine."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=path.name, config=dict(config))

    def log(self, figures: Mapping[str, float], axis: str, place: int) -> None:
        """Keep these figures."""
        self._trackio.log({**figures, axis: place})

    def close(self) -> None:
        """Nothing more comes."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}


def wanted(config: Config) -> tuple[str, ...]:
    """The trackers to use: those named, or TensorBoard where it is installed and nothing is said.

    Raises:
        ConfigError: one that is named is not installed.
    """
    if config.tracking is None:
        return ("tensorboard",) if _installed("tensorboard") else ()
    for name in config.tracking:
        if not _installed(name):
            raise ConfigError(f"tracking names {name!r}, which is not installed: pip install {name}")
    return config.tracking


@contextmanager
def tracked(run: RunDir, config: Config, note: Callable[[str], None]) -> Iterator[None]:
    """Hand every event of a run to its trackers. One that fails is dropped with a word; the run goes on.

    Args:
        run: whose events are tracked.
        config: says by what; see :func:`wanted`.
        note: told when a tracker fails.

    Raises:
        ConfigError: a tracker that is named cannot be started; one that nobody asked for is left out with a word.
    """
    trackers: dict[str, Tracker] = {}

    def attempt(name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(trackers[name])
        except Exception as error:  # noqa: BLE001  a tracker's server must not be able to end a run
            del trackers[name]
            note(f"warning: tracking by {name} stopped: {error}")

    updates = sum(event["event"] == "update" for event in run.events())  # of a run that goes on

    def listen(event: Mapping[str, Any]) -> None:
        nonlocal updates
        updates += event["event"] == "update"
        figures, axis, place = figures_of(event, updates)
        for name in list(trackers) if figures else ():
            attempt(name, lambda tracker: tracker.log(figures, axis, place))

    try:
        for name in wanted(config):
            try:
                trackers[name] = TRACKERS[name](run.path, config.model_dump(mode="json"))
            except Exception as error:
                if config.tracking is not None:
                    raise ConfigError(f"tracking: {name} cannot be started: {error}; set tracking = []") from error
                note(f"warning: tracking by {name}, which is installed, cannot be started and is left out: {error}")
        run.listeners.append(listen)
        yield
    finally:
        for name in list(trackers):
            attempt(name, lambda tracker: tracker.close())


def figures_of(event: Mapping[str, Any], updates: int) -> tuple[dict[str, float], str, int]:
    """What of an event is tracked, and where on which axis.

    Args:
        event: one of ``metrics.jsonl``.
        updates: optimiser steps of the LLM so far, this one included.

    Returns:
        Figures by name (none for most kinds of event), the axis, and the place on it.
    """
    known = ("event", "time", "step", "client", "round", "number", "moment", "arrival")
    numbers = {name: float(value) for name, value in event.items() if name not in known and _is_number(value)}
    match event["event"]:
        case "update":
            return {f"llm/{name}": value for name, value in numbers.items()}, "update", updates
        case "step":
            named = {name if "/" in name else f"selection/{name}": value for name, value in numbers.items()}
            measured = [numbers["slm/accuracy"]] if "slm/accuracy" in numbers else []  # a server may have no test rows
            of_client = {f"slm/accuracy/{event['client']}": accuracy for accuracy in measured}
            return named | of_client, "arrival", event["step"]
        case "closing" if "step" in event:  # not in runs of earlier versions
            names = {"slm/crosslm": "slm/accuracy", "slm/data_free_kd": "slm/data_free_kd"}
            found = {f"{name}/{event['client']}": numbers[key] for key, name in names.items() if key in numbers}
            return found, "arrival", event["step"] + 1
        case "llm":
            return {f"llm/{name}": value for name, value in numbers.items()}, "arrival", event["arrival"]
        case _:
            return {}, "arrival", 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
