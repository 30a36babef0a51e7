"""Names of run folders that a user has not named."""

from pathlib import Path

from crosslm.runs.rundir import CONFIG, LOCK, SEEDS, SUMMARY, RunDir


def next_free(folder: Path, name: str) -> Path:
    """``folder/name-1``, or the next number that is free."""
    number = 1
    while _is_taken(folder / f"{name}-{number}"):
        number += 1
    return folder / f"{name}-{number}"


def _is_taken(path: Path) -> bool:
    """Whether anything is there but the lock of a run that did not begin (a model could not be loaded, say)."""
    if not path.is_dir() or [entry.name for entry in path.iterdir()] != [LOCK]:
        return path.exists()
    return RunDir(path).is_locked()


def last_seeds(folder: Path, name: str) -> Path | None:
    """The newest of ``folder/name-1``, ``-2``, ... if it has runs of several seeds that are not all complete."""
    number = 1
    while _is_taken(folder / f"{name}-{number}"):
        number += 1
    last = folder / f"{name}-{number - 1}"
    return last if any(last.glob(f"seed-*/{CONFIG}")) and not (last / SEEDS).exists() else None


def last_unfinished(folder: Path, name: str) -> Path | None:
    """The newest of ``folder/name-1``, ``-2``, ... if its run is not complete."""
    number = 1
    while _is_taken(folder / f"{name}-{number}"):
        number += 1
    last = folder / f"{name}-{number - 1}"
    return last if number > 1 and (last / CONFIG).is_file() and not (last / SUMMARY).exists() else None
