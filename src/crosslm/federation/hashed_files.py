"""Files of the server's spool, which are known by their SHA-256: written whole or not at all, and read as they were."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from crosslm.errors import FederationError, RunError
from crosslm.support.files import partial_of, parts_of, write_whole


def write_hashed(path: Path, parts: Iterable[bytes]) -> tuple[str, int]:
    """Write a file whole or not at all; gives its SHA-256 and its size in bytes.

    Raises:
        RunError: it cannot be written.
    """
    digest = hashlib.sha256()

    def counted() -> Iterator[bytes]:
        for part in parts:
            digest.update(part)
            yield part

    try:
        write_whole(path, counted())
    except OSError as error:
        raise unwritable(path, error.strerror or str(error)) from error
    finally:
        partial_of(path).unlink(missing_ok=True)  # of one that was too large, or did not fit
    return digest.hexdigest(), path.stat().st_size


def unwritable(path: Path, why: str) -> RunError:
    """The error of a file that cannot be written."""
    return RunError(
        f"{path}: cannot be written: {why}; nothing that was received is lost: make room there, and give the same "
        "command (crosslm server) again"
    )


def unchanged(path: Path, expected: str) -> Iterator[bytes]:
    """The bytes of a file, part by part.

    Raises:
        FederationError: it cannot be read, or has another SHA-256; this is known after the last part.
    """
    hashed = hashlib.sha256()
    try:
        for part in parts_of(path):
            hashed.update(part)
            yield part
    except OSError as error:
        raise FederationError(f"{path}: cannot be read: {error}; put it back from a backup") from error
    digest = hashed.hexdigest()
    if digest != expected:
        raise FederationError(
            f"{path}: has changed since it was written (SHA-256 {digest[:12]}, not {expected[:12]}); "
            "put it back from a backup"
        )
