"""Commands in messages, so that they can be pasted into a shell as they stand."""

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """A command of crosslm, whatever its words have in them for a shell.

    Args:
        words: what follows ``crosslm``.
    """
    return shlex.join(("crosslm", *map(str, words)))


def going_on(folder: Path, config: str) -> str:
    """The command that goes on with a run.

    Args:
        folder: of the run.
        config: the name of its configuration in it.
    """
    return command("run", folder / config, "--output", folder, "--resume")
