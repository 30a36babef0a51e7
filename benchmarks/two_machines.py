"""The commands of docs/deploy.md on machines that share nothing but a network: a network namespace for each party.

Needs Linux, root and iproute2 (`ip`, `ss`). The server and each of two silos have interfaces, ports, home and kit of
their own, no way to anywhere else, and no port of a kit is changed. The link of the second silo is cut for `--cut`
seconds as soon as it has been asked for its upload, and once more when its upload has arrived. The models are tiny and
random.

With `--keep` the figures are written to benchmarks/results/two-machines.json.

Keys: `exit_codes` of every command; `arrivals` (silo, state, seconds from the server's start); `listening` (addresses
but loopback that the processes of a party took connections at, seen twice a second); `cut` (seconds, each time).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w
from federation_live import tiny, write_rows
from measure import arguments
from results import keep

from crosslm.federation.spool import Spool

SILOS = ("north", "south")
SERVER = "server"
NETWORK, PORT = "10.87.0", 9400
PATIENCE = 600.0  # seconds


def space(party: str) -> str:
    """The name of a party's network namespace."""
    return f"crosslm-{party}"


def ip(*words: str) -> None:
    """A command of iproute2 that must succeed."""
    subprocess.run(["ip", *words], check=True)


def connect() -> None:
    """A namespace for each party; a bridge in the server's, which each silo's one interface leads to."""
    for party in (SERVER, *SILOS):
        ip("netns", "add", space(party))
        ip("-n", space(party), "link", "set", "lo", "up")
    ip("-n", space(SERVER), "link", "add", "bridge", "type", "bridge")
    ip("-n", space(SERVER), "address", "add", f"{NETWORK}.1/24", "dev", "bridge")
    ip("-n", space(SERVER), "link", "set", "bridge", "up")
    for place, silo in enumerate(SILOS):
        ends = ("eth0", "netns", space(silo)), (f"to-{silo}", "netns", space(SERVER))
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        ip("-n", space(SERVER), "link", "set", f"to-{silo}", "master", "bridge", "up")
        ip("-n", space(silo), "address", "add", f"{NETWORK}.{place + 2}/24", "dev", "eth0")
        ip("-n", space(silo), "link", "set", "eth0", "up")


def disconnect() -> None:
    """Remove what is left of the namespaces."""
    for party in (SERVER, *SILOS):
        subprocess.run(["ip", "netns", "delete", space(party)], check=False, stderr=subprocess.DEVNULL)


def cut(silo: str, seconds: float) -> None:
    """The cable is out for a while."""
    ip("-n", space(SERVER), "link", "set", f"to-{silo}", "down")
    time.sleep(seconds)
    ip("-n", space(SERVER), "link", "set", f"to-{silo}", "up")


