"""Starting Flower's processes from a kit, with the right flags, and starting again what dies.

The SuperLink keeps its state in memory: what must outlast it is in the server's spool and in the
silos' own folders. When it dies, it starts empty, learns the silos' keys from the kit again, and a
new run goes on where the journal says. (With its state in SQLite, objects of hundreds of megabytes
met "database is locked", and the run failed.)
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from crosslm.errors import FederationError
from crosslm.federation.kits import KIT, QUIET, read_server, read_silo, silo_names
from crosslm.federation.silo import Silo
from crosslm.federation.spool import Spool

RESTART = 5.0  # seconds before a process that died is started again
START_TIME = 120.0  # seconds that a process may take until it answers
REFUSED = "Failed to activate SuperNode"  # what Flower says to a key that it does not know
REFUSED_TIME = 150.0  # seconds of refusals until a silo takes them for final
Note = Callable[[str], None]


@dataclass
class Child:
    """A process of Flower's, its log, and whether it runs."""

    name: str
    command: list[str]
    kit: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    started: float = field(default=0.0, init=False)
    offset: int = field(default=0, init=False)
    """Where in the log this start's words begin."""

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.kit / "logs" / f"{self.name}.log"

    def start(self) -> None:
        """Start it; what an earlier start left behind is ended first."""
        self.log.parent.mkdir(exist_ok=True)
        self._stop_orphan()
        self.started = time.time()
        with self.log.open("ab") as log:
            self.offset = log.tell()
            self.process = subprocess.Popen(
                self.command, env=environment(self.kit), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

        self._pid_file.write_text(str(self.process.pid))

    @property
    def _pid_file(self) -> Path:
        return self.kit / "logs" / f"{self.name}.pid"

    def _stop_orphan(self) -> None:
        """End the process that an earlier start left behind when it was killed: it would keep the port."""
        try:
            orphan = psutil.Process(int(self._pid_file.read_text()))
            if orphan.cmdline()[-len(self.command) + 1 :] == self.command[1:]:
                orphan.terminate()
                orphan.wait(15)
        except (OSError, ValueError, psutil.Error):
            return

    def died(self) -> bool:
        """Whether it was started and runs no more."""
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> None:
        """End it, and wait."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_words(self) -> str:
        """The last lines that it wrote since it was started."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self.offset)
            lines = log.read().decode("utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-60:])


def environment(kit: Path) -> dict[str, str]:
    """The environment of Flower's processes: nothing is reported anywhere, nothing is asked of the internet."""
    quiet = QUIET | {"TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # they call each other
    return {**os.environ, **quiet, "PATH": path, "FLWR_HOME": str(kit / "flower"), KIT: str(kit)}


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


# -- the server ------------------------------------------------------------------------------


class ServerProcesses:
    """SuperLink, gateway and run of a server's kit."""

    def __init__(self, kit: Path, note: Note) -> None:
        self.kit, self.note = kit.absolute(), note
        self.settings = read_server(self.kit)
        for name in ("server.crt", "server.key", "ca.crt"):
            if not (self.kit / name).is_file():
                raise FederationError(f"{self.kit}: has no {name}; name a folder that crosslm provision made")
        self.spool = Spool(self.kit / "spool")
        self.superlink = Child("superlink", superlink_command(self.kit), self.kit)
        self.registered: set[str] = set()
        self.run_asked_at = 0.0

    def run(self) -> list[str]:
        """Keep everything running until the run is complete.

        Returns:
            Silos that have not taken their download.

        Raises:
            FederationError: the configuration, a file or a model of the kit cannot be used.
        """
        self._configure()
        self._start_gateway()
        try:
            self.spool.note("refused", "")
            while self.spool.fact("finished") is None:
                if refused := self.spool.fact("refused"):
                    raise FederationError(f"{self.kit}: the run cannot go on: {refused}")
                self._keep_up()
                time.sleep(1.0)
            time.sleep(2.0)  # the last answers are on their way
        finally:
            self.superlink.stop()
        waiting = self.spool.fact("finished") or ""
        return waiting.split(",") if waiting else []

    def _keep_up(self) -> None:
        if self.superlink.process is None or self.superlink.died():
            if self.superlink.died():
                self.note(f"the SuperLink ended and is started again; its last words:\n{self.superlink.last_words()}")
                time.sleep(RESTART)
            self.superlink.start()
            wait_for_port("127.0.0.1", self.settings.superlink_port, self.superlink)
            self.registered, self.run_asked_at = set(), 0.0
        for silo in silo_names(self.kit):
            if silo not in self.registered:
                self._flwr("supernode", "register", str(self.kit / "silos" / f"{silo}.pub"), "crosslm", "--name", silo)
                self.registered.add(silo)
        if not self._app_runs():
            if self.run_asked_at:
                self.note("the server application ended before the run was complete and is started again")
            self.run_asked_at = time.time()
            self._flwr("run", str(self.kit / "app"), "crosslm")

    def _app_runs(self) -> bool:
        """Whether the application runs, or was started a short time ago."""
        pid, _, started = (self.spool.fact("process") or "0 0").partition(" ")
        if float(started) < self.run_asked_at or not self.run_asked_at:
            return bool(self.run_asked_at) and time.time() - self.run_asked_at < START_TIME
        return is_alive(int(pid))

    def _configure(self) -> None:
        folder = self.kit / "flower"
        folder.mkdir(exist_ok=True)
        text = (
            '[superlink]\ndefault = "crosslm"\n\n[superlink.crosslm]\n'
            f'address = "127.0.0.1:{self.settings.superlink_port}"\nroot-certificates = "{self.kit / "ca.crt"}"\n'
        )
        (folder / "config.toml").write_text(text, encoding="utf-8")

    def _start_gateway(self) -> None:
        from crosslm.federation.flower.gateway import serve

        port = int(self.settings.address.rpartition(":")[2])
        arguments = (self.kit, self.settings.bind, port, self.settings.superlink_port)
        threading.Thread(target=serve, args=arguments, name="gateway", daemon=True).start()
        self.note(f"listening on {self.settings.bind}:{port} for {', '.join(silo_names(self.kit))}")

    def _flwr(self, *arguments: str) -> None:
        command = [program("flwr"), *arguments]
        done = subprocess.run(command, env=environment(self.kit), capture_output=True, text=True, check=False)
        if done.returncode:
            raise FederationError(f"flwr {' '.join(arguments)} failed:\n{(done.stdout + done.stderr).strip()[-800:]}")


def superlink_command(kit: Path) -> list[str]:
    """The command line of the SuperLink of a kit."""
    settings = read_server(kit)
    tls = ["--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
    return [
        program("flower-superlink"),
        *(str(kit / part) if part.endswith((".crt", ".key")) else part for part in tls),
        "--enable-supernode-auth",
        "--host",
        "127.0.0.1",
        "--port",
        str(settings.superlink_port),
        "--disable-runtime-dependency-installation",
    ]


# -- a silo ----------------------------------------------------------------------------------


def supernode_command(kit: Path) -> list[str]:
    """The command line of the SuperNode of a kit."""
    settings = read_silo(kit)
    return [
        program("flower-supernode"),
        "--root-certificates",
        str(kit / "ca.crt"),
        "--superlink",
        settings.server,
        "--host",
        "127.0.0.1",
        "--port",
        str(settings.runtime_port),
        "--auth-supernode-private-key",
        str(kit / "silo.key"),
    ]


def run_silo(silo: Silo, note: Note) -> None:
    """Stay connected until all rounds that this silo agrees to are complete.

    Raises:
        FederationError: the server's certificate is not the federation's, or it does not know this silo's key.
    """
    kit = silo.kit.absolute()
    node = Child("supernode", supernode_command(kit), kit)
    complete, sent = silo.installed, len(silo.receipts())
    refused_since: float | None = None
    wait_for_server(silo.settings.server, kit / "ca.crt", note)
    note(f"silo {silo.settings.id}: connecting to {silo.settings.server}")
    try:
        while silo.installed < silo.settings.max_participations:
            if node.process is None or node.died():
                if node.died():
                    refused_since = _look_into_end(node, silo, refused_since, note)
                    time.sleep(RESTART)
                node.start()
            if len(silo.receipts()) > sent:
                sent = len(silo.receipts())
                receipt = kit / "state" / "receipts" / f"upload-{sent - 1:04}.json"
                note(f"trained; the receipt of what leaves is {receipt}")
            if silo.installed > complete:
                complete = silo.installed
                note(f"round {complete} is complete: the enhanced classifier is {kit / 'state' / 'slm'}")
            time.sleep(0.5)
        time.sleep(3.0)  # the confirmation is on its way
    finally:
        node.stop()


def wait_for_server(address: str, ca: Path, note: Note) -> None:
    """Wait until the server answers with a certificate of the federation's authority.

    Raises:
        FederationError: its certificate is another's, or is for another name.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    told = False
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=10) as plain:
                context.wrap_socket(plain, server_hostname=host).close()
            return
        except ssl.SSLCertVerificationError as error:
            raise FederationError(
                f"the certificate of {address} was not signed by the authority in {ca}, or is for another name "
                f"({error.verify_message}); is this kit of the same federation as the server's?"
            ) from error
        except OSError as error:
            if not told:
                note(f"{address} does not answer yet ({error}); trying until it does")
                told = True
            time.sleep(RESTART)


def _look_into_end(node: Child, silo: Silo, refused_since: float | None, note: Note) -> float | None:
    """Say why the SuperNode ended; since when it has been refused, if it was.

    A server that has just been started does not know the key yet, and one whose silo was killed keeps
    the old connection for about a minute: a refusal counts only when it lasts.

    Raises:
        FederationError: it has been refused for too long.
    """
    if REFUSED not in node.last_words():
        note(f"the SuperNode ended and is started again; its log is {node.log}")
        return None
    since = refused_since or time.time()
    if time.time() - since > REFUSED_TIME:
        raise FederationError(
            f"silo {silo.settings.id}: the server does not know the key {silo.kit / 'silo.key'}; is this kit of the "
            "same federation as the server's, and is its public key in the server's kit (silos/)?"
        )
    if refused_since is None:
        note("the server does not accept this silo yet; trying again")
    return since


# -- small things ----------------------------------------------------------------------------


def wait_for_port(host: str, port: int, child: Child) -> None:
    """Wait until a process listens.

    Raises:
        FederationError: it ended, or takes too long.
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
    raise FederationError(
        f"{child.name} does not listen on {host}:{port} after {START_TIME:.0f} s; look at {child.log}"
    )


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_on_sigterm() -> None:
    """Let the usual signal of service managers end this process by way of its clean-up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
