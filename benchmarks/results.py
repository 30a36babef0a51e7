"""Keep a run's figures as small JSON, and write the tables of the documents from what is kept.

python benchmarks/results.py record RUN NAME   # benchmarks/results/NAME.json
python benchmarks/results.py collect FOLDER    # the tables of `crosslm reproduce`; FOLDER is its OUTPUT/test
python benchmarks/results.py render            # docs/results.md, docs/earlier_results.md, the table in README.md
"""

import argparse
import io
import json
import math
import shutil
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from attack_table import attack_tables
from in_short import crosslm_mean, in_short, who
from logistic_table import logistic_means, logistic_section
from performance_table import performance
from privacy_table import privacy_table

from crosslm.config import PRESETS
from crosslm.html_report.collect import RunView
from crosslm.html_report.plots import accuracy_chart, llm_chart
from crosslm.reproduce.markdown import markdown, markdown_table
from crosslm.reproduce.plan import leaves, slug
from crosslm.runs.report import llm_table, slm_table
from crosslm.support.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "plots"
START, END = "<!-- demo table, written by benchmarks/results.py -->", "<!-- end of demo table -->"
TIME_START, TIME_END = "<!-- demo time, written by benchmarks/results.py -->", "<!-- end of demo time -->"
HEADLINE_START, HEADLINE_END = "<!-- headline, written by benchmarks/results.py -->", "<!-- end of headline -->"
PRIVACY_START, PRIVACY_END = "<!-- privacy table, written by benchmarks/results.py -->", "<!-- end of privacy table -->"
SET_BACK_START, SET_BACK_END = "<!-- fields, written by benchmarks/results.py -->", "<!-- end of fields -->"
ATTACKS_START, ATTACKS_END = "<!-- attack table, written by benchmarks/results.py -->", "<!-- end of attack table -->"


def keep(name: str, figures: dict) -> None:
    """Write one result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def record(run: Path, name: str, commit: str | None) -> None:
    """Keep a run's summary and its steps."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, closing = ([event for event in events if event["event"] == kind] for kind in ("step", "closing"))
    origin = provenance() | ({"commit": commit} if commit else {})
    kept = {**origin, "summary": json.loads((run / "summary.json").read_text()), "steps": steps}
    keep(name, kept | ({"closing": closing} if closing else {}))


def collect(folder: Path, results: Path = RESULTS, plots: Path = PLOTS) -> None:
    """Keep the tables, headline figures and plots of `crosslm reproduce`.

    Raises:
        SystemExit: they are of the validation split, which is for tuning.
    """
    report = json.loads((folder / "tables.json").read_text())
    if report["split"] != "test":
        raise SystemExit(f"{folder}: figures of the {report['split']} split are not results")
    for name, kept in (("tables.json", "reproduce.json"), ("headline.json", "headline.json")):
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, results / kept)
    made = sorted(folder.glob("plots/*.svg"))
    if made:  # of an earlier preset or scale, say
        for old in plots.glob("*.svg"):
            old.unlink()
    for plot in made:
        plots.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plot, plots / plot.name)


def reproduction_section(report: dict, plots: list[str]) -> list[str]:
    """The paper's tables, ours beside the paper's figures, and the plots."""
    lines = ["## The paper's tables", "", "By `crosslm reproduce`. What has not been run is left out.", ""]
    return [*lines, *markdown(report), *(line for name in plots for line in (f"![{name}](plots/{name}.svg)", ""))]


EARLIER = (
    *(f"reproduce-whole-change-{table}" for table in (5, 6, 7, 8)),
    "reproduce-at-once",
    "reproduce-intended-labels",
    "reproduce-intended-labels-skew",
    "reproduce-judges-alone",
)


def earlier_section(kept: dict) -> list[str]:
    """A table of `crosslm reproduce` under a preset as it was before."""
    origin = kept["origin"]
    return [
        *markdown_table(kept["table"]),
        f"Commits {', '.join(f'`{commit[:10]}`' for commit in origin['commits'])}, {', '.join(origin['dates'])}, "
        f"{'; '.join(origin['machines'])}.",
        "",
    ]


