"""The app bundle (FAB) that the server sends: it must be the one that provisioning makes, which holds no code."""

import io
import tomllib
import zipfile
from typing import Any

from crosslm.errors import FederationError
from crosslm.federation.kit_texts import FLOWER_APP

SETTINGS, MANIFEST = "pyproject.toml", ".info/CONTENT"
MAX_BYTES = 2**16  # of the bundle and of each file in it; the genuine ones have some hundred


def check_bundle(data: bytes) -> None:
    """Find out that a bundle is crosslm's own: its settings and Flower's list of files, and nothing else.

    Raises:
        FederationError: it is another one; says what is in it that must not be, or what is not as it must be.
    """
    try:
        found = _settings(data)
    except (zipfile.BadZipFile, UnicodeDecodeError, tomllib.TOMLDecodeError, NotImplementedError, EOFError) as error:
        raise _refusal(f"it cannot be read ({type(error).__name__})") from error
    except (RuntimeError, OSError) as error:  # an encrypted file, or one that lies about where it begins
        raise _refusal(f"it cannot be unpacked ({type(error).__name__})") from error
    if found != tomllib.loads(FLOWER_APP):
        raise _refusal(f"its {SETTINGS} names another app, or other applications than crosslm's")


def _settings(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise _refusal(f"it has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    with zipfile.ZipFile(io.BytesIO(data)) as bundle:
        entries = bundle.infolist()
        names = sorted(entry.filename for entry in entries)
        if names != sorted((SETTINGS, MANIFEST)):
            raise _refusal(f"it holds {', '.join(map(repr, names[:8]))}; allowed are {SETTINGS} and {MANIFEST} alone")
        if any(entry.file_size > MAX_BYTES for entry in entries):
            raise _refusal(f"a file in it is larger than {MAX_BYTES} bytes")
        with bundle.open(SETTINGS) as file:
            return tomllib.loads(file.read(MAX_BYTES).decode("utf-8"))


def _refusal(why: str) -> FederationError:
    return FederationError(
        f"the app that the server sent is not crosslm's and is not used: {why}; this silo must not be served by "
        "that server until its operator knows why (a kit of another version of crosslm is made anew by provision)"
    )
