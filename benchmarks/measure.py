"""What the benchmarks share: timing two sides in turn, memory of a process of its own, and the last line.

A time here is a ratio's half: both sides run in one process, in turn (TRL in its own, between two blocks of ours, and
each side of a busy machine), so that a machine that is slow for a while is slow for both. Memory is the largest
resident size of a process: of another one that does one thing (:func:`peak_of`), or of the script's own with all that
it did (:func:`peak_memory`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, provenance

from crosslm.models.dtypes import fast_dtype

BY_DTYPE = ("generation", "update", "families", "leads", "slm", "arrival")
"""Scripts that multiply in what ``dtype = "auto"`` means."""


def arguments(description: str, **more: dict) -> argparse.Namespace:
    """The options that every script has, and its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, to see that it runs (about two minutes)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--keep", action="store_true", help="write the figures to benchmarks/results/")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    options = parser.parse_args()
    if options.quick and options.keep:
        parser.error("--quick measures too little to be kept")
    options.origin = provenance()  # the commit as it is now, and not when the figures are there
    return options


def in_turn(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each side; every side runs once before, unmeasured.

    A side that returns a float has measured itself: it returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            own = side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return seconds


def agree(differences: dict[str, tuple[float, float]]) -> None:
    """Find out that the sides did the same work, or their times mean nothing; to be asked before :func:`finish`.

    Args:
        differences: by what differs: by how much, and how much is allowed.

    Raises:
        SystemExit: something differs by more.
    """
    wrong = [
        f"{what}: {found:.3g}, at most {allowed:g} is allowed"
        for what, (found, allowed) in differences.items()
        if not found <= allowed  # so that nan is wrong too
    ]
    if wrong:
        raise SystemExit(f"the sides do not agree, so no figures are given: {'; '.join(wrong)}")


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "repeats": len(values),
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Median over repeats of ``over / under``, each pair taken one after the other."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 2)


def matrix_rate(device: str = "cpu", size: int = 2048) -> float:
    """Floating-point operations a second of a large fp32 matrix product: the best of eight."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = min(in_turn({"product": lambda: left @ right}, 8)["product"])
    return 2 * size**3 / best


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Not ``ru_maxrss`` where Linux says better: a child takes that over from the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(script: str, *options: str) -> int:
    """Largest resident size of another run of a script, which prints it as its last word."""
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def kept_as(name: str, device: str) -> str:
    """Under what name a script's figures are kept.

    Those of a processor on which ``dtype = "auto"`` is float32 stand beside those of others, since they are of other
    arithmetic.
    """
    if device != "cpu":
        return f"{name}-{device}"
    return f"{name}-float32" if name in BY_DTYPE and fast_dtype(device) == torch.float32 else name


def finish(name: str, figures: dict, options: argparse.Namespace) -> None:
    """Print the figures as the last line; write them where asked.

    What was kept before is not overwritten by fewer figures, of a run without one of the options of the script.
    """
    figures = {**options.origin, "threads": torch.get_num_threads(), "quick": options.quick, **figures}
    if options.device != "cpu":
        figures |= {"machine": torch.cuda.get_device_name(), "peak_device_bytes": torch.cuda.max_memory_allocated()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.keep:
        kept = RESULTS / f"performance-{kept_as(name, options.device)}.json"
        missing = sorted(json.loads(kept.read_text()).keys() - figures.keys()) if kept.exists() else []
        if missing:
            print(json.dumps(figures))
            sys.exit(f"{kept} was not written: this run has no {', '.join(missing)}, which it has; see --help")
        kept.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
