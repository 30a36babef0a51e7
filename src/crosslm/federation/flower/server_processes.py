"""The server's Flower processes: SuperLink, gateway and run of a kit, started again when they die.

The SuperLink keeps its state in memory: what must outlast it is in the server's spool and in the
silos' own folders. When it dies, it starts empty, learns the silos' keys from the kit again, and a
new run goes on where the journal says. (With its state in SQLite, objects of hundreds of megabytes
met "database is locked", and the run failed.)
"""

import threading
import time
from pathlib import Path

import tomli_w

from crosslm.errors import FederationError
from crosslm.federation.flower.gateway import listen, serve
from crosslm.federation.flower.processes import (
    RESTART,
    START_TIME,
    Child,
    Note,
    flwr,
    is_alive,
    program,
    wait_for_port,
)
from crosslm.federation.kits import read_server, server_config, silo_names
from crosslm.federation.spool import TOLD, Spool

STARTS = 3
"""Starts of the SuperLink in a row that may fail."""
TELL_TIME = 20.0  # seconds that a server with nothing left to do stays for silos to ask


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
        self.gateway: threading.Thread | None = None
        self.run_asked_at = 0.0
        self.starts = 0
        """Of the SuperLink in a row that failed."""

    def run(self) -> list[str]:
        """Keep everything running until the run is complete.

        Returns:
            Silos that have not taken their download.

        Raises:
            FederationError: the configuration, a file or a model of the kit cannot be used.
        """
        configure(self.kit)
        self._open_gateway()
        try:
            self.spool.note("refused", "")
            while self.spool.fact("finished") is None:
                if refused := self.spool.fact("refused"):
                    raise FederationError(f"{self.kit}: the run cannot go on: {refused}")
                self._keep_up()
                time.sleep(1.0)
            self._wait_until_told()
        finally:
            self.superlink.stop()
        waiting = self.spool.fact("finished") or ""
        return waiting.split(",") if waiting else []

    def _wait_until_told(self) -> None:
        """Give the silos time to hear that their last answers have come: until then they stay connected."""
        end = time.time() + TELL_TIME
        named = set(silo_names(self.kit))  # one that was shut out hears nothing any more
        silos = {arrival.silo for arrival in self.spool.arrivals() if arrival.delivered_at is not None} & named
        federation = server_config(self.kit).federation
        most, complete = federation.participations, self.spool.complete
        waits = {silo for silo in named if complete(silo) < self.spool.expected(silo, most)}
        stays = named if federation.closing else waits  # they hear that nothing more comes
        while time.time() < end and not all(self._has_heard(silo, silo in stays) for silo in silos | stays):
            time.sleep(0.5)

    def _has_heard(self, silo: str, stays: bool) -> bool:
        """Whether a silo knows that its answers have come, and one that would stay that nothing more comes."""
        number, _, over = (self.spool.fact(f"{TOLD}{silo}") or "").partition(" ")
        ends = not stays or bool(over) or self.spool.closing_of(silo) is not None
        return number == str(self.spool.complete(silo)) and ends

    def _keep_up(self) -> None:
        if self.gateway is not None and not self.gateway.is_alive():
            self.note("the gateway ended and is started again")
            time.sleep(RESTART)
            self._open_gateway()
        if self.superlink.process is None or self.superlink.died():
            if self.superlink.died():
                last = self.superlink.last_words(5)
                self.note(f"the SuperLink ended and is started again; {self.superlink.log} ends with:\n{last}")
                time.sleep(RESTART)
            self.registered, self.run_asked_at = set(), 0.0
            self.superlink.start()
            try:
                wait_for_port("127.0.0.1", self.settings.superlink_port, self.superlink)
            except FederationError:
                self.starts += 1
                if self.starts == STARTS or not self.superlink.died():
                    raise
                return  # the next turn starts it again
            self.starts = 0
        try:
            self._register_and_run()
        except FederationError:
            if not self.superlink.died():
                raise  # if it has died meanwhile, the next turn starts it again

    def _register_and_run(self) -> None:
        """Tell the SuperLink whose keys it may trust, and have it start the server application if that does not run."""
        for silo in silo_names(self.kit):
            if silo not in self.registered:
                key = str(self.kit / "silos" / f"{silo}.pub")
                flwr(self.kit, "supernode", "register", key, "crosslm", "--name", silo)
                self.registered.add(silo)
        if not self._app_runs():
            if self.run_asked_at:
                self.spool.note("restarted", str(time.time()))  # ends here where the disk is full
                self.note("the server application ended before the run was complete and is started again")
            self.run_asked_at = time.time()
            flwr(self.kit, "run", str(self.kit / "app"), "crosslm")

    def _app_runs(self) -> bool:
        """Whether the application runs, or was started a short time ago."""
        pid, _, started = (self.spool.fact("process") or "0 0").partition(" ")
        if float(started) < self.run_asked_at or not self.run_asked_at:
            return bool(self.run_asked_at) and time.time() - self.run_asked_at < START_TIME
        return is_alive(int(pid))

    def _open_gateway(self) -> None:
        """Take the port, and answer on it in a thread of its own."""
        listening = listen(self.kit, self.settings)
        host, port = listening.getsockname()[:2]
        self.note(f"listening on {host}:{port} for {', '.join(silo_names(self.kit))}")
        arguments = (self.kit, listening, self.settings.superlink_port)
        self.gateway = threading.Thread(target=serve, args=arguments, name="gateway", daemon=True)
        self.gateway.start()


def configure(kit: Path) -> None:
    """Write the configuration of Flower's commands: where the SuperLink of this kit is, and by what it is known.

    Written anew at each start, since Flower takes absolute paths only and a kit may have been moved.
    """
    folder = kit.absolute() / "flower"
    folder.mkdir(exist_ok=True)
    address = f"127.0.0.1:{read_server(kit).superlink_port}"
    link = {"address": address, "root-certificates": str(folder.parent / "ca.crt")}
    text = tomli_w.dumps({"superlink": {"default": "crosslm", "crosslm": link}})
    (folder / "config.toml").write_text(text, encoding="utf-8")


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
