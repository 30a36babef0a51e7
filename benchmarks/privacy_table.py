"""The table of docs/privacy.md: what DP costs and brings, and whether that meets the goal."""

from typing import Any

GOAL_EPSILON, GOAL_AUC, GOAL_POINTS = "8", 0.55, 3.0
HEAD = "| rows | epsilon | seeds | accuracy | AUC, loss | AUC, calibrated | TPR, loss | TPR, calibrated | exposure |"
Cells = dict[str, dict[str, Any]]


def ranged(values: list[float], interval: list[float] | None = None) -> str:
    """The mean, and from where to where the values, or the interval, go."""
    low, high = interval or (min(values), max(values))
    return f"{mean(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if low < high else "")


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def privacy_table(cells: Cells) -> str:
    """Accuracy, attacks and canaries without DP and under each budget, the mean over seeds (lowest to highest).

    Args:
        cells: by ``rows/budget/seed``.
    """
    groups = sorted({(int(rows), budget) for rows, budget, _ in (key.split("/") for key in cells)}, key=_order)
    lines = [
        "SST-2, one silo; mean over the seeds and, after it, lowest to highest (for one seed the bootstrap's 95 % "
        "interval). Membership inference by the loss and by the calibrated loss, against the test rows; TPR is the "
        "true-positive rate at 1 % false positives. Exposure of canaries in the SLM in bits, among "
        "255 others (not learned: 1.44; most that can be seen: 8; `crosslm audit` takes 1,023 others and sees 10).",
        "",
        HEAD,
        "| --- " * HEAD.count(" | ") + "| --- |",
        *(_row(rows, budget, of(cells, rows, budget)) for rows, budget in groups),
        "",
    ]
    for rows in sorted({rows for rows, _ in groups}):
        lines += [_measured(cells, rows), "", verdict(cells, rows), ""]
    return "\n".join([*lines, "`python benchmarks/privacy.py DATA` measures again."])


def of(cells: Cells, rows: int, budget: str) -> list[dict[str, Any]]:
    """The cells of so many rows under this budget, one a seed."""
    return [cell for key, cell in cells.items() if key.split("/")[:2] == [str(rows), budget]]


def verdict(cells: Cells, rows: int) -> str:
    """The goal, and whether the figures meet it."""
    goal = (
        f"The goal is an AUC of at most {GOAL_AUC} at epsilon {GOAL_EPSILON} for at most {GOAL_POINTS:g} points of "
        f"accuracy. With {rows} rows"
    )
    with_dp, without = of(cells, rows, GOAL_EPSILON), of(cells, rows, "none")
    if not with_dp or not without:
        return f"{goal} that has not been measured."
    aucs = {name: mean([cell["attacks"][name]["auc"] for cell in with_dp]) for name in ("loss", "calibrated")}
    attack, auc = max(aucs.items(), key=lambda item: item[1])
    lost = 100 * (mean([cell["accuracy"] for cell in without]) - mean([cell["accuracy"] for cell in with_dp]))
    hidden, cheap = auc <= GOAL_AUC, lost <= GOAL_POINTS
    found = (
        f"the better attack ({attack}) has a mean AUC of {auc:.3f} ({'met' if hidden else 'missed'}) and DP costs "
        f"{lost:.1f} points ({'met' if cheap else 'missed'})"
    )
    return f"{goal} {found}: the goal is {'met' if hidden and cheap else 'not met'}."


def _order(group: tuple[int, str]) -> tuple[int, float]:
    rows, budget = group
    return rows, -float("inf") if budget == "none" else -float(budget)


def _row(rows: int, budget: str, found: list[dict[str, Any]]) -> str:
    bound = None if budget == "none" else max(cell["epsilon"] for cell in found)
    shown = [str(rows), "no DP" if bound is None else f"{bound:.2f}", str(len(found))]
    shown.append(ranged([cell["accuracy"] for cell in found]))
    for figure in ("auc", "tpr"):
        for attack in ("loss", "calibrated"):
            attacks = [cell["attacks"][attack] for cell in found]
            interval = attacks[0][f"{figure}_interval"] if len(found) == 1 else None
            shown.append(ranged([it[figure] for it in attacks], interval))
    return f"| {' | '.join(shown)} | {mean([bits for cell in found for bits in cell['exposure']]):.2f} |"


def _measured(cells: Cells, rows: int) -> str:
    """How, where and when the cells of so many rows were measured, by what they remember.

    Raises:
        SystemExit: they were not measured alike.
    """
    mine = {key: cell for key, cell in cells.items() if key.startswith(f"{rows}/")}
    ways = {}
    for key, cell in mine.items():
        ways.setdefault("Without DP" if "/none/" in key else "With DP", []).append(cell["settings"])
    if len({cell["commit"] for cell in mine.values()}) > 1 or any(
        one != found[0] for found in ways.values() for one in found
    ):
        raise SystemExit(f"the cells of {rows} rows were measured at several commits or with several settings")
    told = [f"{name}: {_way(found[0])}" for name, found in sorted(ways.items(), reverse=True)]
    commit, machine = next((cell["commit"], cell["machine"]) for cell in mine.values())
    dates = sorted({cell["date"] for cell in mine.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    settings = next(iter(ways.values()))[0]
    reads = {"mean": "the mean of the tokens", None: "the first token"}[settings["pooling"]]
    return (
        f"{rows} rows: `{settings['model']}`, whose head reads {reads}, with frozen embeddings, "
        f"{settings['test_rows']} test rows; {settings['canaries']} planted canaries are trained on beside them in all "
        f"cells. {'. '.join(told)}. The attacker's reference model is "
        f"{settings['reference']}. Commit "
        f"`{commit[:10]}{'+changes' if commit.endswith('+changes') else ''}`, {when}, {machine}."
    )


def _way(settings: dict[str, Any]) -> str:
    fit, privacy = settings["fit"], settings["privacy"]
    told = f"{fit['epochs']} epochs, batches of {fit['batch_size']}, learning rate {fit['learning_rate']:g}"
    if privacy is None:
        return f"all layers, {told}"
    layers = "the head alone" if privacy["trained_layers"] == 0 else f"{privacy['trained_layers']} layers"
    centred = "centred" if privacy["center"] else "not centred"
    return f"{layers}, {centred}, {told}, clip {privacy['clip']:g}, chosen on validation rows"
