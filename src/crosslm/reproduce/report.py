"""Writing what there is: ``tables.md``, ``tables.json``, ``headline.json`` and ``plots/``."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from crosslm.errors import RunError
from crosslm.models.tokens import MAX_TOKENS
from crosslm.reproduce.figures import Figures
from crosslm.reproduce.headline import headline
from crosslm.reproduce.markdown import markdown
from crosslm.reproduce.origins import Kept, measured_again, not_run, of_two_machines, origin, other_starts
from crosslm.reproduce.plan import BASE, PRESET_NAMES, RUN, RUNS_LLM, TABLES, Choice, may_be_kept
from crosslm.reproduce.plots import arrivals_plot, can_plot, varied_plot
from crosslm.reproduce.store import Store, differences
from crosslm.reproduce.tables import NAMES, all_tables
from crosslm.reproduce.who_gains import who_gains
from crosslm.reproduce.work import settings_of


def write_report(store: Store, choice: Choice, on_news: Callable[[str], None], plots: bool = True) -> dict[str, Any]:
    """Write tables, headline figures and plots of all cells that are there, also those not chosen now.

    Args:
        store: where the cells are.
        choice: scale, split and data; its tables, tasks, seeds and presets do not narrow the report.
        on_news: told what is left out.
        plots: whether to draw.

    Returns:
        What ``tables.json`` holds.
    """
    tasks = tuple(dict.fromkeys((*choice.scale.tasks, *choice.tasks)))
    everything = replace(choice, tables=TABLES, tasks=tasks, presets=PRESET_NAMES, seeds=store.largest_seed() + 1)
    kept = kept_cells(store, everything, on_news)
    figures = Figures(kept)
    tables = all_tables(figures, everything)
    if found := who_gains(figures, everything):
        tables = {"4": tables.pop("4"), "gains": found, **tables}
    for key in tables.keys() & set(TABLES):
        tables[key]["notes"] += [*of_two_machines(kept, key, everything), *not_run(kept, key, everything)]
    if "7" in tables:
        tables["7"]["notes"] += other_starts(kept)
    for key in {"5", "6", "7", "8"} & tables.keys():
        tables[key]["notes"] += measured_again(kept)
    report: dict[str, Any] = {
        "split": choice.split,
        "origin": origin(kept),
        "headline": headline(figures, everything),
        "tables": tables,
        "differs": differs(kept, everything),
        "flagged": flagged(kept),
        "scale": choice.scale.model_dump(mode="json"),
    }
    store.write("tables.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    store.write("headline.json", json.dumps(report["headline"] | {"origin": report["origin"]}, indent=1) + "\n")
    store.write("tables.md", "\n".join(["# Results", "", *markdown(report)]).rstrip() + "\n" if kept else "")
    if plots:
        write_plots(store, figures, report["tables"], everything, on_news)
    return report


def kept_cells(store: Store, choice: Choice, on_news: Callable[[str], None]) -> Kept:
    """All kept cells of a choice that were made with its settings.

    A run that differs in step 5 alone is under ``RUNS_LLM``: its LLM, and the SLMs that came, do not depend on it. One
    that differs in ``llm.interpolation`` alone, on which no SLM depends, is there without its LLM.
    """
    found: Kept = {}
    for cell in may_be_kept(choice):
        try:
            kept = store.read(cell)
        except RunError as error:
            on_news(f"warning: {error}")
            continue
        if kept is None:
            continue
        now, of_llm = settings_of(cell, choice), replace(cell, stage=RUNS_LLM)
        others = differences(cell, kept["settings"], now)
        if not others:
            found[cell] = kept
        elif cell.stage == RUN and others == ["llm.interpolation"]:
            on_news(f"warning: {cell.path} interpolated its LLM otherwise in the end: that LLM is in no table")
            found[cell] = kept | {"figures": without_llm(kept["figures"])}
        elif cell.stage == RUN and not differences(of_llm, kept["settings"], now):
            on_news(f"warning: {cell.path} was made with another step 5: what came back to its clients is in no table")
            found[of_llm] = kept
        else:
            on_news(f"warning: {cell.path} was made with other settings and is left out of the tables")
    return found


def without_llm(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run without those of the LLM that it ended with."""
    correct = {name: rows for name, rows in run["correct"].items() if not name.startswith(("nlu/", "nlg/"))}
    llm = {name: {**found, "after": None} for name, found in run["llm"].items()}
    return {**run, "correct": correct, "llm": llm}


