"""Bytes of a message as Flower arrays and back."""

from collections.abc import Iterator

import numpy as np
from flwr.app import Array, ArrayRecord

PART = 16 * 2**20  # bytes; Flower itself cuts each array into parts of some 5 MB


def split(data: bytes) -> ArrayRecord:
    """The bytes in arrays of at most 16 MiB, so that neither side needs the whole twice."""
    view = memoryview(data)
    parts = range(0, len(data), PART)
    return ArrayRecord(
        {f"{place:06}": Array(np.frombuffer(view[start : start + PART], np.uint8)) for place, start in enumerate(parts)}
    )


def joined(arrays: ArrayRecord) -> Iterator[bytes]:
    """The bytes again, part by part; each array is let go when it was read."""
    for name in sorted(arrays):
        yield arrays.pop(name).numpy().astype(np.uint8, copy=False).tobytes()
