"""The table of docs/results.md that puts the classifiers beside a logistic regression on sentence vectors."""

from statistics import fmean
from typing import Any

DEMO = "demo"
ROWS = {
    "Standalone (on all private rows, as under preset paper)": "Standalone (BERT's own head)",
    "preset recommended: Data-free KD": "Data-free KD, preset recommended",
    "preset recommended: CrossLM": "CrossLM, preset recommended",
    "ceiling: one SLM on all clients' text": "ceiling: one SLM on all rows",
}


def logistic_means(kept: dict[str, Any], which: str) -> list[float]:
    """Mean accuracy over clients and seeds of each task, and their average.

    Args:
        kept: what benchmarks/logistic.py wrote.
        which: ``alone``, each client's own rows, ``balanced``, each label alike, or ``together``.
    """
    means = [
        fmean(fmean(client[which] for client in seed.values()) for seed in seeds.values())
        for task, seeds in kept["figures"].items()
        if task != DEMO
    ]
    return [*means, fmean(means)]


def logistic_section(
    kept: dict[str, Any], report: dict[str, Any], demo_run: dict[str, Any], as_init: dict[str, Any]
) -> list[str]:
    """What a silo reaches by itself in a minute, beside what it reaches by CrossLM.

    Args:
        kept: what benchmarks/logistic.py wrote.
        report: the tables of `crosslm reproduce`.
        demo_run: the demo.
        as_init: the demo with classifiers as `crosslm init` writes them.
    """
    columns = report["tables"]["4"]["columns"]
    ours = {row["name"]: row["cells"] for row in report["tables"]["4"]["rows"] if row["by"] == "ours"}
    rows = {
        "**logistic regression, each silo's own rows**": logistic_means(kept, "alone"),
        "the same, each label counts alike": logistic_means(kept, "balanced"),
        **{shown: [cell["value"] for cell in ours[name]] for name, shown in ROWS.items()},
        "logistic regression, all rows": logistic_means(kept, "together"),
    }
    (demo,) = kept["figures"][DEMO].values()
    slm, demo_crosslm = as_init["summary"]["slm"], demo_run["summary"]["slm"]["crosslm"]["mean"]
    alone, even = (fmean(client[which] for client in demo.values()) for which in ("alone", "balanced"))
    return [
        "### Beside a logistic regression",
        "",
        "scikit-learn's logistic regression, with its own settings, on the vectors of the sentence encoder that the "
        "SLMs are made of (MiniLM, frozen): the same private rows, test rows and seeds as in Table 4, no exchange and "
        "no LLM. `python benchmarks/logistic.py`; `crosslm baseline` does it for your rows.",
        "",
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in rows.items()),
        "",
        f"In the demo's silos, where the shares of the labels are nearer to even, it is right on {alone:.3f} by "
        f"each silo's own ({even:.3f} where each label counts alike); the demo's CrossLM on {demo_crosslm:.3f}, "
        f"classifiers as `crosslm init` writes them on {slm['standalone']['mean']:.3f} by themselves "
        f"and on {slm['crosslm']['mean']:.3f} after CrossLM (one run of each).",
        "",
        f"Commit `{kept['commit'][:10]}`, {kept['date']}, {kept['machine']}.",
        "",
    ]
