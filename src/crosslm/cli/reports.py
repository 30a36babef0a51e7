"""Commands that show a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import RunArgument, app, console
from crosslm.errors import RunError
from crosslm.runs.rundir import SEEDS, RunDir

OtherArgument = Annotated[
    Path | None, typer.Argument(metavar="[RUN_B]", help="Another run, to be put side by side with the first.")
]


@app.command()
def report(run_folder: RunArgument, other: OtherArgument = None) -> None:
    """Print a run's tables and write RUN/report.html; of two runs, RUN/compare-with-RUN_B.html.

    Of a folder with runs of several seeds (crosslm run --seeds), what they have in common.
    """
    from crosslm.html_report.collect import RunView
    from crosslm.html_report.page import render
    from crosslm.html_report.verdict import verdicts
    from crosslm.runs.report import closing

    if other is None and (run_folder / SEEDS).is_file():
        _report_seeds(run_folder)
        return
    runs = [RunDir.open(folder) for folder in (run_folder, other) if folder is not None]
    views = [RunView.read(run) for run in runs]
    for run, view in zip(runs, views, strict=True):
        if other is not None:
            console.print(f"{run.path}", highlight=False, markup=False, soft_wrap=True)
        console.print(closing(view.summary, verdicts(view)))
    name = "report.html" if other is None else f"compare-with-{views[1].name}.html"
    runs[0].write(name, render(views))
    console.print(f"Report: {run_folder / name}", highlight=False, markup=False, soft_wrap=True)


def _report_seeds(folder: Path) -> None:
    """What the runs of several seeds have in common."""
    from crosslm.html_report.pooled import pooled_tables

    try:
        tables = pooled_tables(json.loads((folder / SEEDS).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / SEEDS}: damaged: {error}; crosslm run --seeds --resume writes it again") from error
    console.print(tables)


@app.command()
def watch(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that goes on.")]) -> None:
    """Follow a run from another terminal until it ends; Ctrl-C stops watching, not the run."""
    from crosslm.html_report.collect import RunView
    from crosslm.html_report.verdict import verdicts
    from crosslm.runs.report import closing
    from crosslm.runs.watch import watch as watch_run

    run = RunDir.open(run_folder)
    try:
        complete = watch_run(run, console)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not complete:
        raise typer.Exit(1)
    console.print(closing(run.summary(), verdicts(RunView.read(run))))
