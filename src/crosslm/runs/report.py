"""Tables of a run, from its ``summary.json``."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from crosslm.algorithm.per_label import macro_f1, recalls
from crosslm.privacy.bounds import privacy_line
from crosslm.support.plain import plain

METHOD_NAMES = {"standalone": "Standalone", "data_free_kd": "Data-free KD", "crosslm": "CrossLM"}
AT_THE_SILO = "measured at the silo, not known here"
MEASURE_NAMES = {
    "nlu_accuracy": "classifies test text right (NLU, Eq. 1)",
    "nlg_accuracy": "writes to the label, say the clients' SLMs (NLG)",
    "nlg_judge_accuracy": "writes to the label, says an independent judge",
    "distinct_2": "different word pairs among all it writes",
    "perplexity": "perplexity on the given text (lower is better)",
}


def slm_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy of each client's classifier under the three methods, as in the paper's Table 4."""
    table = Table(
        title=Text(f"SLM accuracy on test text · {summary['task']} · preset {summary['preset']}", style="table.title"),
        title_justify="left",
    )
    table.add_column("client")
    for name in METHOD_NAMES.values():
        table.add_column(name, justify="right")
    table.add_column("gain", justify="right")
    slm = summary["slm"]
    for client in slm["crosslm"]:
        if client == "mean":
            table.add_section()
        values = [slm[method].get(client) for method in METHOD_NAMES]
        known = values[-1] is not None and values[0] is not None
        figures = ("–" if value is None else f"{value:.3f}" for value in values)
        table.add_row(Text(client), *figures, f"{values[-1] - values[0]:+.3f}" if known else "–")
    return table


def llm_table(summary: Mapping[str, Any]) -> Table:
    """The LLM before and after, as in the paper's Tables 5, 6 and 8."""
    table = Table(title="LLM", title_justify="left")
    table.add_column("measure")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for key, title in MEASURE_NAMES.items():
        before, after = (summary["llm"].get(key, {}).get(moment) for moment in ("before", "after"))
        if before is not None and after is not None:
            digits = 2 if key == "perplexity" else 3
            table.add_row(title, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}")
    return table


def uploads_table(summary: Mapping[str, Any]) -> Table:
    """Who uploaded when in a run between machines, and what became of it."""
    table = Table(title="Uploads in the order of their arrival (UTC)", title_justify="left")
    for name in ("silo", "round", "received", "served", "delivered", "state"):
        table.add_column(name)
    for arrival in summary["arrivals"]:
        times = (moment(arrival[name]) for name in ("received_at", "served_at", "delivered_at"))
        state = f"{arrival['state']}: {arrival['note']}" if arrival["note"] else arrival["state"]
        table.add_row(Text(arrival["silo"]), str(arrival["round"]), *times, Text(plain(state)))
    return table


