"""Plots as SVG; matplotlib is the extra ``crosslm[report]``."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

PANELS = {
    "judge/pool": "judge's agreement",
    "distinct_1/pool": "distinct-1",
    "distinct_2/pool": "distinct-2",
    "distinct_3/pool": "distinct-3",
    "self_similarity/pool": "self-similarity",
    "length/pool": "words a text",
    "echo/pool": "label-word echo",
}
COLOURS = {"paper": "#b3511d", "recommended": "#1f5f8b"}
MARKERS = "osD^vP*X"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def arrivals_plot(title: str, runs: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    """What the texts of each arrival are like against the mean reward that they got.

    A line joins a run's arrivals in order, and the last has a ring. A point further right was rewarded more.

    Args:
        title: of the figure.
        runs: for each preset the figures of its runs by seed.

    Returns:
        The SVG.
    """
    figure, axes = _figure(2, 4, title)
    for axis, (key, name) in zip(axes, PANELS.items(), strict=False):
        for preset, seeds in runs.items():
            for seed, run in seeds.items():
                steps = [step for step in run["arrivals"] if key in step]
                rewards, values = [step["reward/pool"] for step in steps], [step[key] for step in steps]
                style = {"color": COLOURS[preset], "marker": MARKERS[seed % len(MARKERS)], "markersize": 4}
                axis.plot(rewards, values, linewidth=0.8, label=f"{preset}, seed {seed}", **style)
                axis.plot(rewards[-1:], values[-1:], "o", markersize=9, fillstyle="none", color=COLOURS[preset])
        axis.set(xlabel="mean reward of the pool", ylabel=name)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=7, frameon=False)
    axes[-1].set_axis_off()
    return _svg(figure)


def varied_plot(table: Mapping[str, Any]) -> str:
    """A varied quantity's table as one panel for each task and preset: accuracy with intervals at each value."""
    groups: dict[str, list[tuple[str, Sequence[Any]]]] = {}
    for row in table["rows"]:
        name, _, value = row["name"].rpartition(", ")
        groups.setdefault(name, []).append((value, row["cells"]))
    figure, axes = _figure(1, len(groups), table["title"])
    for axis, (name, rows) in zip(axes, groups.items(), strict=True):
        for place, method in enumerate(table["columns"]):
            there = [(value, cells[place]) for value, cells in rows if cells[place] is not None]
            if not there or there[0][1]["unit"] != "share" or "share" in method:
                continue
            middle = [cell["value"] for _, cell in there]
            below = [cell["value"] - cell["low"] for _, cell in there]
            above = [cell["high"] - cell["value"] for _, cell in there]
            spread = [[max(0.0, width) for width in side] for side in (below, above)]
            axis.errorbar([value for value, _ in there], middle, spread, marker="o", capsize=3, label=method)
        axis.set(title=name, ylabel="accuracy of the SLMs")
        axis.legend(fontsize=7)
    return _svg(figure)


def _figure(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "crosslm", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
