"""A federation of separate processes on the loopback interface: TLS, keys, real Flower processes.

Slow for tests (each process loads torch): two federations in all, each asked many things.
"""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tomli_w
from conftest import PATIENCE
from of_federations import free_ports

from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.evaluate import base_texts
from crosslm.federation.kits import SILO_FILE, dump, read_server, read_silo
from crosslm.federation.messages import decode_upload, encode
from crosslm.federation.provision import provision
from crosslm.federation.spool import Spool
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.server import Server
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task

pytestmark = pytest.mark.federation


class Party:
    """A command of ours in a process with a home of its own."""

    def __init__(self, command, kit, home, log, **variables):
        self.kit = kit
        self.log = Path(f"{kit}-{log}.log")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR", "PYTEST"))}
        environment |= {"HOME": str(home), "CROSSLM_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        environment |= variables
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait(self):
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.kit.name} did not end; it said:\n{self.text()}")

    def text(self):
        return self.log.read_text()

    def stop(self):
        """End it; nothing that it has started may be left behind."""
        if self.process.poll() is None:
            started = psutil.Process(self.process.pid).children(recursive=True)
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.resume()  # a suspended one would not end
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
            for process in psutil.wait_procs(started, timeout=10)[1]:
                process.kill()


class Federation:
    """Kits, with ports of this machine that are free, and the parties that run."""

    def __init__(self, tables, folder, names, **federation):
        clients = tables["clients"]
        tables["clients"] = [{**clients[place % len(clients)], "id": name} for place, name in enumerate(names)]
        if len(names) > len(clients):
            tables["clients"][0]["model"] = tables["llm"]["model"]  # a third architecture: gpt2 can be a classifier too
        tables["federation"] = {"closing": False, **federation}
        tables["gate"] = {"enabled": False}  # models this small classify no better than chance
        ports = free_ports(len(names) + 2)
        self.folder, self.parties = folder, []
        self.config = Config.model_validate(tables)
        provision(self.config, f"localhost:{ports[0]}", folder / "kits")
        self.server_kit = folder / "kits" / "server"
        self.port = ports[0]
        server = (self.server_kit / "server.toml").read_text()
        (self.server_kit / "server.toml").write_text(
            server.replace("9091", str(ports[1])).replace("0.0.0.0", "127.0.0.1")
        )
        shutil.copy(Path(self.config.data.dir) / "test.csv", self.server_kit)  # rows that the server may see
        for name, port in zip(names, ports[2:], strict=True):
            kit = self.kit(name)
            settings = read_silo(kit)
            shutil.copy(Path(self.config.data.dir) / settings.data.train, kit)
            (kit / SILO_FILE).write_text(dump(settings.model_copy(update={"runtime_port": port})))

    def kit(self, name):
        return self.folder / "kits" / "silos" / name

    def change(self, name, **fields):
        kit = self.kit(name)
        (kit / SILO_FILE).write_text(dump(read_silo(kit).model_copy(update=fields)))

    def epochs(self, name, epochs):
        fit = read_silo(self.kit(name)).fit
        self.change(name, fit=fit.model_copy(update={"epochs": epochs}))

    def start(self, command, kit, log=None, **variables):
        ours = [sys.executable, "-m", "crosslm.cli.main", command, str(kit)]
        return self._start(ours, kit, log or command, **variables)

    def type(self, line, kit, log):
        """A line of a shell that finds this environment's programs."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return self._start(["sh", "-c", line], kit, log, PATH=path)

    def _start(self, command, kit, log, **variables):
        home = self.folder / f"home-{kit.name}"
        home.mkdir(exist_ok=True)
        party = Party(command, kit, home, log, **variables)
        self.parties.append(party)
        return party

    def spool(self):
        return Spool(self.server_kit / "spool")

    def until(self, happened, what):
        """Wait until something has happened, or say what did not."""
        end = time.time() + PATIENCE
        while time.time() < end:
            spool = self.spool()
            try:
                if happened(spool):
                    return
            finally:
                spool.close()
            time.sleep(0.2)
        texts = "\n".join(f"--- {party.kit.name}:\n{party.text()}" for party in self.parties)
        pytest.fail(f"{what} did not happen:\n{texts}")

    def stop(self):
        for party in self.parties:
            party.stop()


def is_gone(process):
    """Whether a process has ended, though nobody may have taken it away yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def start(federated, tmp_path):
    made = []

    def started(names, **federation):
        made.append(Federation(federated, tmp_path, names, **federation))
        return made[-1]

    yield started
    for federation in made:
        federation.stop()


def arrived(name, *states):
    return lambda spool: any(arrival.state in states for arrival in spool.of(name))


