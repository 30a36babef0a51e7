"""What the disk does not let be written is an error in words that names the file and says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosslm.errors import CrosslmError, RunError
from crosslm.support.files import disk_error


@contextmanager
def writing(target: Path, hint: str) -> Iterator[None]:
    """Write a file or folder within it.

    Args:
        target: what is written.
        hint: what to do beside making room.

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
        raise RunError(f"{target}: cannot be written: {why}; make room there, {hint}") from error
