"""Bytes of a message as Flower arrays and back."""

from collections.abc import Iterator

import numpy as np
from flwr.app import Array, ArrayRecord

from crosslm.errors import UploadError

PART = 16 * 2**20  # bytes; Flower itself cuts each array into parts of some 5 MB


def split(data: bytes) -> ArrayRecord:
    """The bytes in arrays of at most 16 MiB, so that neither side needs the whole twice."""
    view = memoryview(data)
    parts = range(0, len(data), PART)
    return ArrayRecord(
        {f"{place:06}": Array(np.frombuffer(view[start : start + PART], np.uint8)) for place, start in enumerate(parts)}
    )


def joined(arrays: ArrayRecord, most: int) -> Iterator[bytes]:
    """The bytes again, part by part; each array is let go when it was read.

    Args:
        arrays: of :func:`split`, if the other side is honest.
        most: bytes that the whole may have (``intake.max_bytes``).

    Raises:
        UploadError: an array is none of :func:`split`'s, or the whole has more bytes.
    """
    size = 0
    for name in sorted(arrays):
        part = _part(arrays.pop(name), name)
        size += len(part)
        if size > most:
            raise UploadError(f"the message has more than {most} bytes; no more are allowed (intake.max_bytes)")
        yield part


def _part(array: Array, name: str) -> bytes:
    try:
        read = array.numpy()
    except Exception as error:
        raise UploadError(f"its array {name[:20]!r} cannot be read: {type(error).__name__}: {error}"[:200]) from error
    if read.dtype != np.uint8 or read.ndim != 1:
        raise UploadError(f"its array {name[:20]!r} is of {read.dtype} in {read.ndim} dimensions; bytes are needed")
    return bytes(read.tobytes())
