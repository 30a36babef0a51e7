"""Everything that a report shows of a run, read from its folder."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crosslm.errors import RunError
from crosslm.html_report.intervals import Interval, binomial_interval, paired_gain_interval
from crosslm.runs.rundir import CONFIG, METRICS, RunDir

MAX_SAMPLES = 2000
SHOWN = ("task", "preset", "seed", "llm", "seconds", "test_rows", "tokens_generated", "peak_memory_bytes")
"""What a report shows of ``summary.json`` whatever run it is of, beside the accuracies and the clients."""


@dataclass(frozen=True)
class Arrival:
    """One served SLM: its step event, and one entry for each optimiser step of the LLM."""

    step: int
    client: str
    measures: Mapping[str, float]
    updates: list[Mapping[str, float]]

    def mean(self, name: str) -> float | None:
        """Mean of a part of the loss over the optimiser steps; None where none was logged."""
        values = [update[name] for update in self.updates if name in update]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Sample:
    """A synthetic text of a pool, and why it was or was not used to train the SLM."""

    arrival: int
    client: str
    text: str
    label: str
    reward: float
    diversity: float
    score: float
    rank: int
    kept: bool
    why: str


@dataclass(frozen=True)
class RunView:
    """A complete run, ready to be shown."""

    name: str
    summary: Mapping[str, Any]
    config_text: str
    config: Mapping[str, Any]
    events: list[Mapping[str, Any]]
    samples: list[Sample]
    samples_written: int
    barred: tuple[str, ...] = ()
    """Clients that the run was rolled back without."""

    @classmethod
    def read(cls, run: RunDir) -> "RunView":
        """Read a run folder.

        Raises:
            RunError: the run is not complete, or a file of it is damaged.
        """
        summary = run.summary(SHOWN)
        text = (run.path / CONFIG).read_text(encoding="utf-8")
        try:
            config = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RunError(f"{run.path / CONFIG}: damaged: {error}; run it again") from error
        if not isinstance(config.get("task"), dict) or not config["task"].get("labels"):
            raise RunError(
                f"{run.path / CONFIG}: damaged, or not of a run (it has no task.labels); put it back as it was"
            )
        try:
            events: list[Mapping[str, Any]] = list(run.events())
        except ValueError as error:
            raise RunError(f"{run.path / METRICS}: damaged: {error}; run it again") from error
        pools = _pools(run, events, config.get("selection", {}))
        return cls(
            run.path.resolve().name,
            summary,
            text,
            config,
            events,
            [sample for pool in pools for sample in representative(pool, MAX_SAMPLES // max(len(pools), 1))],
            sum(map(len, pools)),
            tuple(run.barred()),
        )

    @property
    def labels(self) -> list[str]:
        """The task's labels in order."""
        return list(self.config["task"]["labels"])

    @property
    def clients(self) -> list[str]:
        """The clients that were served, in the order of their first arrival."""
        return [name for name in self.summary["slm"]["crosslm"] if name != "mean"]

    @property
    def between_machines(self) -> bool:
        """Whether it is a run of ``crosslm server``, which knows less of its silos."""
        return "arrivals" in self.summary

    @cached_property
    def arrivals(self) -> list[Arrival]:
        """The served SLMs in the order of their arrival."""
        return [
            Arrival(
                event["step"],
                event["client"],
                event,
                [update for update in self.of("update") if update["step"] == event["step"]],
            )
            for event in self.of("step")
        ]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def interval(self, share: float | None, rows: int | None) -> Interval | None:
        """Binomial interval of a share, where the number of rows is known."""
        return binomial_interval(share, rows) if share is not None and rows else None

    @cached_property
    def gains(self) -> dict[str, Interval]:
        """Paired interval of CrossLM's gain over Standalone for each client and ``mean``.

        Empty for a run that did not keep which rows were right.
        """
        return self._gains_over("standalone")

    @cached_property
    def gains_over_kd(self) -> dict[str, Interval]:
        """The same over Data-free KD."""
        return self._gains_over("data_free_kd")

    def gain(self, client: str, method: str = "standalone") -> float:
        """CrossLM's accuracy less that of a method, of a client or ``mean``."""
        slm = self.summary["slm"]
        return float(slm["crosslm"][client] - slm[method][client])

    @cached_property
    def tests(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """By client and method which test rows a classifier got right.

        A client that comes several times keeps its first Standalone and its last CrossLM, as the summary does.
        """
        return {(event["client"], event["method"]): event for event in self.of("test")}

    def _gains_over(self, method: str) -> dict[str, Interval]:
        tests = self.tests
        wanted = [(client, each) for client in self.clients for each in (method, "crosslm")]
        if not wanted or any(key not in tests for key in wanted):
            return {}
        right = {key: [mark == "1" for mark in tests[key]["right"]] for key in wanted}
        if min(map(len, right.values())) < 2:
            return {}
        rows = {client: tests[client, "crosslm"]["rows"] for client in self.clients}

        def of(clients: Iterable[str]) -> Interval:
            chosen = list(clients)
            return paired_gain_interval(
                [right[client, method] for client in chosen],
                [right[client, "crosslm"] for client in chosen],
                [rows[client] for client in chosen],
            )

        return {**{client: of([client]) for client in self.clients}, "mean": of(self.clients)}


def representative(pool: list[Sample], limit: int) -> list[Sample]:
    """At most ``limit`` of a pool: the best of those kept, and as many of the others over all ranks."""
    if len(pool) <= limit:
        return pool
    others = [sample for sample in pool if not sample.kept]
    kept = [sample for sample in pool if sample.kept][: max(limit // 2, limit - len(others))]
    wanted = limit - len(kept)
    return kept + [others[place * len(others) // wanted] for place in range(wanted)]


def _pools(run: RunDir, events: list[Mapping[str, Any]], selection: Mapping[str, Any]) -> list[list[Sample]]:
    """The pool of each step, best score first."""
    pools = []
    for event in events:
        path = run.path / "synthetic" / f"step-{event.get('step', 0):04}-pool.jsonl"
        if event["event"] != "step" or not path.is_file():
            continue
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            ordered = sorted(rows, key=lambda row: row["rank"])
            reasons = selection_reasons(ordered, selection)
            pools.append(
                [
                    Sample(
                        event["step"],
                        event["client"],
                        **{name: row[name] for name in ("text", "label", "reward", "diversity", "score", "rank")},
                        kept=row["kept"],
                        why=why,
                    )
                    for row, why in zip(ordered, reasons, strict=True)
                ]
            )
        except (ValueError, KeyError) as error:
            raise RunError(f"{path}: damaged: {error!r}; run it again") from error
    return pools


def selection_reasons(rows: list[Mapping[str, Any]], selection: Mapping[str, Any]) -> list[str]:
    """Why each text of a pool, best first, was or was not kept: what ``algorithm.selection.select_top`` did."""
    balance = selection.get("class_balance", False)
    drop = selection.get("nonpositive_rewards") == "drop"
    places: dict[str, int] = {}
    taken: dict[str, int] = {}
    groups = [row["label"] if balance else "all" for row in rows]
    for row, group in zip(rows, groups, strict=True):
        taken[group] = taken.get(group, 0) + row["kept"]
    reasons = []
    for row, group in zip(rows, groups, strict=True):
        places[group] = places.get(group, 0) + 1
        if drop and row["reward"] <= 0:
            reasons.append("reward not above 0")
        else:
            whose = f" of {group}" if balance else ""
            reasons.append(f"place {places[group]}{whose}; the best {taken[group]} are taken")
    return reasons