def as_text(result: dict) -> str:
    """A run's two tables as they stand at its end."""
    console = Console(file=io.StringIO(), width=90, color_system=None)
    console.print(slm_table(result["summary"]))
    console.print(llm_table(result["summary"]))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def run_section(name: str, result: dict) -> list[str]:
    """One run."""
    summary = result["summary"]
    minutes, peak = summary["seconds"]["total"] / 60, summary["peak_memory_bytes"] / 2**30
    lines = [
        f"### {name}",
        "",
        f"One seed ({summary['seed']}), {max(summary['test_rows'].values())} test rows a client; "
        f"the judge is right on {summary['judge_accuracy']:.3f} of them. Commit `{result['commit'][:10]}`, "
        f"{result['date']}, {result['machine']}; {minutes:.0f} min, peak {peak:.1f} GiB, "
        f"{summary['tokens_generated']:,} tokens generated, LLM in {summary.get('llm_dtype', 'float32')}.",
        "",
        "```text",
        as_text(result),
        "```",
        "",
        "| arrival | client | mean reward of its pool | judge, pool | judge, selected | selected |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for step in result["steps"]:
        lines.append(
            f"| {step['step']} | {step['client']} | {step['reward/pool']:+.2f} | {step['judge/pool']:.3f} "
            f"| {step['judge/selected']:.3f} | {step['selected']:.0f} |"
        )
    return [*lines, ""]


CLOSING = {
    "closing-sst2": "SST-2",
    "closing-imdb": "IMDb",
    "closing-ag_news": "AG News",
    "closing-yahoo_answers": "Yahoo! Answers",
    "closing-sst2-float32": "SST-2 on another machine, with the LLM in float32",
    "closing-ag_news-float32": "AG News on another machine, with the LLM in float32",
}
ONE_LABEL = "one-label-before-"
WEIGHED = "weighed-"
WEIGHED_BASE = "weighed-base-"
METHODS = ("data_free_kd", "crosslm")
TASKS = {"sst2": "SST-2", "imdb": "IMDb", "ag_news": "AG News", "yahoo_answers": "Yahoo! Answers"}
HOW_CLOSED = (
    "Preset recommended with seed 0, on test rows; the first three are runs of Table 4, and that of Yahoo! Answers is "
    "an earlier one, in which Data-free KD counts with what it made at once for a client that did not take CrossLM's. "
    "The same judges teach Data-free KD each time."
)
EARLIER_CLOSING = {"closing-yahoo_answers-earlier": "Yahoo! Answers"}
HOW_CLOSED_EARLIER = (
    "Preset recommended with a pool of 256 texts and `federation.closing`, on validation rows, with the step 5 of "
    "Yahoo! Answers as it was then; one run each (`crosslm run TASK --set data.test=validation.csv "
    "--set selection.pool=256 --set federation.closing=true --set data.test_rows=600 --set data.judge_rows=500`, and "
    "fewer rows for the LLM's own measures)."
)


def closing_section(names: dict[str, str], how: str, loaded: dict[str, dict]) -> list[str]:
    """What all were taught once more in the end, beside what each had got at once."""
    lines = [
        "### Once more in the end (`federation.closing`)",
        "",
        f"{how} *At once* is what came back when the client arrived, *in the end* what it has after all have arrived.",
        "",
    ]
    columns = (
        "Standalone",
        "Data-free KD, at once",
        "CrossLM, at once",
        "Data-free KD, in the end",
        "CrossLM, in the end",
    )
    known = {name: closing_rows(loaded[name]) for name in names if name in loaded}
    lines += [f"| mean of the clients | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {names[name]} | {in_cells(means_of(rows))} |" for name, rows in known.items()]
    for name, rows in known.items():
        result, summary = loaded[name], loaded[name]["summary"]
        lines += [
            "",
            f"{names[name]}, seed {summary['seed']}, {max(summary['test_rows'].values())} rows; commit "
            f"`{result['commit'][:10]}`, {result['date']}, {result['machine']}.",
            "",
            f"| arrival | client | {' | '.join(columns)} |",
            f"| --- | --- |{' ---: |' * len(columns)}",
        ]
        lines += [f"| {number} | {client} | {in_cells(row)} |" for (number, client), row in rows.items()]
        lines.append(f"| | mean | {in_cells(means_of(rows))} |")
    return [*lines, ""]


def one_label_section(loaded: dict[str, dict]) -> list[str]:
    """What silos of one label get at Dirichlet 0.1, with a new output layer and without."""
    lines = [
        "### Silos of one label (`gate.new_head`)",
        "",
        "Dirichlet 0.1, seed 0, preset recommended, on test rows: the run of the table of label skew, and before it "
        "the same where step 5 began with the output layer that came and went on for three epochs, on the same texts.",
        "",
        "| task, client | Standalone | Data-free KD, as it came | CrossLM, as it came | Data-free KD, new layer | "
        "CrossLM, new layer | ceiling |",
        "| --- |" + " ---: |" * 6,
    ]
    notes = []
    for name, before in loaded.items():
        task = name.removeprefix(ONE_LABEL)
        cells = RESULTS / "reproduce" / "test" / "cells" / task
        now = json.loads((cells / "recommended" / "alpha-0.1" / "seed-0" / "run.json").read_text())
        assert now["settings"]["config"]["gate"]["new_head"], "this cell is not of the other side of the table"
        ceiling = json.loads((cells / "ceiling" / "alpha-0.1" / "seed-0" / "ceiling.json").read_text())["figures"]
        then, slm = before["summary"]["slm"], now["figures"]["slm"]
        for client in [*sorted(set(slm["standalone"]) - {"mean"}), "mean"]:
            methods = [slm["standalone"], *(which[method] for which in (then, slm) for method in METHODS)]
            right = [
                digits.count("1") / len(digits) for who, digits in ceiling["correct"].items() if client in (who, "mean")
            ]
            shown = in_cells([*(method[client] for method in methods), sum(right) / len(right)])
            lines.append(f"| {TASKS[task]}, {client} | {shown} |")
        notes.append(
            f"{TASKS[task]}: `{before['commit'][:10]}`, `{now['commit'][:10]}`, {now['date']}, {now['machine']}."
        )
    return [*lines, "", *notes, ""]


def weighed_section(loaded: dict[str, dict]) -> list[str]:
    """What silos get where classifiers and LLM count alike, and where they are weighed."""
    lines = [
        "Preset recommended on test rows: the run of the tables above, and the same with `slm.weigh_judges`, on the "
        "same uploads and texts (of SST-2 with seed 2 the texts are those of another run).",
        "",
        "| run, client | Standalone | Data-free KD, alike | CrossLM, alike | Data-free KD, weighed | "
        "CrossLM, weighed |",
        "| --- |" + " ---: |" * 5,
    ]
    notes, gains = [], []
    for name, weighed in loaded.items():
        is_base = name.startswith(WEIGHED_BASE)
        task, seed, alpha = weighed["task"], weighed["seed"], weighed["settings"]["config"]["data"]["alpha"]
        place = Path(task, "recommended", "base" if is_base else f"alpha-{alpha:g}", f"seed-{seed}", "run.json")
        alike = json.loads((RESULTS / "reproduce" / "test" / "cells" / place).read_text())
        judges = [each["settings"]["config"]["slm"].get("weigh_judges", False) for each in (alike, weighed)]
        assert judges == [False, True], "these are not the two sides of the table"
        one, other = (each["figures"]["slm"] for each in (alike, weighed))
        run = f"{TASKS[task]}, Dirichlet {alpha:g}, seed {seed}"
        for client in ["mean"] if is_base else [*sorted(set(one["standalone"]) - {"mean"}), "mean"]:
            methods = [one["standalone"], *(which[method] for which in (one, other) for method in METHODS)]
            lines.append(f"| {run}, {client} | {in_cells([method[client] for method in methods])} |")
        if is_base:
            gains.append([100 * (other[method]["mean"] - one[method]["mean"]) for method in METHODS])
        origin = f"`{alike['commit'][:10]}`, `{weighed['commit'][:10]}`"
        notes.append(f"{run}: {origin}, {weighed['date']}, {weighed['machine']}.")
    if gains:
        kd, ours = (sum(column) / len(gains) for column in zip(*gains, strict=True))
        lines.insert(
            1,
            f"In the mean of the {len(gains)} runs above Dirichlet 0.1 weighing brings Data-free KD {kd:+.1f} points "
            f"and CrossLM {ours:+.1f}.",
        )
    return [*lines, "", *notes, ""]


def closing_rows(result: dict) -> dict[tuple[int, str], list[float]]:
    """By arrival and client the figures of a run's closing table."""
    closing = {event["client"]: event for event in result["closing"]}
    rows = {}
    for step in result["steps"]:
        end = closing[step["client"]]
        at_once = [step.get(f"slm/{method}", math.nan) for method in ("standalone", "data_free_kd", "accuracy")]
        taken = "" if end["accepted"] else " (not taken)"
        rows[step["step"], step["client"] + taken] = [*at_once, end["slm/data_free_kd"], end["slm/crosslm"]]
    return rows


def means_of(rows: dict[tuple[int, str], list[float]]) -> list[float]:
    """The mean of each column."""
    return [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]


def texts_section(results: list[dict]) -> list[str]:
    """What benchmarks/step_5_texts.py measured."""
    lines = [
        "### Which texts step 5 learns from, and how long",
        "",
        "In the end of a run under preset recommended, on validation rows; each upload is trained once on each kind of "
        "texts, in each way that is named (`benchmarks/step_5_texts.py`). All classifiers judge, with the LLM that is "
        "named. The texts are as many in every row that does not say otherwise; half of each is what "
        "`federation.closing` takes in the end. The one between is the LLM with the share of what it has learned that "
        "is named.",
        "",
    ]
    for result in results:
        clients = result["clients"]
        found = "; ".join(f"{name} {share:.3f}" for name, share in result["agreement"].items())
        between = f", a share of {result['share']:g}" if "the one between" in found else ""
        lines += [
            f"**{result['task']}**{' with `slm.weigh_judges`' * result['weigh_judges']}, seed {result['seed']}, "
            f"{result['rows']} rows of `{result['test']}`, pools of "
            f"{result['pool']}{between}; commit `{result['commit'][:10]}`, {result['date']}, "
            f"{result['machine']}. Texts of which the judges find the label that the independent judge finds: {found}.",
            "",
            f"| texts | {' | '.join([*clients, 'mean'])} |",
            f"| --- |{' ---: |' * (len(clients) + 1)}",
        ]
        for name in next(iter(clients.values())):
            values = [row[name] for row in clients.values()]
            lines.append(f"| {name} | {in_cells([*values, sum(values) / len(values)])} |")
        lines.append("")
    return lines


def in_cells(values: list[float]) -> str:
    """Figures as cells of a table."""
    return " | ".join("–" if math.isnan(value) else f"{value:.3f}" for value in values)


def step_5_table(result: dict, preset: str) -> list[str]:
    """What each client's SLM gains by each variant of step 5."""
    clients = list(result["selection"])
    lines = [
        f"| what differs from preset {preset} | " + " | ".join(clients) + " | mean | judge, selected | selected |",
        "| --- |" + " --- |" * (len(clients) + 3),
    ]
    for variant in next(iter(result["selection"].values()))["variants"]:
        rows = [result["selection"][client]["variants"][variant] for client in clients]
        values = [row["accuracy"] for row in rows]
        judged = sum(row["judge"] for row in rows) / len(rows)
        cells = " | ".join(f"{value:.3f}" for value in values)
        selected = " + ".join(str(row["selected"]) for row in rows)
        lines.append(f"| {variant} | {cells} | {sum(values) / len(values):.3f} | {judged:.3f} | {selected} |")
    standalone = [result["selection"][client]["standalone"] for client in clients]
    cells = " | ".join(f"{value:.3f}" for value in standalone)
    lines += [f"| before (Standalone) | {cells} | {sum(standalone) / len(standalone):.3f} | | |", ""]
    return lines


def choices_section(result: dict) -> list[str]:
    """The measurements behind the presets."""
    lines = [
        "### What each field of the presets does (SST-2)",
        "",
        f"Commit `{result['commit'][:10]}`, {result['date']}, {result['machine']}. One seed.",
        "",
        "**Selection and reward (step 5).** The same uploaded SLMs and the same pools (from the run with the paper's "
        "preset); only what is selected differs. Accuracy of each client's SLM on the test rows after training on "
        "it, and "
        "the judge's agreement with the labels of the selected texts.",
        "",
    ]
    return [*lines, *step_5_table(result, "paper"), *step_4_table(result, "paper")]


def step_4_table(result: dict, preset: str) -> list[str]:
    """What the LLM comes to by each variant of step 4."""
    if not result["update"]:
        return []
    arrivals = len(next(iter(result["update"].values()))["arrivals"])
    lines = [
        f"**Reward and loss (step 4).** The original LLM trained once through the same {arrivals} arrivals, without "
        "step 5; then what it writes and how it classifies.",
        "",
        f"| what differs from preset {preset} | NLG (judge), each arrival | distinct-2 | NLU | perplexity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["update"].items():
        judged = " / ".join(f"{arrival['judge']:.3f}" for arrival in row["arrivals"])
        perplexity = f"{row['perplexity']:.1f}" if "perplexity" in row else ""
        distinct = row["arrivals"][-1]["distinct_2"]
        lines.append(f"| {name} | {judged} | {distinct:.3f} | {row['nlu']:.3f} | {perplexity} |")
    return [*lines, ""]


def judges_section(results: list[dict]) -> list[str]:
    """What benchmarks/judges.py measured."""
    first = results[0]
    lines = [
        "### How much the SLMs' judgement and the LLM's count (`slm.weigh_judges`)",
        "",
        "What step 5 would have an SLM learn, if the LLM wrote the validation rows of the task: on which share of them "
        "so many of the four SLMs, with the LLM beside them, find the label. Of one SLM and of two the mean over all "
        f"choices, and the worst. Uploads and LLMs of runs with seed {first['seed']} under preset recommended, which "
        "`slm.weigh_judges` changes nothing of; the weights from texts of the original LLM. "
        f"`benchmarks/judges.py`, commit `{first['commit'][:10]}`, {first['date']}, {first['machine']}.",
        "",
        "| | LLM | LLM alone | SLMs | SLMs alone | alike | weighed | alike, worst | weighed, worst |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    columns = ("SLMs alone", "alike", "weighed", "alike, worst", "weighed, worst")
    for result in results:
        for llm, found in result["figures"].items():
            for count, row in found.items():
                if count != "LLM alone":
                    figures = " | ".join(f"{row[name]:.3f}" for name in columns)
                    lines.append(f"| {result['task']} | {llm} | {found['LLM alone']:.3f} | {count} | {figures} |")
    return [*lines, ""]


def rewards_section(results: list[dict]) -> list[str]:
    """What benchmarks/rewards.py measured."""
    lines = [
        "### Who judges what the LLM learns (`reward.llm_judges`)",
        "",
        "Steps 1 to 4 under preset recommended with `slm.weigh_judges`, on validation rows. Right: on which share of "
        "the texts that the LLM learned from the sign of the reward is as the independent judge has it, by arrival. Of "
        "the LLM in the end, with a share of what it has learned: Eq. 1, how often the judge finds the label in what "
        "it writes, distinct-2, and the perplexity on the validation part of the Penn Treebank "
        "(`benchmarks/rewards.py`).",
        "",
        "| task, Dirichlet alpha | judges | right | share | Eq. 1 | judge | distinct-2 | perplexity |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    notes = []
    for result in results:
        task = f"{TASKS[result['task']]}, {result['alpha']:g}"
        rows = [("nobody: as it was", "", "", result["original"])]
        for judges, found in result["variants"].items():
            right = " / ".join(f"{arrival['right']:.3f}" for arrival in found["arrivals"])
            rows += [(judges, right, share, figures) for share, figures in found["shares"].items()]
        for judges, right, share, figures in rows:
            cells = f"{figures['nlu']:.3f} | {figures['judge']:.3f} | {figures['distinct_2']:.3f}"
            lines.append(f"| {task} | {judges} | {right} | {share} | {cells} | {figures['perplexity']:.1f} |")
        origin = f"`{result['commit'][:10]}`, {result['date']}, {result['machine']}"
        notes.append(f"{task}: seed {result['seed']}, {origin}.")
    return [*lines, "", *notes, ""]


def interpolation_section(results: list[dict]) -> list[str]:
    """What benchmarks/interpolation.py measured."""
    first = results[0]
    lines = [
        "### How much of what the LLM learned it keeps (`llm.interpolation`)",
        "",
        f"The LLM that the runs of seed {first['seed']} ended with under preset recommended without it, on validation "
        "rows. Share 0 is the original LLM, 1 the LLM as trained. Eq. 1: accuracy on at most 400 rows; judge: share of "
        "256 texts that fit their label by the independent judge; perplexity: on the validation part of the Penn "
        f"Treebank. Commit `{first['commit'][:10]}`, {first['date']}, {first['machine']}.",
        "",
        "| | share | Eq. 1 | judge | distinct-2 | perplexity | its growth, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = ("nlu", "judge", "distinct_2", "perplexity")
    means = {
        share: {key: sum(result["shares"][share][key] for result in results) / len(results) for key in keys}
        for share in first["shares"]
    }
    for task, shares in [*((result["task"], result["shares"]) for result in results), ("mean", means)]:
        for share, row in shares.items():
            growth = 100 * (row["perplexity"] / shares["0"]["perplexity"] - 1)
            figures = f"{row['nlu']:.3f} | {row['judge']:.3f} | {row['distinct_2']:.3f} | {row['perplexity']:.1f}"
            lines.append(f"| {task} | {share} | {figures} | {growth:+.1f} |")
    return [*lines, ""]


def recommended_choices_section(results: dict[str, dict]) -> list[str]:
    """Fields under preset recommended."""
    lines = [
        "### What single fields do under preset recommended",
        "",
        "The same uploaded SLMs, from a run with the preset. Of step 5 on the same pools: accuracy of each "
        "client's SLM on the rows that are named.",
        "",
    ]
    for result in results.values():
        file, rows = result["rows"]
        selection = result["selection"]
        is_earlier = bool(selection) and "llm_judges = false" not in next(iter(selection.values()))["variants"]
        then = " The preset had `slm.intended_labels` then, in place of `slm.llm_judges`." if is_earlier else ""
        lines += [
            f"**{result['task']}**, {rows} rows of `{file}`. Commit `{result['commit'][:10]}`, {result['date']}, "
            f"{result['machine']}. One seed; the LLM as trained, without `llm.interpolation`.{then}",
            "",
            *(step_5_table(result, "recommended") if selection else []),
            *step_4_table(result, "recommended"),
        ]
    return lines


def teacher_section(result: dict) -> list[str]:
    """What benchmarks/llm_teacher.py measured."""
    lines = [
        "### The demo's LLM as a classifier and as a teacher",
        "",
        f"Accuracy on {result['rows']} sentences that are in no file of the demo. `benchmarks/llm_teacher.py` on a "
        f"demo of commit `{result['run_commit'][:10]}`, seed {result['seed']}; commit `{result['commit'][:10]}`, "
        f"{result['date']}, {result['machine']}. Calibrated: the mean of the LLM's log-probabilities over texts that "
        "it wrote itself is taken off.",
        "",
        "| LLM | Eq. 1 | Eq. 1, calibrated |",
        "| --- | --- | --- |",
        *(f"| {name} | {row['plain']:.3f} | {row['calibrated']:.3f} |" for name, row in result["classifier"].items()),
        "",
        "Step 5 with the soft labels of one or the other, from the same uploads and on the same texts; clients in "
        "their order of arrival:",
        "",
    ]
    clients = result["teacher"]
    lines += ["| soft labels of | " + " | ".join([*clients, "mean"]) + " |", "| --- |" + " --- |" * (len(clients) + 1)]
    for name in next(iter(clients.values())):
        values = [row[name] for row in clients.values()]
        cells = " | ".join(f"{value:.3f}" for value in [*values, sum(values) / len(values)])
        lines.append(f"| {'nobody (before step 5)' if name == 'before' else name} | {cells} |")
    return [*lines, ""]


NAMES = {
    "demo-avx2": "The demo",
    "demo-as-init": "The demo with classifiers as `crosslm init` writes them, with pools of 384 texts, before step 3 "
    "wrote spare texts",
    "sst2-paper": "SST-2, preset paper",
    "sst2-one-client-balanced-paper": "SST-2, one client of 200 rows, about as many of each label, 256 texts to learn "
    "from, a pool of 1,024, preset paper",
    "sst2-one-client-balanced": "The same client, preset recommended",
    "sst2-one-client-whole-way": "The same run, gone on with after its last arrival with the LLM as it has become, not "
    "taken back (`llm.interpolation = 1`)",
    "sst2-one-client": "SST-2, one client of 200 rows whose classifier finds one label in nearly all, 256 texts to "
    "learn from, a pool of 1,024, preset recommended",
}
EARLIER_NAMES = {
    "demo": "The demo on a processor that multiplies in bfloat16, before step 3 wrote spare texts and with pools of "
    "384 texts at each arrival, twice as many as now (the tree was not as committed: its changes are in `3e0bb5109f`)",
    "demo-avx2-no-spares": "The demo without bfloat16, before step 3 wrote spare texts",
    "demo-at-once": "The demo without `federation.closing`, with pools of 512 texts",
    "demo-float32": "The demo with the LLM in float32, beside other work, so that its minutes say nothing",
    "demo-llm-judges": "The demo with `slm.llm_judges`, as preset recommended has it",
    "demo-intended-labels": "The demo with `slm.intended_labels` in the preset, in place of `slm.llm_judges`",
    "demo-judges-alone": "The demo before `slm.intended_labels` was in the preset, and with `slm.interpolation = 0.7`",
    "demo-before-anchors": "The same with the same seed and another rounding in the LLM's update (the version before)",
    "demo-mean-pooling": 'The same with `pooling = "mean"` for all four clients',
    "demo-whole-vocabulary": "The same on the whole vocabulary (`llm.vocabulary_texts = []`)",
    "demo-no-floor": "The demo before `llm.generation_floor` was in the preset",
    "demo-one-teacher": "The demo before `reward.teachers` and `slm.soft_labels` were in the preset, on 400 test rows",
    "demo-100-rows": "The same with half as many rows a silo (rows_per_client = 100, 16 epochs on them)",
    "demo-other-wording": "The same with M(x) and M'(y) as the text, a line break and `Sentiment: ...`",
    "sst2-recommended": "SST-2, preset recommended before `slm.intended_labels` was in it",
    "sst2-no-floor": "SST-2, preset recommended before `llm.generation_floor` was in it",
    "sst2-one-teacher": "SST-2, preset recommended before `reward.teachers` and `slm.soft_labels` were in it",
    "sst2-one-client-paper": "SST-2, one client of 200 rows, 256 texts to learn from, a pool of 1,024, preset paper",
    "sst2-one-client-recommended": "SST-2, the same, preset recommended before `slm.intended_labels` was in it",
}


# the colours that the report's page gives its charts
COLOURS = "--ink: {}; --grid: {}; --series-1: {}; --series-2: {}; --series-3: {}; background: {}"
LIGHT = COLOURS.format("#1b1f27", "#c3c8d1", "#5b6472", "#b25000", "#0b57b0", "#ffffff")
DARK = COLOURS.format("#e8eaee", "#4c5463", "#a9b1bf", "#ffb169", "#8ab8ff", "#14171c")


def pictures(result: dict) -> dict[Path, str]:
    """The demo's charts, as the report draws them, as files of their own."""
    view = RunView("demo", result["summary"], "", {}, [], [], 0)
    style = f"<style>svg {{{LIGHT}}} @media (prefers-color-scheme: dark) {{svg {{{DARK}}}}}</style>"
    charts = {"accuracy": accuracy_chart(view), "llm": llm_chart(view)}
    return {
        ROOT / "docs" / "images" / f"demo-{name}.svg": chart.svg.replace(' aria-hidden="true"', ' width="460"', 1)
        .replace(">", ">" + style, 1)
        .rstrip()
        + "\n"
        for name, chart in charts.items()
    }


def between(text: str, start: str, table: str, end: str) -> str:
    """The text with this table between its two marks."""
    before, rest = text.split(start)
    return before + start + "\n" + table + end + rest.split(end)[1]


ONE_SEED = (
    "One seed each, unless something else is said, and 200 to 1,000 test rows, so that differences of a few points are "
    "noise. The settings are those of the packaged configurations but for what a title or line says; perplexities do "
    "not compare from section to section, since the text, its length or the vocabulary differ."
)


DEMO = "demo-avx2"
"""The kept run of the demo as it is now."""

HEADLINE = """\
What it brings a classifier depends on how far it is below one that learns from all clients' text together. In points of
accuracy, {distances}.
In the mean of the paper's four datasets (four clients each, small models, preset `recommended`, {seeds}
of the classifiers for each dataset; points of accuracy, with 95 % intervals,
which three seeds make too narrow):

| what changes | points |
| --- | --- |
| a classifier, over what its silo has alone | **{slm_gain_vs_standalone}** |
| a classifier, over what the same judges and the untrained LLM give it (Data-free KD) | {slm_gain_vs_data_free_kd} |
| the LLM, classifying | {nlu_gain} |
| the LLM, writing what fits the label, by a judge that it was not trained by | {nlg_judge_gain} |

The second row is what the LLM's learning from the clients adds to classifiers: {clear}. Of {clients} clients
{losers} end worse, by at most {worst:.1f} points. A logistic regression on
a sentence encoder's vectors, fitted to a silo's own rows, each label counting alike, reaches {balanced:.3f}
in that mean, where CrossLM reaches {crosslm:.3f}: see what you have by `crosslm baseline` first. The price is the LLM's
perplexity on other text, which rises by {growth:.0f} % where it rises most.
[docs/results.md](docs/results.md) has each dataset, the paper's own figures, and where it brings nothing."""


def regression(loaded: dict[str, dict]) -> dict[str, float]:
    """Mean accuracy over the tasks of a logistic regression on each silo's own rows, and where labels count alike."""
    return {which: logistic_means(loaded["logistic"], which)[-1] for which in ("alone", "balanced")}


def headline(loaded: dict[str, dict]) -> str:
    """What preset recommended brings, and whom, for the README."""
    found, tables = loaded["headline"], loaded["reproduce"]["tables"]
    ours = found["recommended"]
    seeds = min(ours["seeds"][name] for name in ("slm_gain_vs_standalone", "slm_gain_vs_data_free_kd"))
    points = {name: f"{ours[name]:+.1f} [{low:+.1f}, {high:+.1f}]" for name, (low, high) in ours["intervals"].items()}
    low, high = ours["intervals"]["slm_gain_vs_data_free_kd"]
    clear = "more than without it" if low > 0 else "less than without it" if high < 0 else "nothing clear"
    told = "at least one seed" if seeds == 1 else f"at least {seeds} seeds"
    return HEADLINE.format_map(
        points
        | who(tables["gains"])
        | regression(loaded)
        | {"seeds": told, "clear": clear, "growth": ours["ptb_growth_percent"], "crosslm": crosslm_mean(tables)}
    )


def demo_time(loaded: dict[str, dict]) -> str:
    """How long the two kept runs of the demo took, in a sentence of the README."""
    fast, slow = (loaded[name]["summary"]["seconds"]["total"] / 60 for name in ("demo", "demo-avx2"))
    return (
        f"The run took {slow:.0f} minutes on two cores that do not multiply in bfloat16. On two that do (AMX or "
        f"AVX512-BF16) an earlier version, which\nwrote more texts, took {fast:.0f}. "
        "[Results](docs/results.md) and [earlier ones](docs/earlier_results.md) name the machines."
    )


def set_back(report: dict) -> str:
    """What each field by which the presets differ does by itself: rows of the ablation, beside the preset run again."""
    start = "SST-2, preset recommended, "
    rows = {row["name"].removeprefix(start): row["cells"] for row in report["tables"]["ablation"]["rows"]}
    preset, lines = rows["the-same-again"], []
    for path in leaves(PRESETS["recommended"]):
        field = ".".join(path)
        named = f"{slug(field)}-"
        cells = next((cells for name, cells in rows.items() if name.startswith(named)), None)
        if cells is None:
            continue
        now, then = ([cell["value"] for cell in found] for found in (cells, preset))
        points = [100 * (now[place] - then[place]) for place in (0, 2, 3)] + [now[5] - then[5]]
        lines.append(f"| `{field}` | " + " | ".join(f"{round(value, 1) + 0.0:+.1f}" for value in points) + " |")
    return "\n".join(
        [
            "Each set back to the paper's value by itself (SST-2, seed 0, one run each): by how many points",
            "the clients' SLMs, the LLM by Eq. 1, the share of its texts that fit their label by the judge, and the",
            "growth of its perplexity then differ from the preset's.",
            "One seed does not tell a point or two from chance.",
            "",
            "| set back | SLMs | LLM, Eq. 1 | LLM, judge | perplexity growth |",
            "| --- | ---: | ---: | ---: | ---: |",
            *lines,
        ]
    )


def results_page(loaded: dict[str, dict]) -> str:
    """What results.md must hold: figures of the presets as they are."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/results.py render` from `benchmarks/results/`; not edited by hand.",
        "Gemma 3 270M as the LLM, MiniLM with 6 and 3 layers as SLMs. What presets and the demo were before is in "
        "[earlier results](earlier_results.md).",
        "",
    ]
    if "reproduce" in loaded and "demo-as-init" in loaded:
        lines += in_short(loaded["reproduce"], loaded["demo-as-init"], regression(loaded))
    lines += remarks("findings") + remarks("trust")
    if "reproduce" in loaded:
        lines += reproduction_section(loaded["reproduce"], sorted(path.stem for path in PLOTS.glob("*.svg")))
        lines += logistic_section(loaded["logistic"], loaded["reproduce"], loaded[DEMO], loaded["demo-as-init"])
    lines += remarks("remarks")
    lines += ["## Single runs and fields", "", ONE_SEED, ""]
    for name, title in NAMES.items():
        if name in loaded:
            lines += run_section(title, loaded[name])
    if not loaded.keys().isdisjoint(CLOSING):
        lines += closing_section(CLOSING, HOW_CLOSED, loaded)
    if before := {name: loaded[name] for name in sorted(loaded) if name.startswith(ONE_LABEL)}:
        lines += one_label_section(before)
    if found := [loaded[name] for name in sorted(loaded) if name.startswith("step-5-texts-")]:
        lines += texts_section(found)
    if found := [loaded[f"judges-{task}"] for task in TASKS if f"judges-{task}" in loaded]:
        lines += judges_section(found)
    if found := {name: result for name, result in loaded.items() if name.startswith(WEIGHED)}:
        lines += weighed_section(found)
    if found := [loaded[name] for name in sorted(loaded) if name.startswith("rewards-")]:
        lines += rewards_section(found)
    if found := [loaded[f"interpolation-{task}"] for task in TASKS if f"interpolation-{task}" in loaded]:
        lines += interpolation_section(found)
    if "preset-choices" in loaded:
        lines += choices_section(loaded["preset-choices"])
    if under := {name: loaded[name] for name in sorted(loaded) if name.startswith("preset-choices-")}:
        lines += recommended_choices_section(under)
    return "\n".join(lines).rstrip() + "\n"


def earlier_page(loaded: dict[str, dict]) -> str:
    """What earlier_results.md must hold: figures of presets as they were, and of variations of their runs."""
    lines = [
        "# Earlier results",
        "",
        "Written by `python benchmarks/results.py render` from `benchmarks/results/`; not edited by hand.",
        "Measured under presets as they were before, or with other settings, and kept because [results](results.md) "
        "draws on them.",
        "",
        "## The paper's tables",
        "",
    ]
    for name in EARLIER:
        if name in loaded:
            lines += earlier_section(loaded[name])
    lines += ["## Single runs", "", ONE_SEED, ""]
    for name, title in EARLIER_NAMES.items():
        if name in loaded:
            lines += run_section(title, loaded[name])
    if not loaded.keys().isdisjoint(EARLIER_CLOSING):
        lines += closing_section(EARLIER_CLOSING, HOW_CLOSED_EARLIER, loaded)
    if "llm-teacher" in loaded:
        lines += teacher_section(loaded["llm-teacher"])
    lines += remarks("earlier-remarks")
    return "\n".join(lines).rstrip() + "\n"


def remarks(name: str) -> list[str]:
    """What is said of the figures by hand, where there is such a file."""
    path = RESULTS / f"{name}.md"
    return [path.read_text().rstrip(), ""] if path.exists() else []


def documents() -> dict[Path, str]:
    """What the documents that have figures must hold."""
    loaded = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    readme = (ROOT / "README.md").read_text()
    table = f"\n```text\n{as_text(loaded[DEMO])}\n```\n" if DEMO in loaded else ""
    readme = between(readme, START, table, END)
    readme = between(readme, TIME_START, f"\n{demo_time(loaded)}\n\n", TIME_END)
    said = headline(loaded)
    readme = between(readme, HEADLINE_START, f"\n{said}\n\n", HEADLINE_END)
    written = {
        ROOT / "docs" / "results.md": results_page(loaded),
        ROOT / "docs" / "earlier_results.md": earlier_page(loaded),
        ROOT / "README.md": readme,
    }
    paper_map = ROOT / "docs" / "paper_map.md"
    fields = f"\n{set_back(loaded['reproduce'])}\n\n"
    written[paper_map] = between(paper_map.read_text(), SET_BACK_START, fields, SET_BACK_END)
    if "privacy-sst2" in loaded:
        privacy = ROOT / "docs" / "privacy.md"
        table = f"\n{privacy_table(loaded['privacy-sst2']['cells'])}\n\n"
        written[privacy] = between(privacy.read_text(), PRIVACY_START, table, PRIVACY_END)
    if attacks := attack_tables(loaded):
        robustness = ROOT / "docs" / "robustness.md"
        written[robustness] = between(robustness.read_text(), ATTACKS_START, f"\n{attacks}\n\n", ATTACKS_END)
    if any(name.startswith("performance-") for name in loaded):
        written[ROOT / "docs" / "performance.md"] = performance(loaded, remarks("performance-remarks"))
    return written | (pictures(loaded[DEMO]) if DEMO in loaded else {})


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("run", type=Path)
    recording.add_argument("name")
    recording.add_argument("--commit", help="the commit that the run was made with, if not HEAD")
    collecting = commands.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    commands.add_parser("render")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.run, arguments.name, arguments.commit)
    elif arguments.command == "collect":
        collect(arguments.folder)
    else:
        for path, text in documents().items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
