"""What a folder is that is named for a run, and what may be made of it."""

from collections.abc import Iterable
from pathlib import Path

from crosslm.errors import RunError

KIT_FILE = "server.toml"
"""What a server's kit has in it; its run folder is ``run`` beside that."""
SILO_KIT_FILE = "silo.toml"
NAMED_FOLDERS = 5


def kits_in(folder: Path) -> str:
    """Which kits of a federation are in a folder; nothing if none is."""
    return listed([*folder.glob(f"server/{KIT_FILE}"), *folder.glob(f"silos/*/{SILO_KIT_FILE}")])


def listed(files: Iterable[Path]) -> str:
    """The folders of some files, not too many for a message; nothing if there are none."""
    folders = sorted(str(file.parent) for file in files)
    return ", ".join(folders[:NAMED_FOLDERS]) + (", ..." if len(folders) > NAMED_FOLDERS else "")


def check_elsewhere(folder: Path) -> None:
    """Find out that a folder may be replaced by a new one: whoever is in it would be nowhere afterwards.

    Raises:
        RunError: it is the folder that this process is in.
    """
    if folder.resolve() == Path.cwd():
        raise RunError(f"{folder}: is the folder that you are in; name a new one, in it or elsewhere")


def make_private(folder: Path) -> None:
    """A run folder says much of the private rows (docs/privacy.md), and so is its owner's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
