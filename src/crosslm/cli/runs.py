"""Commands that make a run and look at one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import (
    CacheOption,
    ConfigArgument,
    DataDirOption,
    LLMCacheOption,
    OutputOption,
    RunArgument,
    SetOption,
    app,
    console,
)
from crosslm.cli.stopping import StopRequest
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import RunError, StoppedError
from crosslm.runs.naming import last_seeds, last_unfinished, next_free
from crosslm.runs.rundir import CONFIG, SEEDS, SUMMARY, RunDir
from crosslm.support.commands import command, in_shell
from crosslm.support.files import write_whole
from crosslm.support.quiet import quiet_libraries

ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the unfinished run in --output (without it: the newest of this name in runs/), "
        "or start one if there is none.",
    ),
]
SeedsOption = Annotated[
    int,
    typer.Option(
        "--seeds",
        min=1,
        help="Run with so many seeds, one after the other, each in a folder of --output, and pool what they find: "
        "means with intervals over seeds too.",
    ),
]
QUICK = (
    "llm.samples=8",
    "selection.pool=32",
    "federation.closing_texts=32",
    "slm.private.epochs=2",
    "evaluation.nlg_samples=16",
    "evaluation.nlu_rows=30",
    "evaluation.perplexity_tokens=256",
    "evaluation.judge.epochs=1",
    "data.test_rows=60",
    "data.judge_rows=200",
    "synthesis.max_new_tokens=24",
)


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006  typer's way
    output: OutputOption = None,
    data_dir: DataDirOption = None,
    cache_dir: CacheOption = None,
    llm_cache: LLMCacheOption = None,
    resume: ResumeOption = False,
    seeds: SeedsOption = 1,
) -> None:
    """Run CrossLM and both baselines, with all clients in this process."""
    loaded = load(config, tuple(overrides), data_dir)
    if seeds == 1:
        _run(loaded, output, cache_dir, resume, llm_cache)
    else:
        unfinished = last_seeds(Path("runs"), loaded.name) if resume else None
        folder = output or unfinished or next_free(Path("runs"), loaded.name)
        _run_seeds(loaded, seeds, folder, cache_dir, resume, llm_cache)


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="The same steps on far less text, to see them run; no gain to expect.")
    ] = False,
    overrides: SetOption = [],  # noqa: B006
    output: OutputOption = None,
    cache_dir: CacheOption = None,
    resume: ResumeOption = False,
) -> None:
    """Run the packaged demo: four real silos (tweets, products, films, editorials), real weights."""
    from crosslm.data.demo import prepare_data
    from crosslm.models.sources import cache_folder

    settings = (*(QUICK if quick else ()), *overrides)
    load("demo", settings)  # what is wrong with these is said before anything is fetched
    if output is not None and not resume:
        RunDir.check_free(output)
    folder = prepare_data(
        cache_folder(cache_dir), lambda message: console.print(message, highlight=False, markup=False)
    )
    _run(load("demo", settings, str(folder)), output, cache_dir, resume)


@app.command()
def evaluate(
    run_folder: RunArgument,
    cache_dir: CacheOption = None,
) -> None:
    """Measure a run's classifiers and LLM again, from the files in its folder.

    Accuracies are of the classifiers that went back. llm/nlg_accuracy_returned is by them too and on newly written
    text; nlg_accuracy in summary.json is by the classifiers as first uploaded. The independent judge is not kept in
    the folder, so that nothing is measured by it again.
    """
    quiet_libraries()
    from crosslm.cli.display import display_for
    from crosslm.models.sources import cache_folder
    from crosslm.runs.reevaluate import evaluate_run

    measures = evaluate_run(RunDir.open(run_folder), cache_folder(cache_dir), display_for(console))
    for name, value in measures.items():
        console.print(f"{name:<30} {value:.4f}", highlight=False, markup=False)


def _run(
    config: Config, output: Path | None, cache_dir: str | None, resume: bool, llm_cache: Path | None = None
) -> None:
    runs = Path("runs")
    unfinished = last_unfinished(runs, config.name) if resume and output is None else None
    finish(config, output or unfinished or next_free(runs, config.name), cache_dir, resume, llm_cache)


def _run_seeds(
    config: Config, seeds: int, folder: Path, cache_dir: str | None, resume: bool, llm_cache: Path | None
) -> None:
    """A run for each seed, from the configuration's on; those that are complete are not done again."""
    from crosslm.html_report.collect import RunView
    from crosslm.html_report.pooled import pooled, pooled_tables

    if (folder / CONFIG).is_file() or (not resume and folder.exists() and any(folder.iterdir())):
        raise RunError(f"{folder}: is not empty; choose another --output, or go on with runs of seeds in it: --resume")
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        runs.append(folder / f"seed-{seed}")
        try:
            finish(config.model_copy(update={"seed": seed}), runs[-1], cache_dir, resume=True, llm_cache=llm_cache)
        except StoppedError as stop:
            again = in_shell("--output", folder, "--resume")
            how = f"That is of seed {seed} alone; all of them: the same command with {again}"
            raise StoppedError(f"{stop}\n{how}") from None
    figures = pooled([RunView.read(RunDir.open(run)) for run in runs])
    write_whole(folder / SEEDS, [(json.dumps(figures, indent=1) + "\n").encode()])
    console.print(pooled_tables(figures))
    said = f"Pooled figures are in {folder / SEEDS}; {command('report', folder)} prints them again."
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def finish(config: Config, folder: Path, cache_dir: str | None, resume: bool, llm_cache: Path | None = None) -> None:
    """Run, or go on with a run, to its end or to Ctrl-C, and show its tables."""
    quiet_libraries()
    from crosslm.cli.display import display_for
    from crosslm.experiment import run_local
    from crosslm.html_report.collect import RunView
    from crosslm.html_report.verdict import verdicts
    from crosslm.models.sources import cache_folder
    from crosslm.runs.report import closing

    with _somebody_reads(folder):
        try:
            with StopRequest() as stop:
                cache, display = cache_folder(cache_dir), display_for(console)
                summary = run_local(config, folder, cache, display, resume, stop, llm_cache=llm_cache)
        except KeyboardInterrupt:
            how = RunDir(folder).resuming()
            raise StoppedError(f"stopped at once; what earlier arrivals did is in {folder}. To go on: {how}") from None
        console.print(closing(summary, verdicts(RunView.read(RunDir.open(folder)))))
        console.print(
            f"Everything is in {folder} (summary.json, synthetic/, slm/, llm/). See it: {command('report', folder)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@contextmanager
def _somebody_reads(folder: Path) -> Iterator[None]:
    """What is printed of a run in this folder within this goes to somebody.

    Raises:
        StoppedError: it does not (``| head``); rich ends the program then without a word.
    """
    try:
        yield
    except SystemExit:
        if (folder / SUMMARY).is_file():
            what = f"The run is complete, and everything is in {folder}. See it: {command('report', folder)}"
        elif (folder / CONFIG).is_file():
            what = f"What earlier arrivals did is in {folder}. To go on: {RunDir(folder).resuming()}"
        else:
            what = f"Nothing of the run in {folder} had been done yet. Give the same command again"
        raise StoppedError(f"stopped, since its output was closed; give it one that stays open. {what}") from None
