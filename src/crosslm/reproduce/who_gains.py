"""Which clients gain: by how far a client's own classifier is below the ceiling."""

from typing import Any

from crosslm.reproduce.figures import CROSSLM, DATA_FREE_KD, Figures
from crosslm.reproduce.plan import Choice

BOUNDS = (5.0, 10.0, 20.0)
"""Points below the ceiling that part the rows."""
COLUMNS = (
    "clients",
    "Standalone",
    "Data-free KD - Standalone, points",
    "CrossLM - Standalone, points",
    "the least",
    "the most",
    "clients that lose",
)
NOTES = [
    "Every client of every task and seed of Table 4 is counted by itself; Standalone has learned from all its rows. A "
    "client is put in a row by the test rows that its gain is of, too: one that was unlucky on them seems farther "
    "below the ceiling, and seems to gain more, by a point or so.",
]


def who_gains(figures: Figures, choice: Choice) -> dict[str, Any] | None:
    """A row for each preset and distance to the ceiling; None if no client has both."""
    rows = []
    for preset in choice.presets:
        clients = [client for task in choice.tasks for client in figures.clients(task, preset)]
        for low, high in zip((-100.0, *BOUNDS), (*BOUNDS, 100.0), strict=True):
            there = [found for found in clients if low <= 100 * (found["ceiling"] - found["standalone"]) < high]
            if there:
                rows.append({"name": f"preset {preset}, {_words(low, high)}", "by": "ours", "cells": _cells(there)})
    if not rows:
        return None
    title = "Who gains: by how far a client's own classifier is below the ceiling"
    return {"title": title, "columns": list(COLUMNS), "rows": rows, "notes": NOTES}


def _words(low: float, high: float) -> str:
    if low == -100:
        return f"under {high:g} points below it, or above"
    return f"{low:g} points and more" if high == 100 else f"{low:g} to {high:g} points"


def _cells(clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gains = [100 * (found["outcome"][CROSSLM] - found["standalone"]) for found in clients]
    kd = [100 * (found["outcome"][DATA_FREE_KD] - found["standalone"]) for found in clients]
    values = [
        (len(clients), "count"),
        (sum(found["standalone"] for found in clients) / len(clients), "share"),
        (sum(kd) / len(kd), "points"),
        (sum(gains) / len(gains), "points"),
        (min(gains), "points"),
        (max(gains), "points"),
        (sum(gain < 0 for gain in gains), "count"),
    ]
    seeds = len({found["seed"] for found in clients})
    return [{"value": value, "unit": unit, "seeds": seeds} for value, unit in values]
