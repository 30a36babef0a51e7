"""The command line: every module of commands is imported here, and :func:`main` runs the one that was asked for."""

import sys
from typing import Annotated

import typer

from crosslm import __version__
from crosslm.cli import audit, models, runs  # noqa: F401  their commands join the application
from crosslm.cli.app import app, console, errors
from crosslm.errors import CrosslmError


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Run a command; a :class:`CrosslmError` is printed and ends with exit code 2."""
    try:
        app()
    except (CrosslmError, OSError) as error:  # an OSError names its file: a full disk, a folder that is not ours
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