def moment(seconds: float | None) -> str:
    """A time in UTC, to the minute; a dash where it has not come."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def waited_for(summary: Mapping[str, Any]) -> list[str]:
    """What a run between machines ended without, in sentences."""
    lines = [
        f"{silo} never uploaded" + (f" ({plain(last)})." if last else ".")
        for silo, last in summary.get("not_uploaded", {}).items()
    ]
    lines += [
        f"{arrival['silo']}, round {arrival['round']}: waits in the spool; the run ended before its turn came."
        for arrival in summary.get("arrivals", [])
        if arrival["state"] in ("received", "processing")
    ]
    return lines + [f"{silo} has not taken its enhanced SLM." for silo in summary.get("not_delivered", [])]


def about_accuracy(summary: Mapping[str, Any]) -> str:
    """What the accuracies of a run between machines are of, and which there are not."""
    if set(summary["slm"]["crosslm"]) <= {"mean"}:
        return "No silo was served."
    if not measured(summary):
        return f"Accuracy of the silos' SLMs: {AT_THE_SILO}. The server has no test rows (data.test)."
    return (
        f"Accuracies are of the server's test rows; on each silo's own rows: {AT_THE_SILO}. Data-free KD was not run."
    )


def measured(summary: Mapping[str, Any]) -> bool:
    """Whether there is any accuracy of an enhanced SLM."""
    return any(value is not None for value in summary["slm"]["crosslm"].values())


def about_no_say(taught: Sequence[str], served: Sequence[str]) -> str:
    """Who was taught and might not judge, in words."""
    if set(taught) == set(served):
        return "No client's classifier may judge (see gate in metrics.jsonl): all were taught, the LLM is as it was."
    return f"Taught, without a say in what the LLM learns (see gate in metrics.jsonl): {', '.join(taught)}."


def declined(summary: Mapping[str, Any]) -> dict[str, str]:
    """Who did not accept what came back (``acceptance``, or an error there), and why, in words."""
    told = {}
    for client, facts in summary["clients"].items():
        decision = facts.get("decision")
        if decision and "refused" in decision:
            told[client] = (
                f"{decision['refused']}. The classifier that {client} had stays in use. CrossLM's figure is of the one "
                "that came back."
            )
        elif decision and not decision["accepted"] and "rows" not in decision:  # privacy.hide_counts
            told[client] = (
                f"It was worse on held-out private rows than the classifier that {client} had: that one stays in use. "
                "CrossLM's figure is of the one that came back."
            )
        elif decision and not decision["accepted"]:
            alike = ", each label counting alike" if decision.get("balanced") else ""
            told[client] = (
                f"It was right on {decision['after']:.3f} of {decision['rows']} held-out private rows{alike}, and the "
                f"classifier that {client} had on {decision['before']:.3f}: that one stays in use. CrossLM's "
                "figure is of the one that came back."
            )
    return told


def label_table(summary: Mapping[str, Any]) -> Table | None:
    """Macro-F1 of each client's classifier, and the label of which it finds least; None where that is not known."""
    counts = summary.get("confusion") or {}
    if not counts.get("crosslm"):
        return None
    table = Table(title="Each label counting alike (macro-F1), and the label found least", title_justify="left")
    table.add_column("client")
    methods = ("standalone", "crosslm")
    for method in methods:
        table.add_column(METHOD_NAMES[method], justify="right")
    table.add_column("label found least by CrossLM: share of its rows")
    names = list(next(iter(summary["clients"].values()))["rows"])
    for client, found in counts["crosslm"].items():
        scores = [macro_f1(counts[method][client]) if client in counts[method] else None for method in methods]
        share, label = min(
            ((share, label) for label, share in enumerate(recalls(found)) if share is not None), default=(None, 0)
        )
        least = "–" if share is None else f"{names[label]}: {share:.3f} of {sum(found[label])}"
        figures = ("–" if score is None else f"{score:.3f}" for score in scores)
        table.add_row(Text(client), *figures, Text(plain(least)))
    return table


def closing(summary: Mapping[str, Any], verdicts: Sequence[str] = ()) -> Group:
    """Everything that a run ends with.

    Args:
        summary: of the run.
        verdicts: what its gains come to, in sentences.
    """
    seconds = summary["seconds"]
    slowest = sorted((name for name in seconds if name != "total"), key=lambda name: -seconds[name])[:4]
    stages = ", ".join(f"{name} {seconds[name] / 60:.1f}" for name in slowest)
    rows = ", ".join(map(str, sorted({count for count in summary["test_rows"].values() if count})))
    seed = f"one seed ({summary['seed']}): differences of a few points are noise."
    lines = [
        f"Test rows: {rows}; {seed}" if rows else seed.capitalize(),
        f"Time {seconds['total'] / 60:.1f} min (of these {stages}), "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"{summary['tokens_generated']:,} tokens generated.",
        privacy_line(summary),
    ]
    decisions = [client["decision"] for client in summary["clients"].values() if client.get("decision")]
    if any(decision.get("rows", 1) for decision in decisions):  # hidden (privacy.hide_counts) it may have been none
        lines.append(
            "Each client keeps some rows to decide by on what comes back, so Standalone learned from fewer: a part "
            "of the gain can be that."
        )
    if "arrivals" not in summary:  # between machines the table of uploads has them
        unserved = [client for client in summary["clients"] if client not in summary["slm"]["crosslm"]]
        lines += [
            f"{client} is in no figure of CrossLM: it was not served; crosslm status RUN says why."
            for client in unserved
        ]
    lines += [f"{client} did not accept what came back. {why}" for client, why in declined(summary).items()]
    if taught := summary.get("no_say"):
        lines.append(about_no_say(taught, [name for name in summary["slm"]["crosslm"] if name != "mean"]))
    hacking = summary.get("reward_hacking") or {}
    if hacking.get("arrivals") or hacking.get("whole_run"):
        lines.append(
            "The reward rose while the judge's agreement fell (reward hacking): see reward_hacking in summary.json."
        )
    tables = [slm_table(summary)] if measured(summary) else []
    labels = label_table(summary)
    if "arrivals" in summary:
        lines = [about_accuracy(summary), *waited_for(summary), *lines]
        tables.insert(0, uploads_table(summary))
    told = [Text("\n".join(verdicts))] if verdicts else []
    return Group(*tables, *told, *([labels] if labels else []), llm_table(summary), Text("\n".join(lines)))
