"""Bytes of a message as Flower arrays and back."""

from collections.abc import Iterable, Iterator

from flwr.app import Array, ArrayRecord

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


def _part(array: Array, name: str) -> bytes:
    data = bytes(array.data)
    found, right = (array.dtype, array.stype, array.shape), (DTYPE, KIND, (len(data),))
    if found != right:
        raise UploadError(
            f"its array {name[:20]!r} says that it is {str(found)[:80]}; {right} is needed: is its crosslm the same as "
            "the server's?"
        )
    return data
