"""The tables: ours with intervals, and the paper's figures beside them. What has not been run is left out."""

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from crosslm.config import Preset
from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.bootstrap import Array, Means, average, estimate
from crosslm.reproduce.figures import (
    AFTER,
    BASELINE,
    BEFORE,
    CROSSLM,
    DATA_FREE_KD,
    ENHANCED,
    OWN_STANDALONE,
    RETURNED,
    Figures,
)
from crosslm.reproduce.notes import notes
from crosslm.reproduce.plan import BASE, ORIGINAL, Choice, tasks_of, variations
from crosslm.reproduce.scale import HERE

TITLES = {
    "4": "Table 4: accuracy of the clients' SLMs",
    "5": "Table 5: the LLM classifies the task's text (NLU, Eq. 1)",
    "6": "Table 6: what the LLM writes fits the label (NLG)",
    "7": "Table 7: the LLM fine-tuned on other tasks, from the original and from each enhanced one",
    "8": "Table 8: perplexity of the LLM on the Penn Treebank",
    "skew": "Label skew: Dirichlet alpha",
    "clients": "Number of clients",
    "rows": "Private rows of a client",
    "ablation": "Ablation: one change at a time",
}
NAMES = {
    "sst2": "SST-2",
    "imdb": "IMDb",
    "ag_news": "AG News",
    "yahoo_answers": "Yahoo! Answers",
    "boolq": "BoolQ",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "rte": "RTE",
    "average": "Average",
}
SHARE, POINTS, PERCENT, PERPLEXITY, CORRELATION = "share", "points", "percent", "perplexity", "correlation"
ALL_ROWS = "Standalone (on all private rows, as under preset paper)"
OVER_PAPER = "apart, preset recommended: CrossLM - Data-free KD of preset paper, points"
Part = Means | None
Statistic = Callable[[Array], Array]


def column(number: int) -> Statistic:
    """One column."""
    return lambda columns: columns[..., number]


def change(to: int, since: int) -> Statistic:
    """A difference in points."""
    return lambda columns: 100 * (columns[..., to] - columns[..., since])


def ratio(columns: Array) -> Array:
    """The first column over the second; not a number where that is 0."""
    above, below = columns[..., 0], columns[..., 1]
    result: Array = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)
    return result


def growth(columns: Array) -> Array:
    """From the first column to the second, in percent."""
    result: Array = 100 * (columns[..., 1] / columns[..., 0] - 1)
    return result


def cell(part: Part, statistic: Statistic, unit: str) -> dict[str, Any] | None:
    """A figure with its interval, or None if it has not been run or is not a number."""
    if part is None:
        return None
    found = estimate(part.statistic(statistic))
    if not math.isfinite(found.value):
        return None
    shown = {**asdict(found), "unit": unit}
    if found.low == found.high:  # one seed, and no rows to draw: nothing is known of how much it varies
        del shown["low"], shown["high"]
    return shown


def row(name: str, parts: Sequence[Part], statistic: Statistic, unit: str) -> dict[str, Any]:
    """A row with the average at its end, which is there if all the others are."""
    there = [part.statistic(statistic) for part in parts if part is not None]
    whole = average(there) if there and len(there) == len(parts) else None
    cells = [cell(part, statistic, unit) for part in parts]
    return {"name": name, "by": "ours", "cells": [*cells, cell(whole, column(0), unit)]}


def table(key: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """A table of the rows that have a figure, the paper's below ours; None if ours has none."""
    rows = [row for row in rows if any(row["cells"])]
    if not rows:
        return None
    unit = PERPLEXITY if key == "8" else SHARE
    paper = [
        {
            "name": given["name"],
            "by": "paper",
            "cells": [
                {"value": given["values"][name], "unit": unit} if name in given["values"] else None for name in columns
            ],
        }
        for given in paper_tables().get(key, [])
    ]
    return {
        "title": TITLES[key],
        "columns": [NAMES.get(name, name) for name in columns],
        "rows": [*rows, *[row for row in paper if any(row["cells"])]],
    }


@cache
def paper_tables() -> dict[str, list[dict[str, Any]]]:
    """The paper's figures by table."""
    found: dict[str, list[dict[str, Any]]] = tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))["table"]
    return found


def all_tables(figures: Figures, choice: Choice) -> dict[str, dict[str, Any]]:
    """Every chosen table of which something has been run."""
    tasks, presets = choice.tasks, choice.presets
    makers: dict[str, Callable[[], dict[str, Any] | None]] = {
        "4": lambda: table_4(figures, tasks, presets),
        "5": lambda: table_5(figures, tasks, presets),
        "6": lambda: table_6(figures, tasks, presets),
        "7": lambda: table_7(figures, tasks, presets),
        "8": lambda: table_8(figures, tasks, presets),
        "ablation": lambda: ablation(figures, choice),
    }
    for key in ("skew", "clients", "rows"):
        makers[key] = lambda key=key: varied(key, figures, choice)  # type: ignore[misc]
    made = {key: makers[key]() for key in TITLES if key in choice.tables}
    return {key: table | {"notes": notes(key, figures, choice)} for key, table in made.items() if table is not None}


