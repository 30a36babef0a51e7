"""The charts of a report: static SVG by matplotlib, in the colours of the page, light or dark."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crosslm.html_report.collect import Arrival, RunView
from crosslm.runs.report import METHOD_NAMES, measured
from crosslm.runs.rundir import METHODS

INK, GRID = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505")
MARKERS = ("o", "s", "D")
DASHES = ("-", "--", ":")
# what matplotlib draws in these colours takes the page's, which differ in light, dark and print
VARIABLES = {INK: "--ink", GRID: "--grid", **{colour: f"--series-{i + 1}" for i, colour in enumerate(SERIES)}}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a client may have a dollar sign in its name
    "svg.fonttype": "none",
    "svg.hashsalt": "crosslm",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
LLM_SHARES = {
    "nlu_accuracy": "classifies right",
    "nlg_accuracy": "to the label, SLMs",
    "nlg_judge_accuracy": "to the label, judge",
    "distinct_2": "different word pairs",
}


@dataclass(frozen=True)
class Chart:
    """A chart, its title, and a sentence for those who do not see it."""

    title: str
    description: str
    svg: str


def charts(view: RunView) -> dict[str, Chart]:
    """The charts of a run by name; those for which it holds no figures are left out."""
    made = {}
    if measured(view.summary):
        made["accuracy"] = accuracy_chart(view)
    if llm_shares(view):
        made["llm"] = llm_chart(view)
    arrivals = view.arrivals
    lines = {
        "reward": (
            "Mean reward of each arrival",
            {"reward/drafts": "texts to learn from", "reward/pool": "texts to choose from"},
            (-1.05, 1.05),
        ),
        "judge": (
            "The independent judge finds the label",
            {"judge/pool": "texts to choose from", "judge/selected": "selected texts"},
            (-0.05, 1.05),
        ),
        "diversity": (
            "Diversity of each pool",
            {"diversity/pool": "distance to the nearest text", "distinct_2/pool": "different word pairs"},
            (-0.05, 1.05),
        ),
    }
    for name, (title, series, limits) in lines.items():
        if arrivals and any(key in arrival.measures for arrival in arrivals for key in series):
            made[name] = arrival_chart(arrivals, title, series, limits)
    if any(arrival.updates for arrival in arrivals):
        parts = {"generation_loss": "generation", "language_modeling_loss": "language modelling", "loss": "all, Eq. 9"}
        made["losses"] = update_chart(arrivals, "Parts of the loss, each update of the LLM", parts)
        made["kl"] = update_chart(
            arrivals, "Distance from the original LLM", {"kl_loss": "KL, Eq. 8", "log_ratio": "log-ratio"}
        )
    return made


def accuracy_chart(view: RunView) -> Chart:
    """Each client's accuracy by the methods that were measured, with its interval."""
    slm, rows = view.summary["slm"], view.summary["test_rows"]
    clients = [client for client in view.clients if slm["crosslm"][client] is not None]
    methods = [method for method in METHODS if all(slm[method].get(client) is not None for client in clients)]

    def draw(axes: Axes) -> None:
        for method in methods:
            number = METHODS.index(method)
            values = [slm[method][client] for client in clients]
            places = [place + (number - 1) * 0.22 for place in range(len(clients))]
            ends = [
                view.interval(value, rows[client]) or (value, value)
                for value, client in zip(values, clients, strict=True)
            ]
            errors = [
                [max(value - end[0], 0) for value, end in zip(values, ends, strict=True)],
                [max(end[1] - value, 0) for value, end in zip(values, ends, strict=True)],
            ]
            axes.errorbar(
                values,
                places,
                xerr=errors,
                fmt=MARKERS[number],
                color=SERIES[number],
                label=METHOD_NAMES[method],
                markersize=5,
                elinewidth=1.2,
            )
        axes.set_yticks(range(len(clients)), [_short(client) for client in clients])
        axes.set_ylim(len(clients) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2, columnspacing=1)

    return _chart(
        "Accuracy of each client's SLM on test text",
        f"Accuracy of {len(clients)} clients' SLMs by {len(methods)} methods; the figures are in the table above.",
        [draw],
        height=0.9 + 0.5 * len(clients),
    )


def llm_shares(view: RunView) -> list[tuple[str, float, float]]:
    """The LLM's measures that are shares, each with its title, before and after."""
    return [
        (title, moments["before"], moments["after"])
        for key, title in LLM_SHARES.items()
        if (moments := view.summary["llm"].get(key)) and None not in moments.values()
    ]


