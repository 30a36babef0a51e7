"""Doing a cell: a run, a ceiling, Standalone, or a benchmark, to figures that can be kept."""

import functools
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosslm.config import Config
from crosslm.data.split import load_split
from crosslm.errors import RunError, UnservedError
from crosslm.experiment import run_local
from crosslm.models.sources import model_folder, resolve_device
from crosslm.reproduce.benchmarks import fine_tune, matthews, start_llm
from crosslm.reproduce.inputs import digests_of
from crosslm.reproduce.plan import CEILING, ORIGINAL, RUN, STANDALONE, Cell, Choice
from crosslm.reproduce.store import MACHINES_OWN, Store
from crosslm.runs.baseline import together, trained_on_all
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.loaded import load_client
from crosslm.runs.measures import LLM_MEASURES
from crosslm.runs.preparation import client_specs
from crosslm.runs.rundir import SUMMARY, RunDir
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for

KEPT_OF_A_SUMMARY = ("slm", "llm", "judge_accuracy", "reward_hacking", "clients", "test_rows", "tokens_generated")


def settings_of(cell: Cell, choice: Choice) -> dict[str, Any]:
    """What the figures of a cell depend on; of its data what they say and not where they are: cells are passed on."""
    whole = choice.cell_config(cell)
    dump = whole.model_dump(mode="json", exclude_none=True)
    for *path, name in MACHINES_OWN:
        functools.reduce(dict.__getitem__, path, dump).pop(name, None)
    config = {"config": dump, "files": digests_of(cell, choice, whole)}
    if cell.stage in (RUN, CEILING, STANDALONE):
        return config
    return config | {"finetuning": choice.scale.finetuning.model_dump(mode="json")}


def do(
    cell: Cell, choice: Choice, store: Store, cache: Path, display: Display | None, llm_cache: Path | None = None
) -> dict[str, Any]:
    """The figures of a cell.

    Raises:
        CrosslmError: it cannot be done.
    """
    config = choice.cell_config(cell)
    if cell.stage == RUN:
        folder = store.ready_run_folder(cell, config, digests_of(cell, choice, config))
        try:
            if not (folder / SUMMARY).is_file():
                run_local(config, folder, cache, display, resume=True, llm_cache=llm_cache)
        except UnservedError as error:
            return unserved_figures(RunDir.open(folder), error)
        finally:
            gc.collect()  # a run's models refer to themselves in circles, and are gigabytes
        return run_figures(RunDir.open(folder))
    config = config.model_copy(update={"device": resolve_device(config.device)})
    if cell.stage == CEILING:
        return ceiling(config, cache, Progress(display))
    if cell.stage == STANDALONE:
        return standalone(config, cache, Progress(display))
    trained = None
    if cell.method != ORIGINAL and not _is_unserved(store.read(replace(cell, stage=RUN))):
        trained = store.run_folder(cell) / "llm"
        if not trained.is_dir():
            again = f"delete {store.cell_file(replace(cell, stage=RUN))} and {trained.parent}"
            raise RunError(
                f"{trained}: the enhanced LLM is not there; put the folder back, or {again} to have it made again"
            )
    return benchmark(cell, config, trained, choice, cache, Progress(display))


def _is_unserved(kept: dict[str, Any] | None) -> bool:
    """Whether a run's cell is of one in which every upload was refused: its LLM is the original."""
    return kept is not None and bool(kept["figures"].get("unserved"))


def run_figures(run: RunDir) -> dict[str, Any]:
    """What the tables need of a finished run: per-row correctness, perplexity, and what each arrival was like."""
    summary = run.summary()
    steps = [event for event in run.events() if event["event"] == "step"]
    return {
        **{name: summary.get(name) for name in KEPT_OF_A_SUMMARY},
        **{name: summary[name] for name in ("llm_cache",) if name in summary},  # then its seconds say nothing
        "run_seconds": summary["seconds"]["total"],
        "correct": read_correct(run.path / "predictions"),
        "arrivals": [{name: value for name, value in step.items() if name != "time"} for step in steps],
    }


