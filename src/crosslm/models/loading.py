"""Turning whatever a model library raises for a damaged or foreign folder into an error that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from crosslm.errors import CrosslmError, ModelError


@contextmanager
def loading(what: str, writer: str = "save_pretrained") -> Iterator[None]:
    """Load a model within it.

    Any exception, since the libraries agree on none: a truncated file, a configuration with a wrong type and
    weights of another shape each raise a class of their own.

    Args:
        what: the key and the folder, and what it cannot be loaded as.
        writer: what writes such folders.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        yield
    except CrosslmError:
        raise
    except Exception as error:
        raise ModelError(
            f"{what}: {type(error).__name__}: {error}\n"
            f"Give a whole folder written by {writer}, a hub id (with network), or package:MODULE."
        ) from error
