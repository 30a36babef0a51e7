"""The loop: check everything, do the cells that are not there, and write the tables now and then and at the end."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from crosslm.data.split import load_split
from crosslm.errors import RunError
from crosslm.models.sources import model_folder, resolve_device
from crosslm.models.tokens import load_tokenizer, verbalizer_ids
from crosslm.reproduce.benchmarks import BENCHMARKS, load_benchmark
from crosslm.reproduce.jobs import Work, one_by_one, side_by_side
from crosslm.reproduce.plan import RUN, RUNS_LLM, Cell, Choice, plan
from crosslm.reproduce.report import write_report
from crosslm.reproduce.store import Store, differences
from crosslm.reproduce.work import settings_of
from crosslm.runs.preparation import check_models, client_specs, perplexity_text_of
from crosslm.support.progress import Display, Silent

REPORT_SECONDS = 600.0  # between two writings of the tables, which take a quarter of a minute of two cores


def reproduce(
    choice: Choice,
    output: Path,
    cache: Path,
    display: Display | None = None,
    render_only: bool = False,
    jobs: int = 1,
    llm_cache: Path | None = None,
) -> Path:
    """Do every cell of the chosen tables that is not there, and write the tables, plots and headline figures.

    It may be stopped at any moment: what is kept of a cell is a whole file or none, and the next call goes on.

    Args:
        choice: tables, tasks, seeds, presets, split and scale.
        output: folder for cells, run folders and tables.
        cache: where converted models are kept.
        display: shows progress.
        render_only: write the tables of what is there and do nothing else.
        jobs: how many cells are done at a time; more than one in processes of their own, each of which needs the
            memory of a run and shows no progress.
        llm_cache: as in :func:`crosslm.experiment.run_local`.

    Returns:
        The folder with the tables.

    Raises:
        CrosslmError: the input is wrong, which is found before a model is loaded; or cells have failed, or are there
            and were made with other settings, which is said after all others have been done.
    """
    display = display or Silent()
    cells, store = plan(choice), Store(output, choice.split)
    if render_only and not store.folder.is_dir():
        raise RunError(f"{store.folder}: no such folder, so there are no cells to render; look at --output and --split")
    todo, stale = ([], []) if render_only else _sort(cells, choice, store)
    check_input(todo, choice, cache, display)
    with store.locked():
        if not render_only:
            there = len(cells) - len(todo) - len(stale)
            display.note(f"{len(cells)} cells: {there} there, {len(todo)} to do")
        for message in stale:
            display.note(f"warning: {message}")
        failed = stale + _do_all(todo, Work(choice, output, cache, llm_cache), store, display, jobs)
        write_report(store, choice, display.note)
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} cells failed:\n" + "\n".join(failed))
    return store.folder


def _sort(cells: Sequence[Cell], choice: Choice, store: Store) -> tuple[list[Cell], list[str]]:
    """The cells that are to be done, and a line for each that cannot be used and those that need it."""
    todo: list[Cell] = []
    stale: dict[Cell, str] = {}
    for cell in cells:
        start = replace(cell, stage=RUN)  # of a benchmark, the run whose LLM it begins with
        try:
            if not is_done(cell, choice, store):
                if start in stale and not has_llm(start, choice, store):
                    stale[cell] = f"{cell.path}: needs the run, whose cell cannot be used"
                else:
                    todo.append(cell)
        except RunError as error:
            stale[cell] = str(error)
    return todo, list(stale.values())


def has_llm(run: Cell, choice: Choice, store: Store) -> bool:
    """Whether a run that cannot be used for the SLMs has the LLM that it would have now, since step 5 alone differs."""
    kept = store.read(run)
    llm = replace(run, stage=RUNS_LLM)
    return kept is not None and not differences(llm, kept["settings"], settings_of(run, choice))


def is_done(cell: Cell, choice: Choice, store: Store) -> bool:
    """Whether a cell is there.

    Raises:
        RunError: it is there and was made with other settings, or is damaged.
    """
    kept = store.read(cell)
    if kept is None:
        return False
    changed = differences(cell, kept["settings"], settings_of(cell, choice))
    if changed:
        raise RunError(
            f"{store.cell_file(cell)}: was made with other settings ({', '.join(changed)}); "
            "take another --output, or delete it (and its folder in runs/) to have it done again"
        )
    return True


def check_input(cells: Sequence[Cell], choice: Choice, cache: Path, display: Display) -> None:
    """Find what is wrong with data, models or device before anything long is begun.

    Raises:
        CrosslmError: it is.
    """
    seen: set[tuple[str, str, str]] = set()
    for cell in cells:
        if cell.stage in BENCHMARKS:
            key = ("", "", cell.stage)
            if key not in seen:
                benchmark, model = BENCHMARKS[cell.stage], choice.cell_config(cell).llm.model
                for name in ("train.csv", f"{choice.split}.csv"):
                    load_benchmark(benchmark, choice.data_dir / cell.stage, name)
                verbalizer_ids(load_tokenizer(model_folder(model, cache, display.note), model), benchmark.task())
        else:
            key = (cell.task, cell.variation.name, "")
            if key not in seen:
                config = choice.cell_config(cell)
                resolve_device(config.device)
                check_models(config, client_specs(config, list(load_split(config).private)))
                perplexity_text_of(config)
        seen.add(key)


def _do_all(todo: Sequence[Cell], work: Work, store: Store, display: Display, jobs: int) -> list[str]:
    """Do cells, and write the tables now and then; returns a line for each that failed."""
    failed: list[str] = []
    reported = time.monotonic()
    done = one_by_one(todo, work, display) if jobs == 1 else side_by_side(todo, work, display, jobs)
    with closing(done):
        for lines in done:
            for line in lines:
                display.note(f"failed: {line}")
            failed += lines
            if time.monotonic() - reported > REPORT_SECONDS:
                write_report(store, work.choice, display.note, plots=False)
                reported = time.monotonic()
    return failed