def table_4(figures: Figures, tasks: Sequence[str], presets: Sequence[Preset]) -> dict[str, Any] | None:
    """SLMs: both baselines, CrossLM, its gains, and the ceiling; then what is of preset ``recommended`` alone."""
    rows = [row(ALL_ROWS, [figures.standalone(task) for task in tasks], column(0), SHARE)]
    for preset in presets:
        slm = [figures.slm(task, preset) for task in tasks]
        gain = [figures.gain(task, preset) for task in tasks]
        ceiling = [figures.ceiling(task, preset) for task in tasks]
        rows += [
            row(f"preset {preset}: Data-free KD", slm, column(DATA_FREE_KD), SHARE),
            row(f"preset {preset}: CrossLM", slm, column(CROSSLM), SHARE),
            row(f"preset {preset}: CrossLM - Standalone, points", gain, change(ENHANCED, BASELINE), POINTS),
            row(f"preset {preset}: CrossLM - Data-free KD, points", slm, change(CROSSLM, DATA_FREE_KD), POINTS),
            row(f"preset {preset}: CrossLM / ceiling", ceiling, ratio, SHARE),
        ]
    ceilings = [figures.ceiling_alone(task) for task in tasks]
    rows.append(row("ceiling: one SLM on all clients' text", ceilings, column(0), SHARE))
    if "recommended" in presets:
        rows += _of_recommended_alone([figures.slm(task, "recommended") for task in tasks])
        over_paper = [figures.gain_over_data_free_kd_of_paper(task, "recommended") for task in tasks]
        rows.append(row(OVER_PAPER, over_paper, change(ENHANCED, BASELINE), POINTS))
    return table("4", [*tasks, "average"], rows)


def _of_recommended_alone(slm: Sequence[Part]) -> list[dict[str, Any]]:
    """Against its own Standalone, which has learned from the rows that are not held out, and before acceptance.

    What comes in the end counts if it was taken.
    """
    return [
        row("apart, preset recommended: its own Standalone", slm, column(OWN_STANDALONE), SHARE),
        row("apart, preset recommended: CrossLM - that, points", slm, change(CROSSLM, OWN_STANDALONE), POINTS),
        row("apart, preset recommended: what came at arrival, or in the end if taken", slm, column(RETURNED), SHARE),
        row("apart, preset recommended: that - Data-free KD, points", slm, change(RETURNED, DATA_FREE_KD), POINTS),
    ]


def _before_after(name: str, parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        row(f"{name}: before", parts, column(BEFORE), SHARE),
        row(f"{name}: after", parts, column(AFTER), SHARE),
        row(f"{name}: gain, points", parts, change(AFTER, BEFORE), POINTS),
    ]


def table_5(figures: Figures, tasks: Sequence[str], presets: Sequence[Preset]) -> dict[str, Any] | None:
    """The LLM's accuracy before and after."""
    rows = [
        row
        for preset in presets
        for row in _before_after(f"preset {preset}", [figures.nlu(task, preset) for task in tasks])
    ]
    return table("5", [*tasks, "average"], rows)


def table_6(figures: Figures, tasks: Sequence[str], presets: Sequence[Preset]) -> dict[str, Any] | None:
    """Agreement with the labels of what the LLM writes, by the clients' SLMs and by the judge."""
    rows = [
        row
        for preset in presets
        for who, judge in (("by the SLMs", False), ("by the judge", True))
        for row in _before_after(f"preset {preset}, {who}", [figures.nlg(task, preset, judge) for task in tasks])
    ]
    if rows:
        judges = [figures.judge(task, "recommended") or figures.judge(task, "paper") for task in tasks]
        rows.append(row("how often the judge itself is right, on test text", judges, column(0), SHARE))
    return table("6", [*tasks, "average"], rows)