def llm_chart(view: RunView) -> Chart:
    """The LLM's measures that are shares, before and after."""
    measures = llm_shares(view)

    def draw(axes: Axes) -> None:
        for place, (_, before, after) in enumerate(measures):
            axes.plot([before, after], [place, place], color=GRID, linewidth=2, zorder=1)
        places = range(len(measures))
        for number, column in enumerate((1, 2)):
            values = [measure[column] for measure in measures]
            name = ("before", "after")[number]
            axes.scatter(values, places, color=SERIES[2 * number], marker=MARKERS[number], s=34, label=name, zorder=2)
        axes.set_yticks(places, [title for title, _, _ in measures])
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.2)

    return _chart(
        "The LLM before and after",
        "Shares of the LLM before and after the run; the figures are in the table of the LLM.",
        [draw],
        height=0.9 + 0.45 * len(measures),
    )


def arrival_chart(
    arrivals: Sequence[Arrival], title: str, series: dict[str, str], limits: tuple[float, float]
) -> Chart:
    """One line for each measure over the arrivals."""

    def draw(axes: Axes) -> None:
        for number, (key, name) in enumerate(series.items()):
            points = [(arrival.step, arrival.measures[key]) for arrival in arrivals if key in arrival.measures]
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=SERIES[2 * number],
                marker=MARKERS[number],
                linestyle=DASHES[number],
                markersize=5,
                label=name,
            )
        axes.set_ylim(*limits)
        ticks = [arrival.step for arrival in arrivals][:: max(len(arrivals) // 6, 1)]
        names = {arrival.step: _short(arrival.client) for arrival in arrivals}
        axes.set_xticks(ticks, [f"{step}\n{names[step]}" if len(arrivals) <= 6 else str(step) for step in ticks])
        axes.set_xlim(0.7, max(arrivals[-1].step, 2) + 0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1)

    spoken = [
        f"{name}: " + ", ".join(f"{arrival.measures[key]:.2f}" for arrival in arrivals[:12] if key in arrival.measures)
        for key, name in series.items()
    ]
    return _chart(title, f"{title}. {'; '.join(spoken)}.", [draw], height=2.5)


def update_chart(arrivals: Sequence[Arrival], title: str, series: dict[str, str]) -> Chart:
    """A panel for each measure over all optimiser steps, with a line where an arrival begins."""
    updates = [update for arrival in arrivals for update in arrival.updates]
    begins = [sum(len(arrival.updates) for arrival in arrivals[:number]) + 1 for number in range(len(arrivals))]

    def panel(number: int, key: str, name: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            points = [(place, update[key]) for place, update in enumerate(updates, 1) if key in update]
            marker = "." if len(points) <= 40 else ""
            axes.plot(*zip(*points, strict=True), color=SERIES[number], marker=marker)
            for begin in begins:
                axes.axvline(begin - 0.5, color=GRID, linewidth=0.8, linestyle="--")
            axes.set_title(name, loc="left", fontsize=9)
            axes.locator_params(axis="y", nbins=4)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))

        return draw

    present = {key: name for key, name in series.items() if any(key in update for update in updates)}
    return _chart(
        title,
        f"{title}: {', '.join(present.values())}; means over each arrival are in the table of arrivals.",
        [panel(number, key, name) for number, (key, name) in enumerate(present.items())],
        height=1.25 * len(present) + 0.3,
        x_label="update",
    )


def _chart(
    title: str, description: str, panels: Sequence[Callable[[Axes], None]], height: float, x_label: str = ""
) -> Chart:
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        for number, draw in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, number + 1)
            draw(axes)
            if x_label and number == len(panels) - 1:
                axes.set_xlabel(x_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, description, page_svg(file.getvalue(), re.sub(r"\W+", "-", title.lower())))


def page_svg(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: its own ids, the page's colours and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg).replace("url(#", f"url(#{prefix}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    size = r'<svg ([^>]*?)\bheight="[^"]*"([^>]*?)\bwidth="[^"]*"|<svg ([^>]*?)\bwidth="[^"]*"([^>]*?)\bheight="[^"]*"'
    return re.sub(size, lambda found: '<svg aria-hidden="true" ' + "".join(filter(None, found.groups())), svg, count=1)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