def command(folder: Path, party: str, *words: str) -> list[str]:
    """One of ours at a party."""
    home = folder / f"home-{party}"
    home.mkdir(exist_ok=True)
    own = {"HOME": str(home), "CROSSLM_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "crosslm.cli.main", *words]
    return ["ip", "netns", "exec", space(party), "env", *(f"{name}={value}" for name, value in own.items()), *program]


def listening(party: str) -> set[str]:
    """Addresses but loopback that connections are taken at there, now."""
    told = subprocess.run(
        ["ip", "netns", "exec", space(party), "ss", "-ltnH"], capture_output=True, text=True, check=True
    )
    addresses = {line.split()[3] for line in told.stdout.splitlines()}
    return {each for each in addresses if not each.startswith(("127.", "[::1]", "[::ffff:127."))}


class Machines:
    """The parties at work."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.codes = folder, {}
        self.running: dict[str, subprocess.Popen] = {}
        self.listening: dict[str, set[str]] = {party: set() for party in (SERVER, *SILOS)}

    def kit(self, party: str) -> str:
        """Its folder."""
        return str(self.folder / "kits" / (SERVER if party == SERVER else f"silos/{party}"))

    def do(self, party: str, *words: str) -> None:
        """A command that ends by itself."""
        log = self.folder / f"{party}-{words[0]}.log"
        with log.open("ab") as file:
            done = subprocess.run(command(self.folder, party, *words), stdout=file, stderr=file, check=False)
        self.codes[f"{party}: {' '.join(word for word in words if '/' not in word)}"] = done.returncode

    def start(self, party: str, word: str) -> None:
        """A command that serves."""
        with (self.folder / f"{party}.log").open("ab") as log:
            own = command(self.folder, party, word, self.kit(party))
            self.running[party] = subprocess.Popen(own, stdout=log, stderr=log)

    def until(self, happened: Callable[[Spool], bool], what: str) -> None:
        """Look twice a second who listens where, until something has happened."""
        end = time.monotonic() + PATIENCE
        while True:
            for party in self.listening:
                self.listening[party] |= listening(party)
            spool = Spool(self.folder / "kits" / SERVER / "spool")
            try:
                if happened(spool):
                    return
            finally:
                spool.close()
            died = [party for party, process in self.running.items() if process.poll()]
            if died or time.monotonic() > end:
                sys.exit(f"{what} did not happen ({died or 'nobody'} ended with an error); logs are in {self.folder}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End what still runs."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def run(folder: Path, seconds: float) -> dict:
    """From nothing to a finished run."""
    (folder / "federation.toml").write_text(tomli_w.dumps(tiny(folder, 1.0, list(SILOS), 1)))
    machines = Machines(folder)
    address = f"{NETWORK}.1:{PORT}"
    machines.do(
        SERVER, "provision", str(folder / "federation.toml"), "--address", address, "--output", str(folder / "kits")
    )
    for silo in SILOS:
        write_rows(Path(machines.kit(silo)))
    try:
        machines.do(SERVER, "doctor", machines.kit(SERVER))
        machines.start(SERVER, "server")
        machines.until(lambda spool: bool(spool.fact("started")), "the server's start")
        for silo in SILOS:
            machines.do(silo, "doctor", machines.kit(silo))
            machines.do(silo, "client", machines.kit(silo), "--dry-run")
            machines.start(silo, "client")
            machines.do(silo, "status", machines.kit(silo))
        last = SILOS[-1]
        machines.until(lambda spool: "asked for" in (spool.fact(f"silo/{last}") or ""), "a request")
        cut(last, seconds)
        machines.until(lambda spool: bool(spool.of(last)), "an upload after the cut")
        cut(last, seconds)
        machines.do(SERVER, "status", machines.kit(SERVER))
        machines.until(
            lambda _: all(process.poll() is not None for process in machines.running.values()), "the end of all parties"
        )
        for silo in SILOS:
            machines.do(silo, "predict", machines.kit(silo), str(Path(machines.kit(silo)) / "rows.csv"))
        finished = f"{machines.kit(SERVER)}/run"
        machines.do(SERVER, "report", finished)
        machines.do(SERVER, "generate", finished, "-n", "4")
        machines.do(SERVER, "export", finished, str(folder / "shared"))
    finally:
        machines.stop()
    codes = {party: process.returncode for party, process in machines.running.items()}
    spool = Spool(folder / "kits" / SERVER / "spool")
    began = float(spool.fact("started") or 0)
    arrivals = [[each.silo, each.state, round((each.delivered_at or 0) - began, 1)] for each in spool.arrivals()]
    spool.close()
    return {
        "exit_codes": machines.codes | codes,
        "arrivals": arrivals,
        "listening": {party: sorted(found) for party, found in machines.listening.items()},
        "cut": [seconds, seconds],
    }


def main() -> None:
    """Try it."""
    options = arguments(__doc__, cut={"type": float, "default": 30.0, "help": "seconds without a link (30)"})
    if os.geteuid() != 0:
        sys.exit("network namespaces need root; run: sudo python benchmarks/two_machines.py")
    folder = Path(tempfile.mkdtemp())
    disconnect()
    connect()
    try:
        figures = run(folder, 5.0 if options.quick else options.cut)
    finally:
        disconnect()
    figures = options.origin | figures
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.keep:
        keep("two-machines", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
