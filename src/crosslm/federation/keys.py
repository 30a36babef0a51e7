"""Silos' keys, as their fingerprints: how a silo asks its server whether it is known there."""

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crosslm.errors import FederationError

ASKED_AT = "/v1/crosslm/silos/"
"""Of the gateway; a fingerprint follows. 200: the server's kit has this key, and the body is how many of its silo's
rounds are complete, their last answers received, a blank, that silo's name, and " over" if nothing more is sent to
it; 403: it has not."""


def exposed(key: Path) -> str | None:
    """Why a private key is a secret no more on this machine; None where it is one, or is not there."""
    if key.is_file() and key.stat().st_mode & 0o077:
        return f"{key} can be read by others on this machine: chmod 600 {key}"
    return None


def fingerprint(key: Path) -> str:
    """SHA-256 of the public key in an OpenSSH file, or of that which belongs to the private one in it.

    Raises:
        FederationError: the file is not there or holds no such key.
    """
    try:
        return fingerprint_of(key.read_bytes(), key)
    except OSError as error:
        raise FederationError(
            f"{key}: cannot be read: {error.strerror}; unpack the kit again, or ask for a new one"
        ) from error


def fingerprint_of(data: bytes, key: Path) -> str:
    """:func:`fingerprint` of a file that was read.

    Raises:
        FederationError: it holds no such key.
    """
    try:
        if key.suffix == ".pub":
            public = serialization.load_ssh_public_key(data)
        else:
            public = serialization.load_ssh_private_key(data, password=None).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FederationError(
            f"{key}: is not a key as crosslm provision makes them: {error}; unpack the kit again, or ask for a new one"
        ) from error
    return hashlib.sha256(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)).hexdigest()
