"""The HTML of a report: Jinja2 with autoescape, for what an LLM wrote is untrusted text."""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crosslm.html_report.collect import RunView
from crosslm.html_report.findings import findings
from crosslm.html_report.intervals import Interval
from crosslm.privacy.bounds import PREFIX, hidden, in_words, privacy_line
from crosslm.runs.report import AT_THE_SILO, MEASURE_NAMES, METHOD_NAMES, about_accuracy, measured, moment
from crosslm.runs.rundir import METHODS

LLM_ROWS = {"nlu_accuracy": "nlu_rows", "nlg_judge_accuracy": "nlg_samples"}


def render(views: list[RunView]) -> str:
    """The page of one run, or of two side by side."""
    environment = Environment(
        loader=PackageLoader("crosslm.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": number,
        "signed": lambda value, digits=3: number(value, digits, sign="+"),
        "interval": interval,
        "gain_interval": gain_interval,
        "size": size,
        "moment": moment,
        "told": told,
        "in_words": lambda rows: in_words(list(rows), list(rows.values())),
        "counts": lambda counts: "hidden" if hidden(counts) else ", ".join(map(str, counts)),
    }
    environment.filters |= filters
    script = _asset("browse.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("run.html.j2" if len(views) == 1 else "compare.html.j2")
    return page.render(
        pages=[contents(view) for view in views],
        differences=all_differences(*views) if len(views) == 2 else [],
        compared=compared(*views) if len(views) == 2 else [],
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_hash=digest,
        methods=METHOD_NAMES,
        llm_measures=MEASURE_NAMES,
        at_the_silo=AT_THE_SILO,
    )


def contents(view: RunView) -> dict[str, Any]:
    """What the templates say of a run."""
    return {
        "view": view,
        "summary": view.summary,
        "charts": _charts(view),
        "findings": findings(view),
        "slm": slm_rows(view),
        "llm": llm_rows(view),
        "matrices": matrices(view),
        "uploads": view.of("upload"),
        "gate": view.of("gate"),
        "privacy": privacy_line(view.summary),
        "measured": measured(view.summary),
        "about_accuracy": about_accuracy(view.summary) if view.between_machines else "",
    }


def slm_rows(view: RunView) -> list[dict[str, Any]]:
    """A row for each client and one for the mean: accuracies and the gain, with intervals where known."""
    slm, rows = view.summary["slm"], view.summary["test_rows"]
    return [
        {
            "client": client,
            "rows": rows.get(client),
            "cells": [
                (slm[method].get(client), view.interval(slm[method].get(client), rows.get(client)))
                for method in METHODS
            ],
            "gain": None if None in (value, slm["standalone"][client]) else value - slm["standalone"][client],
            "gain_interval": view.gains.get(client),
        }
        for client, value in slm["crosslm"].items()
    ]


def llm_rows(view: RunView) -> list[dict[str, Any]]:
    """The LLM before and after; intervals where the figure is a share of a known number of rows."""
    known = {
        "nlu_rows": view.summary.get("nlu_rows"),
        "nlg_samples": view.config.get("evaluation", {}).get("nlg_samples"),
    }
    found = []
    for key, title in MEASURE_NAMES.items():
        moments = view.summary["llm"].get(key, {})
        if moments.get("before") is None or moments.get("after") is None:
            continue
        rows = known.get(LLM_ROWS.get(key, ""))
        found.append(
            {
                "key": key,
                "title": title,
                "digits": 2 if key == "perplexity" else 3,
                "cells": [(moments[moment], view.interval(moments[moment], rows)) for moment in ("before", "after")],
                "change": moments["after"] - moments["before"],
            }
        )
    return found


def matrices(view: RunView) -> dict[str, list[dict[str, Any]]]:
    """Confusion matrices of each client by method; none for a run that did not count."""
    kept = view.summary.get("confusion", {})
    found: dict[str, list[dict[str, Any]]] = {}
    for client in view.clients:
        for method in METHODS:
            counts = kept.get(method, {}).get(client)
            if counts:
                shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
                cells = [list(zip(row, share, strict=True)) for row, share in zip(counts, shares, strict=True)]
                found.setdefault(client, []).append({"method": METHOD_NAMES[method], "cells": cells})
    return found


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The configuration fields in which two runs differ."""
    one, two = _flat(first), _flat(second)
    return [
        (key, one.get(key, "not set"), two.get(key, "not set"))
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
    ]


def all_differences(first: RunView, second: RunView) -> list[tuple[str, str, str]]:
    """Configuration fields in which two runs differ, and which clients each was rolled back without."""
    one, two = (", ".join(view.barred) or "nobody" for view in (first, second))
    found = differences(first.config, second.config)
    return found if one == two else [*found, ("rolled back without", one, two)]


def compared(first: RunView, second: RunView) -> list[tuple[str, Any, Any]]:
    """The accuracy of each client's SLM in two runs, with intervals, and the mean of those that both have."""
    rows = [{row["client"]: row["cells"][-1] for row in slm_rows(view)} for view in (first, second)]
    shared = [client for client in first.clients if client in second.clients]
    found: list[tuple[str, Any, Any]] = []
    for client in dict.fromkeys([*first.clients, *second.clients]):
        found.append((client, rows[0].get(client), rows[1].get(client)))

    def mean(cells: Mapping[str, Any]) -> tuple[float, None] | None:
        values = [cells[client][0] for client in shared]
        return (sum(values) / len(values), None) if None not in values else None

    of = "" if len(shared) == len(found) else f" of {', '.join(shared)}"
    return [*found, (f"mean{of}", mean(rows[0]), mean(rows[1]))] if shared else found


def number(value: float | None, digits: int = 3, sign: str = "-") -> str:
    """A figure, with a real minus sign; no sign at a zero, a dash where there is none."""
    if value is None:
        return "–"
    value = round(value, digits)
    return f"{value:{sign},.{digits}f}".replace("-", "−") if value else f"{0:.{digits}f}"


def told(value: float, name: str) -> str:
    """A figure of an upload; what DP-SGD was made with as it is, since a delta of 1e-5 is no 0.0000."""
    return f"{value:g}" if name.startswith(PREFIX) else number(value, 4)


def interval(ends: Interval | None, digits: int = 3, sign: str = "-") -> str:
    """An interval, or nothing."""
    return "" if ends is None else f"{number(ends[0], digits, sign)} to {number(ends[1], digits, sign)}"


def gain_interval(ends: Interval | None) -> str:
    """The interval of a gain; in words where both classifiers got the same rows right, of which no draw can differ."""
    return "same rows right" if ends == (0.0, 0.0) else interval(ends, 3, "+")


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _charts(view: RunView) -> dict[str, Any]:
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from crosslm.html_report.plots import charts

    return charts(view)


def _asset(name: str) -> str:
    loader = PackageLoader("crosslm.html_report")
    return loader.get_source(Environment(autoescape=True), name)[0]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _shown(value)}
    return flat


def _shown(value: Any) -> str:
    """A value as it would stand in the file, text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
