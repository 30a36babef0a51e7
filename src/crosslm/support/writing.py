"""What the disk does not let be written is an error in words that names the file and says what to do."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crosslm.errors import CrosslmError, RunError
from crosslm.support.files import disk_error, is_full, made_beside


@contextmanager
def writing(target: Path, hint: str) -> Iterator[None]:
    """Write a file or folder within it.

    Args:
        target: what is written.
        hint: what to do beside making room or, where there is room, making it writable.

    Raises:
        RunError: the disk does not let it be written; names it.
    """
    try:
        yield
    except CrosslmError:  # which says of itself what it is about
        raise
    except Exception as error:
        if (why := disk_error(error)) is None:
            raise
        if is_full(error):
            raise RunError(f"{target}: cannot be written: {why}; make room there, {hint}") from error
        raise RunError(f"{target}: cannot be written: {why}; make it writable, {hint}") from error


@contextmanager
def made_anew(target: Path, hint: str) -> Iterator[Path]:
    """A new folder that gets its name when all is written (:func:`crosslm.support.files.made_beside`).

    Args:
        target: not there, or an empty folder, which is replaced.
        hint: as for :func:`writing`.

    Raises:
        RunError: the disk does not let it be made; names it.
    """
    with ExitStack() as made:
        with writing(target, hint):
            work = made.enter_context(made_beside(target.resolve()))
        yield work
