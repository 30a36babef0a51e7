"""The command line: every module of commands is imported here, and :func:`main` runs the one that was asked for."""

import atexit
import errno
import io
import os
import signal
import sys
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

from crosslm import __version__
from crosslm.cli import (  # noqa: F401  their commands join the application
    audit,
    baseline,
    federation,
    models,
    recovery,
    reports,
    reproduce,
    runs,
    start,
    use,
)
from crosslm.cli.app import app, console, errors
from crosslm.errors import CrosslmError, PassingError, StoppedError
from crosslm.support.plain import plain_lines

EXTRAS = {
    "cryptography": "federation",
    "flwr": "federation",
    "httpx": "federation",
    "starlette": "federation",
    "uvicorn": "federation",
    "datasets": "datasets",
    "matplotlib": "report",
    "opacus": "privacy",
}
"""Packages that a command may find missing, and what brings them."""
PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Of the operating system's errors those by which a machine is short of something now and may not be later."""
SPINS = "1000"
"""Turns in which a thread of OpenMP waits for the others before it lets go of its core (benchmarks/busy.py)."""


class _PlainHelp(TyperCommand):
    """Typer escapes ``[required]`` for rich, also where rich does not print it."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")


for _command in app.registered_commands:
    _command.cls = _PlainHelp


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Run a command; a :class:`CrosslmError` is printed and ends with exit code 2, a stop with 130.

    So is a package that is not there, if one of the extras brings it. A :class:`PassingError` ends with 75, and so does
    what a machine is short of.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        app()
    except StoppedError as stop:
        # a second Ctrl-C while Python ends would change the exit code
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        errors.print(str(stop), highlight=False, markup=False, soft_wrap=True)
        sys.exit(130)
    except (CrosslmError, OSError) as error:  # an OSError names its file: a full disk, a folder that is not ours
        errors.print(plain_lines(f"error: {error}"), highlight=False, markup=False, soft_wrap=True)
        is_short = isinstance(error, OSError) and error.errno in PASSING
        sys.exit(75 if is_short or isinstance(error, PassingError) else 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        message = f"error: this needs the package {package}: pip install 'crosslm[{EXTRAS[package]}]'"
        errors.print(message, highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
