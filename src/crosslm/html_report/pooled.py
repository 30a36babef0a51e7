"""Several runs of one configuration that differ in their seed, as one result: means, with intervals over seeds too."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from crosslm.errors import RunError
from crosslm.html_report.collect import RunView
from crosslm.reproduce.bootstrap import Array, Means, bootstrap, estimate
from crosslm.runs.report import MEASURE_NAMES, METHOD_NAMES

METHODS = tuple(METHOD_NAMES)
GAINS = {"standalone": "gain", "data_free_kd": "over Data-free KD"}


def pooled(views: Sequence[RunView]) -> dict[str, Any]:
    """Means over the seeds with their 95 % intervals.

    Seeds are drawn again, and test rows, each with what all methods made of it (:func:`crosslm.reproduce.bootstrap`).

    Args:
        views: complete runs, of the same task and clients.

    Returns:
        ``seeds``; ``slm`` by client and for ``mean``: each method's accuracy, and CrossLM's gain ``over`` the others,
        as ``[value, low, high]``; ``left_out``: clients that were not served and measured in all runs; ``llm``: the
        mean of each measure before and after.

    Raises:
        RunError: no client was served and measured in all of them.
    """
    marks = [_marks(view) for view in views]
    clients = [client for client in views[0].clients if all(client in each for each in marks)]
    if not clients:
        names = ", ".join(view.name for view in views)
        raise RunError(f"{names}: no client was served and measured in all of these runs; look at each by itself")
    slm = {client: _figures(bootstrap([[each[client][1]] for each in marks])) for client in clients}
    sets = sorted({marks[0][client][0] for client in clients})
    groups = [[_mean_of(each, clients, number) for number in sets] for each in marks]
    share = [sum(marks[0][client][0] == number for client in clients) / len(clients) for number in sets]
    slm["mean"] = _figures(_weighted(bootstrap(groups), share))
    everybody = dict.fromkeys(client for view in views for client in view.clients)
    left_out = [client for client in everybody if client not in clients]
    seeds = [view.summary["seed"] for view in views]
    return {"seeds": seeds, "slm": slm, "left_out": left_out, "llm": _llm(views)}


def pooled_tables(figures: dict[str, Any]) -> Group:
    """What :func:`pooled` found, for a terminal."""
    table = Table(
        title=f"SLM accuracy, mean of the seeds {', '.join(map(str, figures['seeds']))}", title_justify="left"
    )
    table.add_column("client")
    for name in (*METHOD_NAMES.values(), *GAINS.values()):
        table.add_column(name, justify="right")
    for client, found in figures["slm"].items():
        if client == "mean":
            table.add_section()
        shares = [f"{found[method][0]:.3f}" for method in METHODS]
        points = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in found[f"over {m}"])) for m in GAINS]
        table.add_row(Text(client), *shares, *points)
    llm = [
        f"LLM, {MEASURE_NAMES[name]}: {before:.3f} before, {after:.3f} after."
        for name, (before, after) in figures["llm"].items()
    ]
    note = "Gains in points, with 95 % of draws of seeds and test rows; two or three seeds tell little of others."
    left_out = ", ".join(figures["left_out"])
    lines = [f"Left out, since not every run has served them: {left_out}."] if left_out else []
    return Group(table, Text("\n".join([note, *lines, *llm])))


def _marks(view: RunView) -> dict[str, tuple[int, Array]]:
    """For each client the number of its test set, and ``(methods, rows)``: 1 where the method was right."""
    found = {}
    for client in view.clients:
        events = [view.tests[client, method] for method in METHODS if (client, method) in view.tests]
        if len(events) == len(METHODS):
            right = np.array([[float(mark) for mark in event["right"]] for event in events])
            found[client] = (int(events[-1]["rows"]), right)
    return found


def _mean_of(marks: dict[str, tuple[int, Array]], clients: list[str], test_set: int) -> Array:
    """``(methods, rows)``: the mean of the clients that are tested on these rows."""
    same = [marks[client][1] for client in clients if marks[client][0] == test_set]
    mean: Array = np.mean(same, axis=0)
    return mean


def _weighted(means: Means, shares: Sequence[float]) -> Means:
    """Columns of the methods, of several test sets one after the other, as the mean of the sets."""
    weights = np.array(shares)

    def mean(columns: Array) -> Array:
        parts = columns.reshape(*columns.shape[:-1], len(weights), len(METHODS))
        return np.asarray(np.einsum("...sm,s->...m", parts, weights))

    return Means(mean(means.point), mean(means.draws), means.seeds)


def _figures(means: Means) -> dict[str, list[float]]:
    found = {method: estimate(means, place) for place, method in enumerate(METHODS)}
    for method in GAINS:
        found[f"over {method}"] = estimate(means.statistic(partial(_gain, METHODS.index(method))))
    return {name: [each.value, each.low, each.high] for name, each in found.items()}


def _gain(over: int, columns: Array) -> Array:
    gain: Array = columns[..., METHODS.index("crosslm")] - columns[..., over]
    return gain


def _llm(views: Sequence[RunView]) -> dict[str, list[float]]:
    found = {}
    for name in MEASURE_NAMES:
        moments = [view.summary["llm"].get(name, {}) for view in views]
        values = [[each.get(moment) for each in moments] for moment in ("before", "after")]
        if all(value is not None for row in values for value in row):
            found[name] = [float(np.mean(row)) for row in values]
    return found
