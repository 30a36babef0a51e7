"""Commands for the way to a first run: a new task, and what is in its way."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from crosslm.cli.app import CacheOption, DataDirOption, SetOption, app, console
from crosslm.errors import ConfigError, RunError
from crosslm.support.commands import command, in_shell
from crosslm.support.files import expanded
from crosslm.support.quiet import quiet_libraries

OF_ITS_DESCRIPTION = ", a word of its description; if another stands for it better: --verbalizer LABEL=WORD"
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def _say(message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go; made if it is not there.")],
    labels: Annotated[
        list[str],
        typer.Option(
            "--label",
            metavar="NAME=DESCRIPTION",
            help="A label and a line about it, once for each; asked if not given.",
        ),
    ] = [],  # noqa: B006  typer's way
    clients: Annotated[
        list[str],
        typer.Option(
            "--client",
            metavar="NAME",
            help="A silo, once for each: ASCII letters, digits and . _ - after the first. [default: north and south]",
        ),
    ] = [],  # noqa: B006
    kind: Annotated[
        str | None, typer.Option("--kind", help="What the texts are, in the singular: review, support request.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the task. [default: the folder's]")] = None,
    llm: Annotated[
        str | None,
        typer.Option("--llm", metavar="MODEL", help="Folder, hub id or package:MODULE. [default: Gemma 3 270M]"),
    ] = None,
    slm: Annotated[str | None, typer.Option("--slm", metavar="MODEL", help="The same. [default: MiniLM]")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="MODEL", help="A sentence transformer. [default: MiniLM]")
    ] = None,
    verbalizers: Annotated[
        list[str],
        typer.Option("--verbalizer", metavar="LABEL=WORD", help="The word for a label; found by itself if not given."),
    ] = [],  # noqa: B006
    cache_dir: CacheOption = None,
) -> None:
    """Write a task of your own: a commented configuration, and a sample CSV file for each silo.

    Each label needs a word that the chosen LLM's tokenizer can tell from the others' by its first token; that is
    checked here, for which the LLM is made ready (but not loaded).
    """
    if not labels and not sys.stdin.isatty():
        raise ConfigError(
            "standard input is not a terminal that could be asked; give --label NAME=DESCRIPTION for each"
        )
    quiet_libraries()
    from crosslm.models.pooling import made_by_mean
    from crosslm.models.sources import cache_folder, check_model, model_folder
    from crosslm.models.tokens import load_tokenizer
    from crosslm.preflight.starter import DEMO_LLM, DEMO_SLM, Start, check_names, draft, is_its_name, write_start

    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).strip("-._") or "task"
    check_names(folder, name, clients)  # before anything is asked or loaded
    llm, slm, encoder = (_anywhere(model) for model in (llm or DEMO_LLM, slm or DEMO_SLM, encoder or DEMO_SLM))
    for key, model in (("--slm", slm), ("--encoder", encoder), ("--llm", llm)):
        check_model(model, key)
    again, cache = "", cache_folder(cache_dir)
    if not labels:
        labels, kind = _asked(kind)
        answers = [f"--kind={kind}", *(f"--label={label}" for label in labels)]
        again = f"\nYour answers, to give them again: {in_shell(*answers)}"
    start = Start(
        name,
        _pairs("--label", labels),
        clients or ["north", "south"],
        kind or "text",
        llm,
        slm,
        made_by_mean(model_folder(slm, cache, _say)),
        encoder,
        _pairs("--verbalizer", verbalizers),
    )
    tokenizer = load_tokenizer(model_folder(llm, cache, _say), llm)
    try:
        task = draft(start, tokenizer)
        written = write_start(folder, start, task)
    except (ConfigError, RunError) as error:
        raise type(error)(f"{error}{again}") from error
    for path in written:
        _say(f"wrote {path}")
    for label, word in task.verbalizer.items():
        taken = "" if is_its_name(label, word) or label in start.verbalizers else OF_ITS_DESCRIPTION
        _say(f"label {label}: the LLM says {word!r}{taken}")
    _say(
        f"Next: put your rows into {', '.join(path.name for path in written[1:])} in place of the samples, "
        f"look at the prompts in {written[0].name}, then: {command('doctor', written[0])}"
    )


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG|KIT]",
            help="Path of a TOML file, the name of a packaged one, or a folder that crosslm provision made.",
        ),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
    data_dir: DataDirOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Look for what would stop a run, or make it disappoint: machine, packages and, with CONFIG, models and data.

    Of a KIT, certificates, keys and ports are looked at too, and from a silo whether the server answers. Each line
    is ok, warning or error, with what to do. The exit code is 2 if there is an error.
    """
    quiet_libraries()
    from crosslm.federation.kits import is_kit
    from crosslm.models.sources import cache_folder
    from crosslm.preflight.doctor import examine
    from crosslm.runs.folders import kits_in

    levels, cache = [], cache_folder(cache_dir)
    if config is not None and is_kit(Path(config)):
        if overrides or data_dir:
            raise ConfigError(f"{config}: --set and --data-dir are not for a kit; change its files")
        from crosslm.federation.checkup import examine_kit  # it needs the extra `federation`

        findings = examine_kit(Path(config), cache, _say)
    elif config is not None and (kits := kits_in(Path(config))):
        raise ConfigError(f"{config}: has the kits of a federation in it; give one of them: {kits}")
    else:
        findings = examine(config, tuple(overrides), data_dir, cache, _say)
    for finding in findings:
        levels.append(finding.level)
        line = Text.assemble((f"{finding.level:<8}", STYLES[finding.level]), str(finding))
        console.print(line, soft_wrap=not console.is_terminal)  # in a pipe one line is one finding
    errors, warnings = levels.count("error"), levels.count("warning")
    _say(f"{len(levels)} checks, {_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    if errors:
        raise typer.Exit(2)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _anywhere(model: str) -> str:
    """A model folder by its whole path: the configuration is used from other folders than this one, too."""
    folder = expanded(model)
    return str(folder.absolute()) if folder.is_dir() else model


def _asked(kind: str | None) -> tuple[list[str], str]:
    """Ask for the labels, one line each, until an empty answer."""
    kind = kind or typer.prompt("What are the texts, in the singular (review, support request)?", default="text")
    labels: list[str] = []
    while True:
        done = ", or nothing to end" if len(labels) >= 2 else ""
        label = typer.prompt(f"Label {len(labels) + 1}, as in your data{done}", default="", show_default=False).strip()
        if not label and len(labels) >= 2:
            return labels, kind
        if label:
            labels.append(f"{label}={typer.prompt(f'A line that describes {label!r}', default='', show_default=False)}")


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    """``NAME=WORDS`` as a table."""
    pairs: dict[str, str] = {}
    for pair in given:
        name, _, words = (part.strip() for part in pair.partition("="))
        if not name or (option == "--verbalizer" and not words):
            raise ConfigError(f"{option} {pair!r}: must look like NAME=WORDS")
        if name in pairs:
            raise ConfigError(f"{option}: {name!r} is given twice; each label needs one line")
        pairs[name] = words
    return pairs
