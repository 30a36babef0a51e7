"""Where kept cells are from, what a table has of what it was to have, and which of its figures are of two machines."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.markdown import short
from crosslm.reproduce.plan import (
    BASE,
    CEILING,
    ORIGINAL,
    RUN,
    RUNS_LLM,
    STANDALONE,
    Cell,
    Choice,
    Variation,
    cells_of,
)

Kept = dict[Cell, dict[str, Any]]
VARIED = ("skew", "clients", "rows", "ablation")
"""Tables that share the base with Table 4, where its machines are said."""


def origin(kept: Kept) -> dict[str, Any]:
    """Commits, machines, first and last day, and the hours it took."""
    again = [content["measured_again"] for content in kept.values() if "measured_again" in content]
    origins = [*kept.values(), *again]
    dates = sorted({content["date"] for content in origins})
    return {
        "commits": sorted({content["commit"] for content in origins}),
        "machines": sorted({content["machine"] for content in origins}),
        "dates": list(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "cells": len(kept),
        "hours": round(sum(content["seconds"] for content in kept.values()) / 3600, 2),
    }


def not_run(kept: Kept, key: str, choice: Choice) -> list[str]:
    """A note of which cells a table was to have by the scale and has not."""
    planned = cells_of(key, replace(choice, seeds=choice.scale.seeds))
    there = {replace(cell, stage=RUN) if cell.stage == RUNS_LLM else cell for cell in kept}
    missing = [cell for cell in planned if cell not in there]
    if not missing:
        return []
    names = [
        f"{name}{'' if seeds == _seeds(name, planned) else ' (seed ' + ', '.join(map(str, sorted(seeds))) + ')'}"
        for name in dict.fromkeys(map(_name, missing))
        for seeds in [_seeds(name, missing)]
    ]
    return [f"Of {len(planned)} cells of this table {len(missing)} are not there: {', '.join(names)}."]


def _name(cell: Cell) -> str:
    return f"{cell.task}/{cell.method}" + ("" if cell.variation.name == BASE else f"/{cell.variation.name}")


def _seeds(name: str, cells: list[Cell]) -> set[int]:
    return {cell.seed for cell in cells if _name(cell) == name}


def of_two_machines(kept: Kept, key: str, choice: Choice) -> list[str]:
    """A note for each comparison of a table whose two sides were made by different machines."""
    runs = {replace(cell, stage=RUN) if cell.stage == RUNS_LLM else cell: content for cell, content in kept.items()}
    found: dict[tuple[str, str, str], list[str]] = {}
    seeds = range(1 + max((cell.seed for cell in kept), default=0))
    for cell in cells_of(key, replace(choice, seeds=len(seeds))):
        for what, other in _compared(cell, key, runs):
            if cell in runs and other in runs and runs[cell]["machine"] != runs[other]["machine"]:
                sides = (what, runs[other]["machine"], runs[cell]["machine"])
                found.setdefault(sides, []).append(f"{_name(cell)} {cell.seed}")
    return [
        f"Of two machines: {what} by {other}, what is compared with it by {own}: {', '.join(dict.fromkeys(cells))}."
        for (what, other, own), cells in found.items()
    ]


def _compared(cell: Cell, key: str, runs: Mapping[Cell, Any]) -> Iterator[tuple[str, Cell]]:
    """What a cell's figures are compared with in a table."""
    if key == "7":
        if cell.task != ORIGINAL and cell.stage in BENCHMARKS:
            yield "the original", Cell(ORIGINAL, ORIGINAL, Variation(BASE), cell.seed, cell.stage)
    elif cell.stage == RUN and (key == "4" or (key in VARIED and cell.variation.name != BASE)):
        if key != "ablation":
            yield "the ceiling", replace(cell, method=CEILING, stage=CEILING)
        if cell.method == "recommended":
            compared = replace(cell, variation=Variation(BASE)) if key == "ablation" else cell
            alone = replace(compared, method=STANDALONE, stage=STANDALONE)
            yield "Standalone", alone if alone in runs else replace(compared, method="paper")
            if key == "4":
                yield "Data-free KD of preset paper", replace(cell, method="paper")


def measured_again(kept: Kept) -> list[str]:
    """A note where the LLM of a run was interpolated and measured later than its classifiers."""
    made: dict[str, list[str]] = {}
    for cell, content in kept.items():
        if again := content.get("measured_again"):
            where = f"{again['interpolation']:g} at {short(again['commit'])}, {again['date']}, {again['machine']}"
            made.setdefault(where, []).append(str(Path(cell.path).parent))
    return [
        f"{', '.join(names)}: the run's LLM was interpolated (`llm.interpolation`) by {where}, and measured then: "
        "nothing that it did before, and no classifier, depends on it."
        for where, names in made.items()
    ]


def _begins_with(run: Mapping[str, Any], benchmark: Mapping[str, Any]) -> bool:
    """Whether a benchmark was fine-tuned from the LLM that the run's figures are of.

    With this ``llm.interpolation``, which its settings have, there is no LLM but the one that was measured again.
    """
    if again := run.get("measured_again"):
        return bool(again["machine"] == benchmark["machine"])
    return bool((run["commit"], run["machine"]) == (benchmark["commit"], benchmark["machine"]))


def other_starts(kept: Kept) -> list[str]:
    """A note where a run and what its LLM was fine-tuned on are of different commits or machines."""
    runs = {replace(cell, stage=RUN): content for cell, content in kept.items() if cell.stage in (RUN, RUNS_LLM)}
    others: dict[str, list[str]] = {}
    for cell, content in kept.items():
        run = runs.get(replace(cell, stage=RUN)) if cell.stage in BENCHMARKS else None
        if run and not _begins_with(run, content):
            made = f"{short(content['commit'])}, {content['machine']}"
            others.setdefault(made, []).append(str(Path(cell.path).parent))
    return [
        f"{', '.join(dict.fromkeys(names))}: fine-tuned at {made}, and the run that is kept is of another commit or "
        "machine: where it was made again in between, Tables 5, 6 and 8 are of the new LLM and this one of the earlier."
        for made, names in others.items()
    ]
