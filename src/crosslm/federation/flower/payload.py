"""Bytes of a message as Flower arrays and back."""

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content

from crosslm.errors import UploadError

DTYPE, KIND = "uint8", "crosslm.bytes"
"""Of our arrays: bytes as they are. NumPy's own format would copy them twice on each side."""


def split(parts: Iterable[bytes]) -> ArrayRecord:
    """Bytes that come in parts, an array each, so that neither side needs the whole twice; Flower cuts them smaller."""
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


@contextmanager
def at_most(most: int) -> Iterator[None]:
    """Within it Flower puts arrays of so many bytes together in this thread, and no more.

    A message may name a chunk of an array any number of times, as one of zeros does, and Flower copies it as often
    before it gives the message out: a megabyte could fill the memory.

    Args:
        most: bytes of all arrays together.

    Raises:
        UploadError: there are more.
    """
    _left.bytes = most
    try:
        yield
    finally:
        del _left.bytes


_left = threading.local()
_inflate = Array.inflate.__func__


def _counted(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
    if children and hasattr(_left, "bytes"):
        ids = get_object_children_ids_from_object_content(content)
        sizes = [len(children[chunk].data) for chunk in ids]
        _left.bytes -= sum(sizes[place] for place in json.loads(get_object_body(content, cls))["arraychunk_ids"])
        if _left.bytes < 0:
            raise UploadError("its message names more bytes than are allowed (intake.max_bytes)")
    array: Array = _inflate(cls, content, children)
    return array


Array.inflate = classmethod(_counted)


def _part(array: Array, name: str) -> bytes:
    data = bytes(array.data)
    found, right = (array.dtype, array.stype, array.shape), (DTYPE, KIND, (len(data),))
    if found != right:
        raise UploadError(
            f"its array {name[:20]!r} says that it is {str(found)[:80]}; {right} is needed: is its crosslm the same as "
            "the server's?"
        )
    return data
