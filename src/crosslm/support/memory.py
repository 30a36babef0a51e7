"""Memory that is free, for other processes."""

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Have the C library give the system what this process has freed; nothing where it has no such call.

    glibc keeps much of what large tensors of different sizes leave behind, and more of it with each SLM of some hundred
    megabytes that a server meets.
    """
    with suppress(OSError, AttributeError):  # other C libraries do without
        ctypes.CDLL(None).malloc_trim(0)
