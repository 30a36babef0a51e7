"""Tables as Markdown."""

from collections.abc import Mapping
from typing import Any

DIGITS = {"count": 0, "share": 3, "points": 1, "percent": 1, "perplexity": 2, "correlation": 3}
SIGNED = ("points", "percent")


def figure(cell: Mapping[str, Any] | None) -> str:
    """A value and its interval; nothing for what has not been run."""
    if cell is None:
        return ""
    shown = [
        f"{cell[name]:{'+' if cell['unit'] in SIGNED else ''}.{DIGITS[cell['unit']]}f}"
        for name in ("value", "low", "high")
        if name in cell
    ]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def seeds(row: Mapping[str, Any]) -> str:
    """How many seeds are behind a row."""
    numbers = sorted({cell["seeds"] for cell in row["cells"] if cell is not None and "seeds" in cell})
    return "-".join(dict.fromkeys([str(numbers[0]), str(numbers[-1])])) if numbers else ""


def markdown_table(table: Mapping[str, Any]) -> list[str]:
    """A heading, a table with the paper's rows in italics, and its notes."""
    lines = [
        f"### {table['title']}",
        "",
        "| | " + " | ".join(table["columns"]) + " | seeds |",
        "| --- |" + " ---: |" * (len(table["columns"]) + 1),
    ]
    for row in table["rows"]:
        name = f"*in the paper: {row['name']}*" if row["by"] == "paper" else row["name"]
        lines.append(f"| {name} | " + " | ".join(map(figure, row["cells"])) + f" | {seeds(row)} |")
    return [*lines, "", *(f"- {text}" for text in table["notes"]), *([""] if table["notes"] else [])]


def markdown(report: Mapping[str, Any]) -> list[str]:
    """Everything of a report: where the figures are from, the headline, each table, what differs, flagged runs."""
    origin = report["origin"]
    lines = [
        f"Measured on the {report['split']} split; in brackets the 95 % interval of a bootstrap over seeds and test "
        "rows (with one seed: over test rows alone); test rows are the same for every seed. Of perplexity, Matthews "
        "correlation, distinct-2, the judge's own accuracy and the most frequent label's share seeds alone are drawn: "
        "no interval with one, and with two or three little more than their range. "
        "Three seeds are few for an accuracy too: where they differ much, as on a single task, an interval is too "
        "narrow at its ends. "
        f"Commits {', '.join(map(short, origin['commits']))}, {' to '.join(origin['dates'])}, "
        f"{'; '.join(origin['machines'])}; {origin['cells']} cells, {origin['hours']:.1f} hours.",
        "",
        *headline_table(report["headline"]),
    ]
    for table in report["tables"].values():
        lines += markdown_table(table)
    lines += ["What differs from the paper:", "", *(f"- {text}" for text in report["differs"]), ""]
    flagged = report["flagged"]
    lines += [
        "Runs in which the reward rose while the judge's agreement fell (reward hacking): "
        + ("; ".join(flagged) + "." if flagged else "none."),
        "",
    ]
    return lines


def short(commit: str) -> str:
    """Ten digits of a commit, and whether the source was changed since."""
    return f"`{commit[:10]}`" + (" with changes" if commit.endswith("+changes") else "")


def headline_table(headline: Mapping[str, Any]) -> list[str]:
    """The headline figures of both presets that are complete; nothing if none is."""
    lines = []
    for name, unit in headline["units"].items():
        cells = []
        for preset in ("paper", "recommended"):
            found = headline[preset]
            if name in found:
                between = found["intervals"].get(name)
                interval = f" [{between[0]:.3g}, {between[1]:.3g}]" if between else ""
                cells.append(f"{found[name]:.3g}{interval}, seeds: {found['seeds'][name]}")
            else:
                cells.append("")
        if any(cells):
            beside = [headline["beside"].get(name, {}).get(what, "") for what in ("paper", "goal")]
            lines.append(f"| `{name}` ({unit}) | " + " | ".join([*cells, *beside]) + " |")
    heads = "| headline | preset paper | preset recommended | in the paper | our goal |"
    return [heads, "| --- | --- | --- | --- | --- |", *lines, ""] if lines else []
