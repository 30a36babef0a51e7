"""A busy machine: how much longer the same work takes when another process wants a core, and what waiting costs.

The threads of one matrix product wait for each other. GNU's OpenMP, which torch has on Linux, lets them turn in a loop
300,000 times first (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html); where another process has one of
the cores they turn while the thread that they wait for has none. ``crosslm`` has them turn a thousand times and then
sleep.

The same texts, written by the demo's LLM in a process of its own, whose loading is not measured: with OpenMP as it is
and as the command has it, on a machine that has nothing else to do and beside processes that keep half its cores busy,
each in a session of its own, as another user's would be. Checked: all write the same tokens.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from generation import NEW_TOKENS, demo_llm, prompts_for, sampling
from measure import agree, arguments, finish, ratio, spread

from crosslm.cli.main import SPINS

SIDES = ("idle", "idle_ours", "busy", "busy_ours")
TEXTS = 16


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that never wait, and end with this one, whatever ends it."""
    turning = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
    others = [subprocess.Popen(turning, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def work(tokens: int) -> None:
    """In the process of a side: print its seconds, and a digest of what it wrote."""
    llm = demo_llm(False, "cpu")
    prompts, how = prompts_for(llm, TEXTS), sampling().model_copy(update={"max_new_tokens": tokens})
    llm.generate(prompts[:2], range(2), how)
    started = time.perf_counter()
    rows = llm.generate(prompts, range(TEXTS), how)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, hashlib.sha256(repr(rows).encode()).hexdigest()]))


def measured(side: str, tokens: int) -> tuple[float, str]:
    """Seconds of one side, and the digest of what it wrote."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    if side.endswith("ours"):
        environment["GOMP_SPINCOUNT"] = SPINS
    command = [sys.executable, __file__, "--work", str(tokens)]
    with neighbours(max(1, (os.cpu_count() or 2) // 2) if side.startswith("busy") else 0):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, digest = json.loads(done.stdout.splitlines()[-1])
    return seconds, digest


def main() -> None:
    """Measure the four in turn."""
    options = arguments(__doc__, work={"type": int, "metavar": "TOKENS", "help": "be the process of a side"})
    if options.work:
        work(options.work)
        return
    tokens, idle, busy = (4, 1, 1) if options.quick else (NEW_TOKENS, 8, 2)  # busy takes minutes, as OpenMP is
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    digests = set()
    for repeat in range(idle):
        for side in SIDES if repeat < busy else SIDES[:2]:
            found, digest = measured(side, tokens)
            seconds[side].append(found)
            digests.add(digest)
    agree({"different texts": (len(digests) - 1, 0)})
    figures = {
        "ratio_idle": ratio(seconds["idle"], seconds["idle_ours"]),
        "ratio_busy": ratio(seconds["busy"], seconds["busy_ours"]),
        "slower_when_busy": round(median(seconds["busy_ours"]) / median(seconds["idle_ours"]), 2),
        "slower_when_busy_as_it_is": round(median(seconds["busy"]) / median(seconds["idle"]), 2),
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "texts": TEXTS,
        "new_tokens": tokens,
        "spins": int(SPINS),
    }
    finish("busy", figures, options)


if __name__ == "__main__":
    main()
