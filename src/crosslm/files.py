"""Writing a file whole or not at all, for everything that must survive a crash; and working in a folder alone."""

import difflib
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
PART = 16 * 2**20  # bytes of a large file that are held at a time


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file under another name, bring it to the disk, and then give it its name.

    Args:
        path: its folder is made if it is not there; a file that is there is replaced.
        parts: its bytes, taken one after the other.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def parts_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, at most 16 MiB at a time.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        while part := file.read(PART):
            yield part


def partial_of(path: Path) -> Path:
    """Under what name a file is written before it has its own."""
    return path.with_name(path.name + PARTIAL)


def rename(path: Path, target: Path) -> None:
    """Give a file another name in the same folder, in the place of what had it, and bring that to the disk."""
    path.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(lock: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock that no other process can hold meanwhile; a process that dies lets go by itself.

    Args:
        lock: a file, made if it is not there; its folder too.
        wait: until no other process holds it.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
        OSError: the file cannot be written.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``~user`` replaced; one of a user that is not known is left as it is, and not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def missing(path: Path) -> str:
    """That a path is not there, with what stands beside it under a similar name."""
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"{path}: is not there" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def is_running(pid: int) -> bool:
    """Whether there is a process with this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
