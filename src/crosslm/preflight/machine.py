"""What a machine has for crosslm: Python, packages, room on its disk, a device. What is found, and what to do."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from crosslm.errors import CrosslmError
from crosslm.models.sources import resolve_device
from crosslm.preflight.memory import available, in_gib

Level = Literal["ok", "warning", "error"]
OLDEST_PYTHON = (3, 11)
SOME_DISK = 2 * 2**30
OPTIONAL = {"demo": "the demo's models", "datasets": "hf: data and the export of synthetic text"}
"""Extras whose packages are looked for, and what needs them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    message: str
    """What was found and, unless all is well, what to do."""

    def __str__(self) -> str:
        """Without its level."""
        return f"{self.subject}: {self.message}"


def python() -> Finding:
    """Whether this Python will do."""
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        return Finding("error", "python", f"{platform.python_version()}; crosslm needs {needed} or newer: install one")
    return Finding("ok", "python", platform.python_version())


def packages(needed: str | None = None) -> Iterator[Finding]:
    """Whether what crosslm needs is installed, in a version that it knows.

    Args:
        needed: an extra without which the purpose at hand cannot be served.
    """
    shown = []
    for line in requires("crosslm") or []:
        requirement = Requirement(line)
        extra = _extra(requirement)
        if extra not in (None, needed, *OPTIONAL) or (requirement.marker and not _applies(requirement, extra)):
            continue
        wanted = f"pip install 'crosslm{f'[{extra}]' if extra else ''}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            what = f"not installed; {f'only {OPTIONAL[extra]} need it: ' if extra in OPTIONAL else ''}{wanted}"
            yield Finding("warning" if extra in OPTIONAL else "error", f"package {requirement.name}", what)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            message = f"{found} is installed, {requirement.specifier} is needed: {wanted}"
            yield Finding("warning" if extra in OPTIONAL else "error", f"package {requirement.name}", message)
        elif not extra:
            shown.append(f"{requirement.name} {found}")
    yield Finding("ok", "packages", ", ".join(shown))


def disk(folder: Path, what: str, is_needed: bool = True) -> Finding:
    """Whether there is room where files will be written; ``is_needed``: nothing can be done where none may be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    message = f"{in_gib(free)} free for the {what}, {folder}"
    if not os.access(there, os.W_OK):
        advice = f"{folder}: cannot be written to; choose another {what}"
        if is_needed:
            return Finding("error", "disk", advice)
        return Finding("warning", "disk", f"{advice}, or have each model in it before the run")
    if free < SOME_DISK:
        return Finding("warning", "disk", f"{message}; {in_gib(SOME_DISK)} is a good reserve: make room")
    return Finding("ok", "disk", message)


def device(name: str) -> Finding:
    """Whether the device is there, and how much memory it has."""
    try:
        found = resolve_device(name)
    except CrosslmError as error:
        return Finding("error", "device", f'{error}; set device = "auto"')
    cores = f", {os.cpu_count()} cores" if found == "cpu" else ""
    return Finding("ok", "device", f"{found}{cores}, {in_gib(available(found))} of memory free")


def _extra(requirement: Requirement) -> str | None:
    marker = str(requirement.marker or "")
    return marker.split("extra == ")[1].strip("\"'() ") if "extra == " in marker else None


def _applies(requirement: Requirement, extra: str | None) -> bool:
    return bool(requirement.marker and requirement.marker.evaluate({"extra": extra or ""}))