def flagged(kept: Kept) -> list[str]:
    """Runs in which the reward rose while the judge's agreement fell."""
    found = []
    for cell, content in kept.items():
        hacking = content["figures"].get("reward_hacking") if cell.stage in (RUN, RUNS_LLM) else None
        if hacking and (hacking["arrivals"] or hacking["whole_run"]):
            where = [*(f"arrival {step}" for step in hacking["arrivals"])]
            where += ["first to last arrival"] if hacking["whole_run"] else []
            found.append(f"{cell.path.removesuffix(f'/{cell.stage}')} ({', '.join(where)})")
    return found


def differs(kept: Kept, choice: Choice) -> list[str]:
    """What is not as in the paper's section 5, from the settings of the first run that is there."""
    run = next((content for cell, content in kept.items() if cell.stage in (RUN, RUNS_LLM)), None)
    if run is None:
        return []
    config, finetuning = run["settings"]["config"], choice.scale.finetuning
    slms = [
        spec["model"]
        + (f" with {spec['num_hidden_layers']} layers" if "num_hidden_layers" in spec else "")
        + (", mean of its tokens" if "pooling" in spec else "")
        for spec in config["slm"]["models"]
    ]
    trained = "a LoRA adapter" if config["llm"]["adapter"] == "lora" else "all weights"
    return [
        f"LLM: {config['llm']['model']} ({trained}) for GPT2-Large and Llama-7B; "
        f"SLMs: {' and '.join(slms)} for BERT-base and DistilBERT.",
        f"Label skew: Dirichlet with alpha {config['data'].get('alpha')}; the paper does not say which it has.",
        "Data: samples of the datasets, and long texts are cut. " + sizes(kept),
        f"{config['llm']['samples']} texts to learn from an arrival and a pool of {config['selection']['pool']}; "
        "the paper does not say how many.",
        "The judge (Table 6) and the ceiling (Table 4) are not in the paper.",
        f"Table 7: a fresh LoRA adapter that learns the verbalizer's logit, {finetuning.train_rows} rows, "
        f"{finetuning.epochs} epochs, at most {finetuning.test_rows} test rows, the same budget for every start.",
        "Table 8: over the LLM's vocabulary as it was trained, trimmed where `llm.vocabulary_texts` is set; the "
        "treebank's `<unk>` is read as characters, since the LLM has never been trained on a token for it.",
        "Preset recommended: its fields were compared on 400 test rows of SST-2 with one seed "
        "(`benchmarks/preset_choices.py`), so that its figures on SST-2 flatter it; `slm.llm_judges` and "
        "`slm.interpolation` on validation rows of AG News and Yahoo! Answers, step 5's training of Yahoo! Answers, "
        "that all methods have, on validation rows of it (not all of these figures were kept); `llm.interpolation` on "
        "validation rows of all four and of the Penn Treebank, with one seed, after test figures without it had been "
        "seen (`benchmarks/interpolation.py`).",
    ]


def sizes(kept: Kept) -> str:
    """How much of the data each task's runs have, and how much of a text is read."""
    base = [(cell, content) for cell, content in kept.items() if cell.variation.name == BASE]
    runs = {cell.task: content for cell, content in base if cell.stage in (RUN, RUNS_LLM)}
    said = []
    for task, content in runs.items():
        data, measures, slm = (content["settings"]["config"][name] for name in ("data", "evaluation", "slm"))
        said.append(
            f"{NAMES.get(task, task)}: at most {data.get('rows_per_client', 'all')} rows a client, "
            f"{data.get('test_rows', 'all')} test rows, {measures.get('nlu_rows', 'all')} of them for Eq. 1, "
            f"{measures['nlg_samples']} texts for Table 6, {measures['perplexity_tokens']} tokens for Table 8; "
            f"an SLM reads {slm['max_length']} tokens of a text, the LLM {MAX_TOKENS}"
        )
    return ". ".join(said) + "."


def write_plots(
    store: Store, figures: Figures, tables: Mapping[str, Any], choice: Choice, on_news: Callable[[str], None]
) -> None:
    """An SVG for each task (arrivals) and for each varied quantity."""
    if not can_plot():
        on_news("no plots: they need matplotlib; run: pip install 'crosslm[report]'")
        return
    for task in choice.tasks:
        runs = {str(preset): figures.llms(task, preset) for preset in PRESET_NAMES}  # arrivals are before step 5
        if any(runs.values()):
            store.write(f"plots/{task}.svg", arrivals_plot(f"{NAMES.get(task, task)}: each arrival", runs))
    for key in ("skew", "clients", "rows"):
        if key in tables:
            store.write(f"plots/{key}.svg", varied_plot(tables[key]))
