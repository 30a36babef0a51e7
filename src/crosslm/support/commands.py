"""Commands in messages, which can be pasted into a shell as they stand."""

import shlex
from pathlib import Path


def in_shell(*given: str | Path) -> str:
    """Words for a shell, in quotes where it would not take them as they are."""
    return shlex.join(map(str, given))


def command(*given: str | Path) -> str:
    """A command of crosslm; ``given`` is what follows its name."""
    return in_shell("crosslm", *given)
