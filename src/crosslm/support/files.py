"""Writing a file whole or not at all, for everything that must survive a crash; and working in a folder alone."""

import difflib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from tempfile import mkdtemp

PARTIAL = ".partial"
ASIDE = "~old" + PARTIAL
"""What is put after the name of a folder while a new one takes its place; no client's name has a ~ in it."""
PART = 16 * 2**20  # bytes of a large file that are held at a time


def disk_error(error: Exception) -> str | None:
    """Why the system did not let something be written, if an exception is of that.

    safetensors and tokenizers have exceptions of their own that are no OSError; the system's number is in their words.
    """
    if isinstance(error, OSError) and error.errno is not None:  # transformers raises it for files that are not there
        return error.strerror
    return str(error) if "(os error " in str(error) else None


def is_full(error: Exception) -> bool:
    """Whether an exception of :func:`disk_error` is of a disk that is full, or of a limit on what may be on it."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


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


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written under another name, bring it to the disk, and give it its name.

    Where a process dies between moving the old folder aside and naming the new one, :func:`settle_folder`, which the
    next call does too, puts the old one back.

    Args:
        target: a folder that is there is replaced.
        write: writes the folder that it is given.

    Raises:
        OSError: it cannot be written; what was there before is still there. So it is if ``write`` raises anything.
    """
    partial, aside = partial_of(target), _aside_of(target)
    settle_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if target.exists():
            target.rename(aside)
        rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its bytes are wanted
        _settle(aside)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def settle_folder(target: Path) -> None:
    """Put right what a process that died in :func:`replace_folder` has left: the old folder is there, or the new one.

    Raises:
        OSError: it cannot be put right.
    """
    _settle(_aside_of(target))
    _settle(partial_of(target))


def clear_partial(folder: Path) -> None:
    """Take away whatever is half written in a folder and below, and settle each folder (:func:`settle_folder`)."""
    for leftover in sorted(folder.rglob("*" + PARTIAL), reverse=True):
        _settle(leftover)


def _aside_of(target: Path) -> Path:
    return target.with_name(target.name + ASIDE)


def _settle(leftover: Path) -> None:
    """Delete what a process that died has left; a folder that it had moved aside gets its name back if that is free."""
    whole = leftover.with_name(leftover.name.removesuffix(ASIDE))
    if leftover.name.endswith(ASIDE) and leftover.exists() and not whole.exists():
        leftover.rename(whole)
        sync(whole.parent)
    elif leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover)
    else:
        leftover.unlink(missing_ok=True)


@contextmanager
def made_beside(target: Path) -> Iterator[Path]:
    """A new folder for its owner alone, which gets the name of ``target`` when all is written, or is deleted.

    Until then its name is one that nothing beside ``target`` has.

    Args:
        target: not there, or an empty folder, which is replaced.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(PARTIAL, f"{target.name}.", target.parent))
    try:
        yield work
        rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line whole or not at all; half a line, which a process that was killed has left, is cut off first.

    Raises:
        OSError: it cannot be written; the lines before it are still there.
    """
    with path.open("a+b", buffering=0) as file:
        size = _size_of_lines(file)
        file.truncate(size)
        try:
            data = memoryview((line + "\n").encode("utf-8"))
            while data:
                data = data[file.write(data) :]
        except BaseException:  # Ctrl-C too
            file.truncate(size)
            raise


def _size_of_lines(file: FileIO) -> int:
    """How many bytes of a file are lines with an end."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.readall().rfind(b"\n") + 1


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that :func:`append_line` writes, but for one that is half written; none if it is not there.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [line.decode("utf-8") for line in lines]


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
    """Give a file or folder another name in the same folder, in the place of what had it; bring that to the disk."""
    path.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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


def is_held(lock: Path) -> bool:
    """Whether a process holds :func:`alone`'s lock; nothing is written."""
    if not lock.exists():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``~user`` replaced; one of a user that is not known is left as it is, and not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def missing(path: Path) -> str:
    """That a path is not there, with what stands beside it under a similar name."""
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:  # no folder, or one that may not be read
        beside = []
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