TWICE = """
import sys
from pathlib import Path

if any("flower-supernode" in part for part in sys.orig_argv):
    from flwr.supernode.fleet_http_client import FleetHttpClient

    once = FleetHttpClient.PushMessages

    def twice(client, request):
        answer = once(client, request)
        again = "taken"
        try:
            second = once(client, request)
            if second.objects_to_push:  # none where the server has taken the first: its parts are still to come
                answer = second
        except Exception as error:
            again = f"refused: {error}"
        with (Path(__file__).parent / "sent").open("a") as file:
            file.write(again + "\\n")
        return answer

    FleetHttpClient.PushMessages = twice
"""


def answering_twice(folder):
    """An environment in which a silo sends each of its answers two times, with its own signature."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TWICE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def begun(config, models):
    """The method alone, where a server between machines begins; and what its LLM wrote then."""
    llm = LLM.load(str(models / "gpt2"), config.llm, seed_for(config.seed, "llm"))
    method = Server(config, Task.from_config(config.task), llm, SentenceEncoder(str(models / "encoder")))
    original = synthesize(llm, method.task, config.synthesis, base_texts(config), seed_for(config.seed, "base"))
    method.begin(original, Examples([], []))
    return method, original


def test_three_silos_and_those_that_are_not_let_in(start, models, tmp_path):
    run = start(["fast", "middle", "slow"], closing=True)
    run.epochs("slow", 300)  # so that it can be held in the middle of its training
    run.change("middle", wire_dtype="float16")

    stranger, forger = run.folder / "stranger", run.folder / "forger"
    shutil.copytree(run.kit("middle"), stranger)  # a key that the server does not know
    key = subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", str(stranger / "new")],
        check=False,
        capture_output=True,
    )
    assert key.returncode == 0, key.stderr
    (stranger / "new").replace(stranger / "silo.key")
    shutil.copytree(run.kit("middle"), forger)  # a certificate of another authority
    provision(run.config, "localhost:1", run.folder / "others")
    shutil.copy(run.folder / "others" / "authority" / "ca.crt", forger / "ca.crt")
    keyless, mistaken = run.folder / "keyless", run.folder / "mistaken"
    shutil.copytree(run.kit("middle"), keyless)
    (keyless / "silo.key").unlink()
    shutil.copytree(run.kit("middle"), mistaken)  # the key of another silo
    shutil.copy(run.kit("slow") / "silo.key", mistaken)
    shut_out = (stranger, forger, keyless, mistaken)
    for kit, port in zip(shut_out, free_ports(4), strict=True):
        (kit / SILO_FILE).write_text(dump(read_silo(kit).model_copy(update={"runtime_port": port})))

    server = run.start("server", run.server_kit)
    twice = answering_twice(run.folder / "twice")
    silos = {"fast": run.start("client", run.kit("fast"), **twice)}
    run.until(lambda spool: spool.of("fast"), "the fast silo's upload")  # a busy machine may be long about it
    silos["slow"] = run.start("client", run.kit("slow"))
    run.until(lambda _: (run.kit("slow") / "state" / "now.json").exists(), "the slow silo's training")
    training = [process for process in children_of(silos["slow"]) if "answer" in " ".join(process.cmdline())]
    assert training
    for process in training:
        process.suspend()
    run.until(arrived("fast", "delivered"), "the fast silo's download")
    spool = run.spool()
    assert not spool.of("slow"), "the fast silo is complete before the slow one has sent"
    spool.close()
    for process in training:
        process.resume()

    # of all that runs only the gateway, which is in the server's own process, could be open to others
    found = listening([*children_of(server), *children_of(silos["slow"])])
    ports = {read_server(run.server_kit).superlink_port, read_silo(run.kit("slow")).runtime_port}
    assert ports <= {port for _, port in found}
    assert {address for address, _ in found} == {"127.0.0.1"}

    # the port that is open answers silos only
    context = ssl.create_default_context(cafile=str(run.server_kit / "ca.crt"))
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/push-messages", "/docs"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"https://localhost:{run.port}{path}", data=b"", context=context)
        assert refused.value.code == 404
    unsigned = urllib.request.Request(f"https://localhost:{run.port}/v1/fleet/pull-messages", data=b"")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(unsigned, context=context)
    assert 400 <= refused.value.code < 500

    for kit, words in zip(
        shut_out,
        (
            "the server does not know the key",
            "was not signed by the authority",
            "silo.key: cannot be read: No such file or directory",
            "as that of silo slow",
        ),
        strict=True,
    ):
        party = run.start("client", kit)
        assert party.wait() == 2
        assert words in party.text()
    again = run.start("server", run.server_kit, log="again")  # and the first one goes on
    assert again.wait() == 2
    assert "is run by another process already" in again.text()

    silos["middle"] = run.start("client", run.kit("middle"))  # a late joiner
    assert server.wait() == 0, server.text()
    assert {name: party.wait() for name, party in silos.items()} == dict.fromkeys(silos, 0)

    # the same arrivals in one process give the same bytes
    spool = run.spool()
    arrivals = spool.arrivals()
    assert arrivals[0].silo == "fast"
    assert {arrival.state for arrival in arrivals} == {"delivered"}
    assert len(arrivals) == 3
    # the upload, that it was installed, and that so was what came in the end
    assert len((run.folder / "twice" / "sent").read_text().splitlines()) == 3
    config = load(run.server_kit / "config.toml")
    method, original = begun(config, models)
    for arrival in arrivals:
        download, record = method.step(decode_upload(spool.upload(arrival)))
        assert encode(download) == b"".join(spool.download(arrival)), (
            f"{arrival.silo} got something else than from the method"
        )
        assert (run.kit(arrival.silo) / "state" / "slm" / "model.safetensors").exists()
    closing = method.for_all(original, record.pool, [""] * 3)
    for arrival in arrivals:
        download, _ = method.close(decode_upload(spool.upload(arrival)), "", closing)
        number, digest = spool.closing_of(arrival.silo)
        assert encode(download) == b"".join(spool.closing_download(arrival.silo, digest))
        assert (number, spool.fact(f"closed/{arrival.silo}")) == (0, "delivered")
        assert json.loads((run.kit(arrival.silo) / "state" / "closed.json").read_text())["accepted"]
        assert "in the end: the classifier was enhanced once more and is installed" in silos[arrival.silo].text()
    sizes = {arrival.silo: arrival.bytes for arrival in arrivals}
    spool.close()
    assert sizes["middle"] < 0.7 * len(spool_bytes(run, "slow"))
    receipt = json.loads((run.kit("middle") / "state" / "receipts" / "upload-0000.json").read_text())
    assert receipt["bytes_sent"] == sizes["middle"]
    summary = json.loads((run.server_kit / "run" / "summary.json").read_text())
    assert [arrival["silo"] for arrival in summary["arrivals"]] == [arrival.silo for arrival in arrivals]
    assert all(0 <= accuracy <= 1 for accuracy in summary["slm"]["crosslm"].values())
    assert set(summary["llm"]["nlu_accuracy"]) == {"before", "after"}
    assert (summary["not_delivered"], summary["not_uploaded"]) == ([], {})
    assert (run.server_kit / "run" / "llm" / "adapter_model.safetensors").exists()
    # and nobody else on a machine can read what is made of private text
    for path in (run.kit("fast") / "state" / "slm" / "model.safetensors", run.server_kit / "run" / "summary.json"):
        assert not path.stat().st_mode & 0o077


def spool_bytes(run, name):
    return (run.server_kit / "spool" / f"{name}-0000-up.safetensors").read_bytes()


def children_of(party):
    return psutil.Process(party.process.pid).children(recursive=True)


def listening(processes):
    """Addresses and ports where these processes listen."""
    pids = {process.pid for process in processes}
    found = [each for each in psutil.net_connections("tcp") if each.pid in pids]
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


def child_of(party):
    """The process of Flower's that a command of ours has started, if it runs."""
    for process in psutil.Process(party.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def application_of(run):
    """The number of the server application's process."""
    spool = run.spool()
    try:
        return int((spool.fact("process") or "0").split()[0])
    finally:
        spool.close()


def test_processes_that_die_and_a_silo_that_never_answers(start, models):
    run = start(["steady", "killed", "silent"], deadline_minutes=60.0)
    run.epochs("killed", 600)
    server = run.start("server", run.server_kit)
    silos = {name: run.start("client", run.kit(name)) for name in ("steady", "killed", "silent")}

    def asked(spool):
        return "asked for" in (spool.fact("silo/killed") or "")

    run.until(asked, "a request to the silo that will be killed")
    first = child_of(silos["killed"])
    for process in [*first.children(recursive=True), first]:
        process.kill()  # in the middle of its training; crosslm client starts it again
    run.until(lambda _: child_of(silos["silent"]) is not None, "a start of the silent silo's SuperNode")
    node = child_of(silos["silent"])
    for process in [*node.children(recursive=True), node]:
        process.suspend()

    seen = []  # kept when it is seen: asked once more, it may be between two starts

    def started_anew(_):
        seen.append(child_of(silos["killed"]))
        return seen[-1] not in (None, first)

    run.until(started_anew, "a new start of what was killed")
    orphan = seen[-1]
    silos["killed"].process.kill()  # crosslm client itself, which ends nothing; the same command again
    silos["killed"].process.wait()
    silos["killed"] = run.start("client", run.kit("killed"))
    run.until(lambda _: child_of(silos["killed"]) is not None, "a start after crosslm client was killed")
    run.until(lambda _, gone=orphan: is_gone(gone), "the end of what was left running")

    run.until(arrived("steady", "delivered"), "the steady silo's download")
    superlink = child_of(server)
    assert "flower-superlink" in " ".join(superlink.cmdline())
    superlink.kill()  # the server application dies with it; crosslm server starts both again, and silos come back
    run.epochs("killed", 2)  # of the training that begins again nothing more is asked than that it ends

    run.until(arrived("killed", "delivered"), "the download of the silo that was killed")
    tables = load(run.server_kit / "config.toml").model_dump(mode="json", exclude_none=True)
    tables["federation"]["deadline_minutes"] = 0.01  # and so the run ends
    assert silos["steady"].wait() == 0
    assert silos["killed"].wait() == 0
    assert "the SuperLink ended and is started again" in server.text()
    orphan, before = child_of(server), application_of(run)
    server.process.kill()  # crosslm server itself, which ends nothing; the same command again
    server.process.wait()
    server = run.start("server", run.server_kit)
    run.until(lambda _: application_of(run) != before, "a start after crosslm server was killed")
    run.until(lambda _, gone=orphan: is_gone(gone), "the end of what was left running")
    (run.server_kit / "config.toml").write_text(tomli_w.dumps(tables))
    application = application_of(run)
    os.kill(application, signal.SIGKILL)  # the server application alone; crosslm server starts it again
    assert server.wait() == 0, server.text()
    assert "the server application ended before the run was complete and is started again" in server.text()
    spool = run.spool()
    assert [(arrival.silo, arrival.state) for arrival in spool.arrivals()] == [
        ("steady", "delivered"),
        ("killed", "delivered"),
    ]
    # what had arrived was not asked for again, and the LLM went on: both downloads are those of an unbroken run
    config = load(run.server_kit / "config.toml")
    method, _ = begun(config, models)
    for arrival in spool.arrivals():
        assert encode(method.step(decode_upload(spool.upload(arrival)))[0]) == b"".join(spool.download(arrival))
    spool.close()


def is_open(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
        return True
    return False


def by_hand():
    """The commands of docs/deploy.md that do without crosslm server and crosslm client, a list for each terminal."""
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    section = re.search(r"^## With Flower's own commands\n(.*?)^## ", page, flags=re.M | re.S)[1]
    terminals = re.findall(r"(?:^    .+\n)+", section, flags=re.M)
    return [[line.strip() for line in each.replace("\\\n", " ").splitlines()] for each in terminals]


def test_flowers_own_commands_carry_a_run(start):
    run = start(["hospital-a"], arrivals=1)
    kit = run.kit("hospital-a")
    ports = {"9091": str(read_server(run.server_kit).superlink_port), "9094": str(read_silo(kit).runtime_port)}
    superlink, gateway, submitted, supernode, answers = by_hand()

    def typed(commands, own, name):
        text = "; ".join([*commands[:-1], f"exec {commands[-1]}"])
        for word, here in {**ports, "server.example.org:9400": f"localhost:{run.port}", "KIT": str(own)}.items():
            text = text.replace(word, here)
        return run.type(text, own, name)

    typed(superlink, run.server_kit, "superlink")
    typed(gateway, run.server_kit, "gateway")
    run.until(lambda _: is_open(ports["9091"]) and is_open(run.port), "an open SuperLink and gateway")
    typed(supernode, kit, "supernode")
    typed(answers, kit, "answers")
    done = typed(submitted, run.server_kit, "run")
    assert done.wait() == 0, done.text()
    run.until(lambda spool: spool.fact("finished") is not None, "the end of a run by hand")
    spool = run.spool()
    assert [(arrival.silo, arrival.state) for arrival in spool.arrivals()] == [("hospital-a", "delivered")]
    spool.close()
    assert (kit / "state" / "slm" / "model.safetensors").exists()


def test_a_server_whose_files_are_missing_says_which(start):
    run = start(["alone"])
    (run.server_kit / "config.toml").write_text(
        (run.server_kit / "config.toml")
        .read_text()
        .replace("vocabulary_texts = []", 'vocabulary_texts = ["words.txt"]')
    )
    server = run.start("server", run.server_kit)
    assert server.wait() == 2
    assert "words.txt" in server.text()
