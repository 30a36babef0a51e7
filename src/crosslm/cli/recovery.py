"""Commands about a run that was stopped, or went wrong."""

from pathlib import Path
from typing import Annotated

import typer

from crosslm.cli.app import CacheOption, app, console
from crosslm.cli.runs import finish
from crosslm.errors import RunError
from crosslm.runs.rundir import CONFIG, SUMMARY, RunDir
from crosslm.support.commands import command
from crosslm.support.plain import plain
from crosslm.support.quiet import quiet_libraries

AnyRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")]
RunOrKit = Annotated[
    Path, typer.Argument(metavar="RUN|KIT", help="Folder of a run, finished or not, or a kit of a federation.")
]


@app.command()
def status(folder: RunOrKit) -> None:
    """Say what a run or a federation has done, what each arrival was and what came of it, and how to go on."""
    from crosslm.cli.federation import server_status, silo_status
    from crosslm.federation.kits import SERVER_FILE, SILO_FILE

    if (folder / SERVER_FILE).exists():
        server_status(folder)
    elif (folder / SILO_FILE).exists():
        silo_status(folder)
    else:
        run_status(folder)


def run_status(run_folder: Path) -> None:
    """What a run has done so far."""
    from crosslm.runs.checkpoint import Checkpoints

    run = RunDir.open(run_folder)
    checkpoints = Checkpoints(run)
    numbers, records, damaged = checkpoints.numbers(), [], []
    for number in numbers:
        try:
            records.append(checkpoints.read(number))
        except RunError as error:
            damaged.append(str(error))
    unfinished = "at work" if run.is_locked() else "stopped"
    if run.is_between_machines():
        unfinished = f"not complete; {command('status', run_folder.parent)} says more"
    state = "complete" if (run_folder / SUMMARY).is_file() else unfinished
    console.print(
        f"{run_folder}: {state}, {max(len(numbers) - 1, 0)} arrivals done",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for record in records:
        cause = record["cause"]
        kept = "" if record["state"] is not None else " (only the adapter is kept)"
        who = f"{cause['client']}: " if "client" in cause else ""
        step = f", step {cause['step']}" if "step" in cause else ""
        reason = f": {cause['reason']}" if "reason" in cause else ""
        adapter = f"adapter {record['adapter'][:12]}{kept}"
        line = f"arrival {record['arrival']}: {who}{cause['outcome']}{step}{reason}; {adapter}"
        console.print(plain(line), highlight=False, markup=False, soft_wrap=True)
    for message in damaged:
        console.print(message, highlight=False, markup=False, soft_wrap=True)
    if run.barred():
        console.print(f"rolled back: without {', '.join(run.barred())}", highlight=False, markup=False)
    if state == "stopped":
        console.print(f"To go on: {run.resuming()}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def rollback(
    run_folder: AnyRun,
    client: Annotated[str, typer.Option("--client", metavar="NAME", help="Client whose influence is unwanted.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the run without it. [default: RUN-without-NAME]")
    ] = None,
    cache_dir: CacheOption = None,
) -> None:
    """Make a run without a client: as it was before that client came, and the others' later arrivals again."""
    quiet_libraries()
    from crosslm.config_file import load
    from crosslm.models.sources import cache_folder, resolve_device
    from crosslm.runs.preparation import Prepared, prepare
    from crosslm.runs.rollback import roll_back

    def prepared() -> Prepared:
        """What the copy needs to be gone on with; a relative path is from where this command runs."""
        config = load(run_folder / CONFIG)
        config = config.model_copy(update={"device": resolve_device(config.device)})
        return prepare(config, cache_folder(cache_dir), lambda news: console.print(news, highlight=False, markup=False))

    beside = run_folder if run_folder.name not in ("", "..") else run_folder.resolve()
    target = output or beside.with_name(f"{beside.name}-without-{client}")
    after = roll_back(RunDir.open(run_folder), client, target, prepared)
    console.print(
        f"{target}: {run_folder} after arrival {after}, without {client}", highlight=False, markup=False, soft_wrap=True
    )
    finish(load(target / CONFIG), target, cache_dir, resume=True)