def unserved_figures(run: RunDir, error: UnservedError) -> dict[str, Any]:
    """What there is of a run in which every upload was refused: clients as they came, and an LLM that has not changed.

    Raises:
        UnservedError: the one given, since a client failed otherwise.
    """
    correct = read_correct(run.path / "predictions")
    start = next(event for event in run.events() if event["event"] == "start")
    record = Checkpoints(run).last()
    if record is None or any(f"slm/standalone/{who}" not in correct for who in start["specs"]):
        raise error
    before = record["state"]["kept"]["before"]
    same = {name: {"before": before.get(name), "after": before.get(name)} for name in LLM_MEASURES}
    if "nlu/before" in correct:
        correct["nlu/after"] = correct["nlu/before"]
    return {"llm": same, "correct": correct, "arrivals": [], "reward_hacking": None, "unserved": True}


def read_correct(folder: Path) -> dict[str, str]:
    """For each file of predictions a digit a row, 1 where the predicted label is the right one."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        found[path.relative_to(folder).with_suffix("").as_posix()] = digits(rows["gold"], rows["predicted"])
    return found


def digits(gold: list[int], predicted: list[int]) -> str:
    """A digit a row: 1 where both are the same."""
    return "".join("1" if right == said else "0" for right, said in zip(gold, predicted, strict=True))


def ceiling(config: Config, cache: Path, progress: Progress) -> dict[str, Any]:
    """What a client could have if all private text lay in one place.

    One SLM of each architecture that a client has, trained on all clients' rows as in step 1; a client's figure is
    that of its architecture.
    """
    split = load_split(config)
    specs, pooled = client_specs(config, list(split.private)), together(split.private)
    trained, correct = trained_on_all(pooled, specs, config, cache, progress), {}
    for client, spec in specs.items():
        test = split.tests[client]
        predicted = trained[spec].predict_proba(test.texts).argmax(dim=1).tolist()
        correct[client] = digits(test.labels, predicted)
    return {"correct": correct, "rows": len(pooled)}


def standalone(config: Config, cache: Path, progress: Progress) -> dict[str, Any]:
    """What a client has without anybody else: its SLM after step 1, as a run with this configuration has it first."""
    split, correct = load_split(config), {}
    for name, spec in client_specs(config, list(split.private)).items():
        folder = model_folder(spec.model, cache, progress.note)
        client = load_client(name, spec, folder, split.private[name], config, None, progress)
        client.train()
        test = split.tests[name]
        correct[name] = digits(test.labels, client.slm.predict_proba(test.texts).argmax(dim=1).tolist())
    return {"correct": correct}


def benchmark(
    cell: Cell, config: Config, trained: Path | None, choice: Choice, cache: Path, progress: Progress
) -> dict[str, Any]:
    """Table 7: the LLM fine-tuned on a task that it was not enhanced for."""
    budget = choice.scale.finetuning
    folder = model_folder(config.llm.model, cache, progress.note)
    # the same adapter with the same first values for every start of a seed
    fresh = choice.config(choice.scale.tasks[0], "paper", cell.seed, {}).llm
    seed = seed_for(cell.seed, "finetuning", cell.stage)
    llm = start_llm(folder, trained, config.llm, fresh, seed, config.device)
    work = budget.train_rows * budget.epochs + budget.test_rows
    with progress.stage("fine-tune LLM", cell.path, work, "rows") as advance:
        data = choice.data_dir / cell.stage
        gold, predicted = fine_tune(llm, cell.stage, data, choice.split, budget, cell.seed, advance)
    del llm
    gc.collect()
    return {
        "correct": digits(gold, predicted),
        "matthews": matthews(gold, predicted),
        "majority": max(gold.count(label) for label in set(gold)) / len(gold),
        "test_rows": len(gold),
    }
