"""Commands that make a run and look at one."""

from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import (
    CacheOption,
    ConfigArgument,
    DataDirOption,
    OutputOption,
    RunArgument,
    SetOption,
    app,
    console,
    quiet_libraries,
)
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.rundir import RunDir, next_free

QUICK = (
    "llm.samples=16",
    "selection.pool=48",
    "slm.private.epochs=3",
    "evaluation.nlg_samples=32",
    "evaluation.nlu_rows=60",
    "evaluation.perplexity_tokens=1024",
    "evaluation.judge.epochs=1",
    "data.test_rows=120",
    "data.judge_rows=400",
    "synthesis.max_new_tokens=24",
)


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006  typer's way
    output: OutputOption = None,
    data_dir: DataDirOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Run CrossLM and both baselines, with all clients in this process."""
    _run(load(config, tuple(overrides), data_dir), output, cache_dir)


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="The same steps on far less text, to see them run; no gain to expect.")
    ] = False,
    overrides: SetOption = [],  # noqa: B006
    output: OutputOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Run the packaged demo: four real silos (tweets, products, films, editorials), real weights."""
    from crosslm.demo import prepare_data
    from crosslm.models.sources import cache_folder

    folder = prepare_data(cache_folder(cache_dir), lambda message: console.print(message, highlight=False))
    _run(load("demo", (*(QUICK if quick else ()), *overrides), str(folder)), output, cache_dir)


@app.command()
def evaluate(
    run_folder: RunArgument,
    cache_dir: CacheOption = None,
) -> None:
    """Measure a run's classifiers and LLM again, from the files in its folder."""
    quiet_libraries()
    from crosslm.display import display_for
    from crosslm.models.sources import cache_folder
    from crosslm.reevaluate import evaluate_run

    measures = evaluate_run(RunDir.open(run_folder), cache_folder(cache_dir), display_for(console))
    for name, value in measures.items():
        console.print(f"{name:<28} {value:.4f}", highlight=False)


def _run(config: Config, output: Path | None, cache_dir: str | None) -> None:
    quiet_libraries()
    from crosslm.display import display_for
    from crosslm.experiment import run_local
    from crosslm.models.sources import cache_folder
    from crosslm.report import closing

    folder = output or next_free(Path("runs"), config.name)
    summary = run_local(config, folder, cache_folder(cache_dir), display_for(console))
    console.print(closing(summary))
    console.print(
        f"Everything is in {folder} (summary.json, synthetic/, slm/, llm/). See it: crosslm report {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
