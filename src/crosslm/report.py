"""Tables of a run, from its ``summary.json``."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from crosslm.privacy import privacy_line

METHODS = {"standalone": "Standalone", "data_free_kd": "Data-free KD", "crosslm": "CrossLM"}
LLM_MEASURES = {
    "nlu_accuracy": "classifies test text right (NLU, Eq. 1)",
    "nlg_accuracy": "writes to the label, say the clients' SLMs (NLG)",
    "nlg_judge_accuracy": "writes to the label, says an independent judge",
    "distinct_2": "different word pairs among all it writes",
    "perplexity": "perplexity on the given text (lower is better)",
}


def slm_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy of each client's classifier under the three methods, as in the paper's Table 4."""
    table = Table(
        title=f"SLM accuracy on test text · {summary['task']} · preset {summary['preset']}", title_justify="left"
    )
    table.add_column("client")
    for name in METHODS.values():
        table.add_column(name, justify="right")
    table.add_column("gain", justify="right")
    slm = summary["slm"]
    for client in slm["crosslm"]:
        if client == "mean":
            table.add_section()
        values = [slm[method].get(client) for method in METHODS]
        gain = values[-1] - values[0]
        table.add_row(client, *(f"{value:.3f}" for value in values), f"{gain:+.3f}")
    return table


def llm_table(summary: Mapping[str, Any]) -> Table:
    """The LLM before and after, as in the paper's Tables 5, 6 and 8."""
    table = Table(title="LLM", title_justify="left")
    table.add_column("measure")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for key, title in LLM_MEASURES.items():
        before, after = (summary["llm"].get(key, {}).get(moment) for moment in ("before", "after"))
        if before is not None and after is not None:
            digits = 2 if key == "perplexity" else 3
            table.add_row(title, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}")
    return table


def closing(summary: Mapping[str, Any]) -> Group:
    """Everything that a run ends with."""
    seconds = summary["seconds"]
    slowest = sorted((name for name in seconds if name != "total"), key=lambda name: -seconds[name])[:4]
    stages = ", ".join(f"{name} {seconds[name] / 60:.1f}" for name in slowest)
    rows = set(summary["test_rows"].values())
    lines = [
        f"Test rows: {', '.join(map(str, sorted(rows)))}; one seed ({summary['seed']}): "
        "differences of a few points are noise.",
        f"Time {seconds['total'] / 60:.1f} min (of these {stages}), "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"{summary['tokens_generated']:,} tokens generated.",
        privacy_line(summary),
    ]
    hacking = summary.get("reward_hacking") or {}
    if hacking.get("arrivals") or hacking.get("whole_run"):
        lines.append(
            "The reward rose while the judge's agreement fell (reward hacking): see reward_hacking in summary.json."
        )
    return Group(slm_table(summary), llm_table(summary), Text("\n".join(lines)))
