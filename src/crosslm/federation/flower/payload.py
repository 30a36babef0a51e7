"""Bytes of a message as Flower arrays and back."""

from collections.abc import Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord

from crosslm.errors import UploadError

PART = 16 * 2**20  # bytes; Flower itself cuts each array into parts of some 5 MB
DTYPE, KIND = "uint8", "crosslm.bytes"
"""Of our arrays: bytes as they are. NumPy's own format would copy them twice on each side."""


def split(data: bytes | Path) -> ArrayRecord:
    """The bytes, or those of a file, in arrays of at most 16 MiB, so that neither side needs the whole twice."""
    parts = _read(data) if isinstance(data, Path) else _cut(data)
    return ArrayRecord({f"{place:06}": Array(DTYPE, (len(part),), KIND, part) for place, part in enumerate(parts)})


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


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while part := file.read(PART):
            yield part


def _cut(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), PART):
        yield bytes(view[start : start + PART])


def _part(array: Array, name: str) -> bytes:
    data = bytes(array.data)
    found, right = (array.dtype, array.stype, array.shape), (DTYPE, KIND, (len(data),))
    if found != right:
        raise UploadError(f"its array {name[:20]!r} says that it is {str(found)[:80]}; {right} is needed")
    return data
