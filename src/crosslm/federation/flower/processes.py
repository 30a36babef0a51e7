"""Processes of Flower's as children of ours: starting them with the right environment, and noticing when they die."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from crosslm.errors import FederationError, PassingError
from crosslm.federation.flower.proxies import THIS_MACHINE
from crosslm.federation.kits import KIT, QUIET

RESTART = 5.0  # seconds before a process that died is started again
START_TIME = 300.0  # seconds that a process may take until it answers; a busy machine needs minutes
PORT_TIME = 10.0  # seconds in which what an earlier start left behind may let go of its port
FLWR_TRIES, FLWR_TIME = 3, 300.0  # of a command of flwr's, and seconds that it may take
CACHE = "CROSSLM_CACHE"
Note = Callable[[str], None]


@dataclass
class Child:
    """A process of Flower's, its log, and whether it runs."""

    name: str
    command: list[str]
    kit: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    offset: int = field(default=0, init=False)
    """Where in the log this start's words begin."""

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.kit / "logs" / f"{self.name}.log"

    def start(self) -> None:
        """Start it; what an earlier start left behind is ended first."""
        self.log.parent.mkdir(exist_ok=True)
        self.end_orphan()
        with self.log.open("ab") as log:
            self.offset = log.tell()
            self.process = subprocess.Popen(
                self.command, env=environment(self.kit), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

        self._pid_file.write_text(str(self.process.pid))

    @property
    def _pid_file(self) -> Path:
        return self.kit / "logs" / f"{self.name}.pid"

    def end_orphan(self) -> None:
        """End the process that an earlier start left behind when it was killed: it would keep the port."""
        try:
            orphan = psutil.Process(int(self._pid_file.read_text()))
            if orphan.cmdline()[-len(self.command) + 1 :] != self.command[1:]:
                return  # the number was given to another process
            started = _descendants(orphan.pid)
            orphan.terminate()
        except (OSError, ValueError, psutil.Error):
            return
        psutil.wait_procs([orphan], timeout=15)
        for process in (orphan, *started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([orphan, *started], timeout=5)  # its port is free when it is gone

    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def died(self) -> bool:
        """Whether it was started and runs no more."""
        return self.process is not None and self.process.poll() is not None

    def listens_on(self, port: int) -> bool:
        """Whether this process, and no other one, listens on a port of this machine."""
        if self.process is None or not self.runs():
            return False
        try:
            found = psutil.net_connections("tcp")
        except psutil.AccessDenied:  # macOS tells it to root alone
            return True
        pid, state = self.process.pid, psutil.CONN_LISTEN
        return any(each.pid == pid and each.status == state and each.laddr.port == port for each in found)

    def stop(self) -> None:
        """End it and what it has started, and wait; it is then as if it had never been started."""
        if self.process is not None and self.runs():
            self._end(self.process)
        self.process = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        started = _descendants(process.pid)
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for each in started:  # Flower's processes end with their parent, if nothing keeps them
            with suppress(psutil.NoSuchProcess):
                each.kill()

    def words(self) -> str:
        """What it wrote since it was started."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self.offset)
            return log.read().decode("utf-8", errors="replace").strip()

    def last_words(self, lines: int = 60) -> str:
        """The last lines of that."""
        return "\n".join(self.words().splitlines()[-lines:])


def _descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, and these have."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def environment(kit: Path) -> dict[str, str]:
    """The environment of Flower's processes: nothing is reported anywhere, nothing is asked of the internet."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # they call each other
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, "PATH": path, **settings_of(kit)}


def settings_of(kit: Path) -> dict[str, str]:
    """What in that environment is of this kit, what keeps Flower quiet, and that no proxy is asked for this machine."""
    told = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *THIS_MACHINE]
    direct = dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(filter(None, told)))
    own = {**QUIET, **direct, "FLWR_HOME": str(kit.absolute() / "flower"), KIT: str(kit.absolute())}
    return own | ({CACHE: str(Path(os.environ[CACHE]).absolute())} if CACHE in os.environ else {})


def program(name: str) -> str:
    """Path of a program of Flower's: beside this Python, or on the path.

    Raises:
        FederationError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FederationError(f"{name} is not installed: pip install 'crosslm[federation]'")
    return found


def flwr(kit: Path, *arguments: str) -> None:
    """Run a command of ``flwr`` to its end.

    Raises:
        PassingError: it failed.
    """
    command = [program("flwr"), *arguments]
    said = ""
    for attempt in range(FLWR_TRIES):
        time.sleep(RESTART if attempt else 0)
        try:
            done = subprocess.run(
                command, env=environment(kit), capture_output=True, text=True, check=False, timeout=FLWR_TIME
            )
        except subprocess.TimeoutExpired:
            said = f"it did not end in {FLWR_TIME:.0f} s"
            continue
        if not done.returncode:
            return
        said = (done.stdout + done.stderr).strip()[-800:]
    raise PassingError(f"flwr {' '.join(arguments)} failed {FLWR_TRIES} times, start it again:\n{said}")


def wait_for_port(host: str, port: int, child: Child) -> None:
    """Wait until a process listens.

    Raises:
        FederationError: it ended.
        PassingError: it takes too long.
    """
    end = time.time() + START_TIME
    while time.time() < end:
        if child.died():
            raise FederationError(f"{child.name} ended at its start:\n{child.last_words()}")
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise PassingError(f"{child.name} does not listen on {host}:{port} after {START_TIME:.0f} s; look at {child.log}")


def wait_until_free(host: str, port: int) -> bool:
    """Wait for a moment until nobody has a port; whether that is so."""
    end = time.monotonic() + PORT_TIME
    while not is_free(host, port):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def is_free(host: str, port: int) -> bool:
    """Whether a process that starts now can listen on a port."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not count
        try:
            tried.bind((host, port))
        except OSError:
            return False
    return True


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_on_sigterm() -> None:
    """Let the usual signal of service managers end this process by way of its clean-up, which a second one leaves."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
