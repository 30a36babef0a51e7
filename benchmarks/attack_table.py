"""The table of attacks in docs/robustness.md, from what attacks.py has measured."""

import statistics
from typing import Any

NONE = "none"
MEASURES = ("nlg_judge", "nlu", "honest_mean")
WORDS = {
    "flipped": "flipped labels",
    "constant": "constant",
    "random": "random weights",
    "trigger": "trigger word",
    "copy": "copy of another's upload",
}


def attack_tables(loaded: dict[str, dict[str, Any]]) -> str:
    """A table for each result whose name begins with ``attacks-``; nothing if there is none."""
    names = sorted(name for name in loaded if name.startswith("attacks-"))
    return "\n\n".join(attack_table(name.removeprefix("attacks-"), loaded[name]) for name in names)


def attack_table(name: str, result: dict[str, Any]) -> str:
    """What each attack does to a run, with the gate and without, beside the run without the hostile client."""
    cells: dict[str, Any] = result["cells"]
    groups = list(dict.fromkeys(tuple(key.split("/")[:2]) for key in cells))
    none = [cell for key, cell in cells.items() if key.startswith(f"{NONE}/")]
    barred = sum(len(cell.get("honest_quarantined", ())) for cell in cells.values())
    lines = [
        f"**{name}**, preset {result['preset']}: {len(none[0]['honest'])} honest clients and a hostile one, number "
        f"{result['place']} to arrive; means over {_plural(len(none), 'seed')}. In brackets the difference to the run "
        "without the hostile client, in points (with several seeds: lowest to highest). Honest SLMs are tested as "
        f"they return. The gate stopped {_plural(barred, 'honest upload')}.",
        "",
        "| attack | gate | hostile uploads | the same LLM | judge finds the LLM's texts to be of their label | NLU | "
        "honest SLMs, mean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| none: it stays away | | | | {' | '.join(_mean(none, measure) for measure in MEASURES)} |",
    ]
    for attack, gate in groups:
        if attack != NONE:
            found = {key: cell for key, cell in cells.items() if key.split("/")[:2] == [attack, gate]}
            lines.append(f"| {WORDS[attack]} | {gate} | {_row(found, cells)} |")
    commits = sorted({cell.get("commit", result["commit"])[:10] for cell in cells.values()})
    origin = f"Commit `{'`, `'.join(commits)}`, {result['date']}, {result['machine']}."
    return "\n".join([*lines, "", *_trigger(cells), origin])


def _row(found: dict[str, Any], cells: dict[str, Any]) -> str:
    whole = {key: cell for key, cell in found.items() if "error" not in cell}
    uploads = {
        what: sum(cell["uploads"][what] for cell in whole.values()) for what in ("served", "quarantined", "failed")
    }
    said = [f"{count} {what}" for what, count in uploads.items() if count]
    if len(whole) < len(found):
        said.append(_plural(len(found) - len(whole), "run") + " ended by it")
    if not whole:
        return " | ".join([", ".join(said), "", "", "", ""])
    same = sum(
        cell["llm_sha256"] == cells[f"{NONE}/on/{key.split('/')[2]}"]["llm_sha256"] for key, cell in whole.items()
    )
    shown = [f"{_mean(list(whole.values()), measure)} ({_differences(whole, measure)})" for measure in MEASURES]
    return " | ".join([", ".join(said), f"{same} of {len(whole)}", *shown])


def _mean(cells: list[dict[str, Any]], measure: str) -> str:
    return f"{statistics.fmean(cell[measure] for cell in cells):.3f}"


def _differences(cells: dict[str, Any], measure: str) -> str:
    values = [cell["difference"][measure] for cell in cells.values()]
    low, high = min(values), max(values)
    return f"{low:+.1f}" if low == high else f"{low:+.1f} to {high:+.1f}"


def _trigger(cells: dict[str, Any]) -> list[str]:
    """What honest clients' SLMs make of the trigger word."""
    found: dict[str, list[float]] = {}
    for key, cell in cells.items():
        if "trigger_found" in cell:
            found.setdefault("/".join(key.split("/")[:2]), []).append(cell["trigger_found"])
    words = {
        "none/on": "without the attack",
        "trigger/on": "with it and the gate",
        "trigger/off": "with it and no gate",
    }
    shares = [f"{statistics.fmean(values):.3f} {words[group]}" for group, values in found.items()]
    if len(shares) < 2:
        return []
    return [
        "The trigger word in front of test rows of other labels: so many of them get the attacker's label from honest "
        f"clients' SLMs: {', '.join(shares)}.",
        "",
    ]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
