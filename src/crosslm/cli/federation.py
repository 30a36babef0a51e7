"""Commands of a federation between machines."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from crosslm.cli.app import CacheOption, ConfigArgument, DataDirOption, SetOption, app, console
from crosslm.config_file import load
from crosslm.errors import FederationError
from crosslm.support.commands import command
from crosslm.support.files import expanded
from crosslm.support.plain import plain, plain_lines
from crosslm.support.quiet import quiet_libraries

EnvironmentOption = Annotated[
    bool, typer.Option("--environment", help="Print the environment of Flower's own commands; start nothing.")
]
OWN = 0o077
"""What these commands and all that they start write (classifiers, uploads, logs) is for their own user to read."""
KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="Folder that crosslm provision made.")]


@app.command()
def provision(
    config: ConfigArgument,
    output: Annotated[Path, typer.Option("--output", help="Folder for the kits.")],
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="Where silos will reach the server.")
    ] = None,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="Make a new certificate for the server of the federation in --output, and say what is to be brought "
            "to whom; with --address for another name or port.",
        ),
    ] = False,
    overrides: SetOption = [],  # noqa: B006  typer's way
    data_dir: DataDirOption = None,
) -> None:
    """Make a start-up kit for the server and for each silo: settings, keys, certificates, start scripts.

    The configuration is that of `crosslm run`, with a [[clients]] table for each silo. Run again with more
    clients to add silos.
    """
    read = load(config, tuple(overrides), data_dir)
    if renew:
        from crosslm.federation.renewal import renew as make_anew

        for line in make_anew(read, address, output):
            _say(line)
        return
    if address is None:
        raise FederationError("--address HOST:PORT must be given: where silos will reach the server")
    from crosslm.federation.provision import provision as make

    for kit in make(read, address, output, _say):
        _say(f"made {kit}")
    _say(f"Keep {output / 'authority'} to yourself; give each silo its folder in {output / 'silos'} by a safe way.")


@app.command()
def server(kit: KitArgument, environment: EnvironmentOption = False) -> None:
    """Run the server of a kit until all silos are served; start it again and it goes on."""
    from crosslm.federation.flower.processes import end_on_sigterm
    from crosslm.federation.flower.server_processes import ServerProcesses, configure
    from crosslm.federation.kits import held, read_server

    read_server(kit)  # a folder that is no kit gets nothing written
    if environment:
        configure(kit)
        _print_environment(kit)
        return
    end_on_sigterm()
    os.umask(OWN)
    with held(kit):
        waiting = ServerProcesses(kit, _say).run()
    _say("complete" + (f"; not delivered to: {', '.join(waiting)}" if waiting else ""))
    run = kit / "run"
    _say(f"Everything is in {run} (summary.json, synthetic/, slm/, llm/). See it: {command('report', run)}")


@app.command()
def client(
    kit: KitArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every field and tensor that would leave; send nothing.")
    ] = False,
    environment: EnvironmentOption = False,
    cache_dir: CacheOption = None,
) -> None:
    """Run the silo of a kit: train when asked, upload, install what returns."""
    from crosslm.data.split import one_label
    from crosslm.federation.keys import exposed
    from crosslm.federation.silo_state import SiloState

    if cache_dir:
        os.environ["CROSSLM_CACHE"] = str(expanded(cache_dir).absolute())  # the process that trains is another one
    silo = SiloState(kit)
    if environment:
        _print_environment(kit)
        return
    if dry_run:
        _dry_run(kit)
        return
    private = silo.private(_say)  # a file that cannot be used is found now, and not when the server asks
    who, settings = f"silo {silo.settings.id}", silo.settings
    doubts = [settings.privacy.check_delta(len(private), who), one_label(who, private, settings.labels)]
    for doubt in (*doubts, exposed(silo.kit / "silo.key")):
        if doubt:
            _say(f"warning: {doubt}")
    silo.test(_say)
    from crosslm.federation.flower.processes import end_on_sigterm
    from crosslm.federation.flower.silo_processes import run_silo
    from crosslm.federation.kits import held

    end_on_sigterm()
    os.umask(OWN)
    with held(kit):
        run_silo(silo, _say)


def silo_status(kit: Path) -> None:
    """What a silo does now, what it has sent, and what came of it."""
    from crosslm.federation.silo_news import closing_outcome, doing, outcome
    from crosslm.federation.silo_state import SiloState

    silo = SiloState(kit)
    now = silo.doing()
    _say(f"silo {silo.settings.id} of {silo.settings.experiment}, server {silo.settings.server}")
    _say(doing(now, _ago(now["since"]) if now else ""))
    for number, receipt in enumerate(silo.receipts()):
        if number < silo.installed:
            state = f"complete: {outcome(silo.decision(number))}"
        else:
            state = "trained; nothing has come back yet"
        _say(f"round {number}: {state}; {receipt['bytes_sent']:,} bytes sent, {_ago(receipt['time'])} ago")
    if silo.closed is not None:
        _say(f"in the end: {closing_outcome(silo.closed)}")
    elif silo.settings.closing and silo.installed:
        _say("stays for what the server sends once more when no more uploads come")


def server_status(kit: Path) -> None:
    """Who has uploaded, what is being trained, what waits, and since when."""
    from rich.table import Table

    from crosslm.federation.kits import read_server, silo_names
    from crosslm.federation.spool import CLOSED, Spool

    settings = read_server(kit)
    if not (kit / "spool").exists():  # it is whoever runs the server to whom it will belong
        _say(f"{settings.experiment} at {settings.address}: not started")
        for silo in silo_names(kit):
            _say(f"{silo}: not uploaded")
        return
    spool = Spool(kit / "spool")
    alive, finished = spool.fact("alive"), spool.fact("finished")
    state = (
        "complete"
        if finished is not None
        else f"last sign of life {_ago(float(alive))} ago"
        if alive
        else "not started"
    )
    _say(f"{settings.experiment} at {settings.address}: {state}")
    if work := spool.work():
        _say(f"at work on: {work[0]}, for {_ago(work[1])}")
    table = Table("silo", "round", "state", "since", "bytes", "note", box=None)
    admitted = silo_names(kit)
    shut_out = [arrival.silo for arrival in spool.arrivals() if arrival.silo not in admitted]
    for silo in [*admitted, *dict.fromkeys(shut_out)]:
        moment, _, line = (spool.fact(f"silo/{silo}") or " ").partition(" ")
        mine, since = spool.of(silo), _ago(float(moment)) if moment else "-"
        if not mine:
            table.add_row(Text(silo), "-", "not uploaded", since, "-", _plain(line))
        line = f"{line}, {since} ago" if line else ""
        for arrival in mine:
            note = _plain(arrival.note or (line if silo in admitted else "shut out: its key is not in the kit"))
            table.add_row(
                Text(silo), str(arrival.round), arrival.state, _ago(arrival.since), f"{arrival.bytes:,}", note
            )
        if spool.closing_of(silo) is not None:
            taken = "served" if spool.owes_closing(silo) else "delivered"
            table.add_row(Text(silo), "in the end", taken, "-", "-", _plain(spool.fact(f"{CLOSED}{silo}") or line))
    console.print(table)


def _plain(words: str) -> Text:
    """Words that may be another machine's: no markup, and nothing that a terminal would obey."""
    return Text(plain(words))


