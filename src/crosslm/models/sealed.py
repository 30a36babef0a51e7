"""Model folders that crosslm makes for its cache: what was written is known again, so that damage is found."""

import hashlib
import json
from pathlib import Path

from crosslm.errors import ModelError
from crosslm.support.files import write_whole

SEAL = "crosslm.json"


def seal(folder: Path) -> None:
    """Write into a folder which files it has: size, time and SHA-256 of each."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {path.name: [*_looks(path), _digest(path)] for path in files}
    write_whole(folder / SEAL, [json.dumps(found, indent=1).encode()])


def check_seal(folder: Path) -> None:
    """Find out that the files of a folder are those that it was sealed with; one of an earlier crosslm has no seal.

    Whoever reads a gigabyte at each start waits for it: a file that has its size and time is taken for the same.

    Raises:
        ModelError: one is missing, or has changed.
    """
    if not (folder / SEAL).is_file():
        return
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, (size, time, digest) in sealed.items():
            path = folder / name
            is_same = path.is_file() and (_looks(path) == (size, time) or _digest(path) == digest)
            if not is_same:
                how = "has changed" if path.is_file() else "is missing"
                raise ModelError(f"{path}: {how}; delete the folder, which is made again from what is installed")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / SEAL}: cannot be read: {error}; delete the folder, which is made again from what is installed"
        ) from error


def _looks(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
