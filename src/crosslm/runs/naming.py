"""Names of run folders that a user has not named."""

import re
from pathlib import Path

from crosslm.runs.rundir import CONFIG, LOCK, SEEDS, SUMMARY, RunDir


def next_free(folder: Path, name: str) -> Path:
    """``folder/name-1``, or the number after the highest that is taken: one that was deleted is not given again."""
    return folder / f"{name}-{_highest(folder, name) + 1}"


def last_seeds(folder: Path, name: str) -> Path | None:
    """The newest of ``folder/name-1``, ``-2``, ... if it has runs of several seeds that are not all complete."""
    last = folder / f"{name}-{_highest(folder, name)}"
    return last if any(last.glob(f"seed-*/{CONFIG}")) and not (last / SEEDS).exists() else None


def last_unfinished(folder: Path, name: str) -> Path | None:
    """The newest of ``folder/name-1``, ``-2``, ... if its run is not complete."""
    last = folder / f"{name}-{_highest(folder, name)}"
    return last if (last / CONFIG).is_file() and not (last / SUMMARY).exists() else None


def _highest(folder: Path, name: str) -> int:
    """The highest number that is taken, whichever below it are not; 0 if none is."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ends = [each.removeprefix(f"{name}-") for each in names if each.startswith(f"{name}-")]
    numbers = [int(end) for end in ends if re.fullmatch("[1-9][0-9]*", end)]
    return max((number for number in numbers if _is_taken(folder / f"{name}-{number}")), default=0)


def _is_taken(path: Path) -> bool:
    """Whether anything is there but the lock of a run that did not begin (a model could not be loaded, say)."""
    if not path.is_dir() or [entry.name for entry in path.iterdir()] != [LOCK]:
        return path.exists()
    return RunDir(path).is_locked()