def _dry_run(kit: Path) -> None:
    """Print every field and tensor that would leave: the fields first, which are fewer and say more."""
    quiet_libraries()
    from crosslm.federation.leaving import CARRIER, QUESTION
    from crosslm.federation.silo import Silo
    from crosslm.models.sources import cache_folder

    silo = Silo(kit, cache_folder())
    found = silo.would_send()
    tensors, fields = found["tensors"], found["fields"]
    assert isinstance(tensors, dict)
    assert isinstance(fields, dict)
    total = f"{len(tensors)} tensors of {_bytes(found['tensor_bytes'])}"
    _say(f"silo {silo.settings.id} would send to {silo.settings.server}: these fields, and {total}, which are below")
    for name, value in fields.items():
        _say_field(name, value)
    names, answers = found["metrics_after_training"], found["answers"]
    assert isinstance(names, list)
    assert isinstance(answers, dict)
    _say(f"field   metrics, numbers of the training: {', '.join(names)}")
    for occasion, parts in answers.items():
        _say(f"answer  {occasion}: {', '.join(parts)}")
    _say("metrics.accepted is 0 if what came back is worse on held-out private rows, and so is a fact about these rows")
    _say(f"carrier {CARRIER}")
    _say(f"question {QUESTION}")
    for name, entry in tensors.items():
        shape = "x".join(map(str, entry["shape"])) or "scalar"
        _say(f"tensor  {name}  {shape}  {entry['dtype']}  {_bytes(entry['bytes'])}")
    _say(f"{total}, and these fields, answers and questions.")
    _say("Nothing else leaves.")
    _say("Nothing was sent.")


def _say_field(name: str, value: object) -> None:
    """A field as JSON; one of several, each in a line of its own."""
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            _say_field(f"{name}.{part}", inner)
        return
    line = f"field   {name}  {json.dumps(value, ensure_ascii=False)}"
    # what a terminal would not show, in an escape of JSON's
    _say("".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in line))


def _bytes(size: int) -> str:
    return f"{size} bytes" + (f" ({size / 1e6:.1f} MB)" if size >= 1e5 else "")


def _print_environment(kit: Path) -> None:
    """As a shell takes it: eval "$(crosslm server KIT --environment)"."""
    from crosslm.federation.flower.processes import settings_of

    for name, value in settings_of(kit).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def _ago(moment: float) -> str:
    seconds = max(0, int(time.time() - moment))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _say(message: str) -> None:
    console.print(plain_lines(message), highlight=False, markup=False, soft_wrap=True)
