"""What every command shares: the application, its options, and the two consoles."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crosslm.config_file import packaged

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does, and twice is once too often
    help="A server's LLM and many clients' classifiers make each other better; no client's text leaves its silo.",
)
console = Console(emoji=False)  # a label may be ":x:"
errors = Console(stderr=True, emoji=False)

ConfigArgument = Annotated[
    str, typer.Argument(help="Path of a TOML file, or the name of a packaged one: " + ", ".join(packaged()) + ".")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be given several times."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="Folder for this run; must be new or empty. [default: runs/NAME-1, -2, ...]"),
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache-dir",
        help="Where converted models and demo data are kept. [default: $CROSSLM_CACHE or the user's cache]",
    ),
]
LLMCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--llm-cache",
        help="Keep in this folder what the LLM writes, reads and learns, and do none of it twice: another run that "
        "differs only in step 5, in its test rows or in llm.interpolation trains its classifiers, and the LLM does "
        "only what is new.",
    ),
]
DataDirOption = Annotated[
    str | None, typer.Option("--data-dir", help="Folder that the data files are in; replaces data.dir.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