def table_7(figures: Figures, tasks: Sequence[str], presets: Sequence[Preset]) -> dict[str, Any] | None:
    """Accuracy on the benchmarks, its change against the original, and CoLA's Matthews correlation."""
    rows = []
    starts = [(ORIGINAL, ORIGINAL), *((task, preset) for preset in presets for task in tasks)]
    for task, preset in starts:
        parts = [figures.benchmark(name, task, preset) for name in BENCHMARKS]
        name = "original" if task == ORIGINAL else f"preset {preset}, after {NAMES.get(task, task)}"
        accuracy = row(name, parts, column(AFTER), SHARE)
        accuracy["cells"].append(cell(figures.matthews("cola", task, preset), column(0), CORRELATION))
        rows.append(accuracy)
        if task != ORIGINAL:
            rows.append(row(f"{name}: change, points", parts, change(AFTER, BEFORE), POINTS))
            rows[-1]["cells"].append(None)
    majority = row("the most frequent label always", [figures.majority(name) for name in BENCHMARKS], column(0), SHARE)
    rows.append({**majority, "cells": [*majority["cells"], None]})
    return table("7", [*BENCHMARKS, "average", "CoLA, Matthews"], rows)


def table_8(figures: Figures, tasks: Sequence[str], presets: Sequence[Preset]) -> dict[str, Any] | None:
    """Perplexity before and after, and its growth."""
    rows = []
    for preset in presets:
        parts = [figures.perplexity(task, preset) for task in tasks]
        rows += [
            row(f"preset {preset}: before", parts, column(BEFORE), PERPLEXITY),
            row(f"preset {preset}: after", parts, column(AFTER), PERPLEXITY),
            row(f"preset {preset}: growth, %", parts, growth, PERCENT),
        ]
    return table("8", [*tasks, "average"], rows)


def varied(key: str, figures: Figures, choice: Choice) -> dict[str, Any] | None:
    """Where the method helps: a row for each task, preset and value."""
    names = {"skew": choice.scale.skew.alpha, "clients": choice.scale.clients.num_clients}
    values: Sequence[float] = names.get(key, choice.scale.rows.rows_per_client)
    rows = []
    for task in tasks_of(key, choice):
        for preset in choice.presets:
            for value, variation in zip(values, variations(key, choice, task, preset), strict=True):
                slm = figures.slm(task, preset, variation.name)
                gain = figures.gain(task, preset, variation.name)
                ceiling = figures.ceiling(task, preset, variation.name)
                cells = [
                    cell(gain, column(BASELINE), SHARE),
                    cell(slm, column(DATA_FREE_KD), SHARE),
                    cell(slm, column(CROSSLM), SHARE),
                    cell(gain, change(ENHANCED, BASELINE), POINTS),
                    cell(ceiling, column(1), SHARE),
                    cell(ceiling, ratio, SHARE),
                    cell(slm, column(OWN_STANDALONE), SHARE) if preset == "recommended" else None,
                ]
                rows.append(
                    {"name": f"{NAMES.get(task, task)}, preset {preset}, {value:g}", "by": "ours", "cells": cells}
                )
    if not any_varied(key, figures, choice):
        return None
    columns = ("Standalone", "Data-free KD", "CrossLM", "gain, points", "ceiling", "share of ceiling", "own Standalone")
    return table(key, columns, rows)


def any_varied(key: str, figures: Figures, choice: Choice) -> bool:
    """Whether more has been run than the base, which all tables share."""
    return any(
        figures.runs(task, preset, variation.name)
        for task in tasks_of(key, choice)
        for preset in choice.presets
        for variation in variations(key, choice, task, preset)
        if variation.name != BASE
    )


def ablation(figures: Figures, choice: Choice) -> dict[str, Any] | None:
    """A row for each change: SLMs, LLM, diversity and forgetting."""
    rows = []
    for task in tasks_of("ablation", choice):
        for preset in choice.presets:
            for name in dict.fromkeys(found.name for found in variations("ablation", choice, task, preset)):
                # under paper against the run's own Standalone, which is of the same machine; under recommended that has
                # learned from fewer rows, and none of the changes is one of how a Standalone is trained
                gain = figures.gain(task, preset, name, name if preset == "paper" else BASE)
                cells = [
                    cell(figures.slm(task, preset, name), column(CROSSLM), SHARE),
                    cell(gain, change(ENHANCED, BASELINE), POINTS),
                    cell(figures.nlu(task, preset, name), column(AFTER), SHARE),
                    cell(figures.nlg(task, preset, True, name), column(AFTER), SHARE),
                    cell(figures.distinct_2(task, preset, name), column(AFTER), SHARE),
                    cell(figures.perplexity(task, preset, name), growth, PERCENT),
                ]
                shown = "no change" if name == BASE else name
                rows.append(
                    {"name": f"{NAMES.get(task, task)}, preset {preset}, {shown}", "by": "ours", "cells": cells}
                )
    if not any_varied("ablation", figures, choice):
        return None
    columns = ("SLM", "SLM gain, points", "NLU after", "NLG (judge) after", "distinct-2 after", "perplexity growth, %")
    return table("ablation", columns, rows)
