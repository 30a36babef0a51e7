"""Where a figure comes from: machine, commit, date, and versions of libraries."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from crosslm import __version__

PACKAGE = Path(__file__).parents[1]


def machine(device: str = "cpu") -> str:
    """What the figures were taken on, in words; with the vector instructions that torch uses there."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    used = "no GPU used" if device == "cpu" else _gpu(device)
    processor = f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{os.cpu_count()} cores ({processor}), {platform.system()}, {used}"


def _gpu(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"on {device} ({torch.cuda.get_device_name(device)})"
    return f"on {device}"


def commit() -> str:
    """The commit that this source is of, with ``+changes`` if it is not as committed; ``unknown`` without git."""
    # a virtual environment may lie in another project's checkout: the package itself must be in the repository
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return "unknown" if head is None else head + ("+changes" if changed else "")


def provenance(device: str = "cpu") -> dict[str, str]:
    """Commit, machine and date."""
    return {"commit": commit(), "machine": machine(device), "date": time.strftime("%Y-%m-%d")}


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    packages = ("torch", "transformers", "peft", "sentence-transformers", "tokenizers", "numpy")
    # crosslm itself may be run from its source, not installed
    own = {"python": platform.python_version(), "crosslm": __version__}
    return own | {package: version(package) for package in packages}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
