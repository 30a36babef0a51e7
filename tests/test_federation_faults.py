"""What a silo, a disk or a second process may do to a server between machines, and what it then does."""

import asyncio
import configparser
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest
from conftest import PATIENCE
from of_federations import before, change, echo, free_ports, from_kit, turn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from crosslm.config import Config, FederationConfig
from crosslm.errors import FederationError, PassingError, RunError, UploadError
from crosslm.federation import hashed_files
from crosslm.federation import provision as provision_module
from crosslm.federation import spool as spool_module
from crosslm.federation.flower import gateway, payload, processes, proxies, questions, server_processes, silo_processes
from crosslm.federation.flower.payload import KIND, at_most, joined, split
from crosslm.federation.flower.questions import Answer
from crosslm.federation.kits import SERVER_FILE, dump, held, read_server, read_silo
from crosslm.federation.provision import provision
from crosslm.federation.silo_state import SiloState
from crosslm.federation.spool import Spool
from crosslm.support.files import PART

# Flower, after our package has told it to be quiet
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict  # isort: skip
from flwr.common.constant import ErrorCode  # isort: skip


# -- replies that are none -------------------------------------------------------------------


def ok(**more):
    return {"reply": ConfigRecord({"status": "ok"}), **more}


def array(data, dtype="uint8", stype=KIND, shape=(3,)):
    return ArrayRecord({"000000": Array(dtype, shape, stype, data)})


BROKEN = {
    "nothing": ({}, "has no ConfigRecord 'reply'"),
    "a reply of another kind": ({"reply": MetricRecord({"status": 1})}, "has no ConfigRecord 'reply'"),
    "no status": ({"reply": ConfigRecord({"round": 0})}, "has the status 'None'"),
    "another status": ({"reply": ConfigRecord({"status": "fine"})}, "has the status 'fine'"),
    "a status that is no word": ({"reply": ConfigRecord({"status": 1.0})}, "has the status '1.0'"),
    "no message": (ok(), "has no ArrayRecord 'message'"),
    "a message of another kind": (ok(message=ConfigRecord({"a": 1})), "has no ArrayRecord 'message'"),
    "an array that is none": (
        ok(message=array(b"garbage")),
        "its array '000000' says that it is ('uint8', 'crosslm.bytes', (3,)); ('uint8', 'crosslm.bytes', (7,))",
    ),
    "an array kept in another way": (ok(message=array(b"\x80\x04.", stype="pickle")), "('uint8', 'pickle', (3,))"),
    "an array of NumPy's": (ok(message=ArrayRecord([np.full(3, np.nan)])), "('float64', 'numpy.ndarray', (3,))"),
    "a table": (ok(message=array(bytes(4), shape=(2, 2))), "('uint8', 'crosslm.bytes', (2, 2))"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_reply_that_is_none_is_that_silos_failure_and_the_others_are_served(exchange, what):
    content, reason = BROKEN[what]
    told = []
    exchange.on_failure = lambda *given: told.append(given)
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(content), reply_to=message)
    turn(exchange, 3)
    line = exchange.carrier.lines["silo-0"]
    assert line.over
    assert reason in line.note
    assert exchange.spool.of("silo-0") == []
    exchange.send(echo(exchange.receive()))
    turn(exchange, 2)
    assert [(arrival.silo, arrival.state) for arrival in exchange.spool.arrivals()] == [("silo-1", "delivered")]
    assert exchange.finished()
    ((who, words),) = told
    assert who == "silo-0"
    assert words == f"round 0: {line.note}"
    assert exchange.grid.pushed.count(("silo-0", "train.upload", 0)) == 1
    assert not list(exchange.spool.folder.glob("*part*"))


@pytest.mark.parametrize("unusable", [ValueError("no such object"), RecursionError("no such object")])
def test_a_message_that_flower_cannot_put_together_is_its_silos_failure_too(exchange, monkeypatch, unusable):
    import httpx

    pull, errors = exchange.grid.pull_messages, [httpx.ConnectError("no SuperLink"), unusable]

    def pulled(ids):
        if ids == ["1"]:
            raise errors[0]
        return pull(ids)

    monkeypatch.setattr(exchange.grid, "pull_messages", pulled)
    with pytest.raises(httpx.ConnectError):  # that is no fault of a silo's
        turn(exchange, 2)
    assert not exchange.carrier.lines["silo-0"].over
    errors.pop(0)
    turn(exchange, 2)
    assert f"cannot be put together: {type(unusable).__name__}: no such object" in exchange.carrier.lines["silo-0"].note
    assert exchange.receive().client_id == "silo-1"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_shortage_of_the_servers_own_shuts_no_silo_out(exchange, monkeypatch, error):
    told, now, pull = [], [1000.0], exchange.grid.pull_messages
    exchange.on_failure = lambda *given: told.append(given)
    monkeypatch.setattr("crosslm.federation.flower.carrier.time.monotonic", lambda: now[0])

    def pulled(ids):
        if now[0] == 1000.0 and ids == ["1"]:
            raise error
        return pull(ids)

    monkeypatch.setattr(exchange.grid, "pull_messages", pulled)
    turn(exchange, 2)
    line = exchange.carrier.lines["silo-0"]
    assert not line.over
    assert "there is no room for its reply: " in line.note
    exchange._look_at_carrier()
    assert [who for who, _ in told] == ["silo-0"]
    exchange.send(echo(exchange.receive()))
    now[0] += 100
    turn(exchange, 2)
    assert exchange.receive().client_id == "silo-0"


def test_a_small_message_that_names_its_parts_many_times_fills_no_memory(flower_run, monkeypatch):
    """As one of zeros may; Flower copies them before it gives a message out."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body, get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    def sent(parts):
        message = Message(RecordDict({"message": split(parts)}), 1, "train.upload")
        return message.object_id, {key: value.deflate() for key, value in get_all_nested_objects(message).items()}

    honest = sent([bytes(2**20), bytes(2**20)])  # one array of zeros, under two names
    with at_most(2**20):
        message = inflate_object_from_contents(*honest)
    assert len(b"".join(joined(message.content["message"], 2**21))) == 2**21
    with monkeypatch.context() as patched:
        body = {"dtype": "uint8", "shape": [2**20], "stype": "crosslm.bytes", "arraychunk_ids": [0] * 400}
        patched.setattr(Array, "deflate", lambda self: add_header_to_object_body(json.dumps(body).encode(), self))
        small = sent([bytes(2**20)])
    assert sum(map(len, small[1].values())) < 2**21
    tracemalloc.start()
    with pytest.raises(UploadError, match="names more bytes than are allowed"), at_most(2**21):
        inflate_object_from_contents(*small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_an_answer_that_would_fill_the_memory_is_its_silos_failure(exchange, monkeypatch):
    limits, pull = [], exchange.grid.pull_messages

    def pulled(ids):
        limits.append(payload._left.bytes)
        if ids == ["1"]:
            raise UploadError("its message names more bytes than are allowed (intake.max_bytes)")
        return pull(ids)

    monkeypatch.setattr(exchange.grid, "pull_messages", pulled)
    turn(exchange, 2)
    assert set(limits) == {exchange.intake.bounds.max_bytes}
    assert exchange.carrier.lines["silo-0"].over
    assert exchange.receive().client_id == "silo-1"


def test_what_a_silo_says_reaches_no_terminal_as_it_is(exchange, caplog):
    told = []
    exchange.on_failure = lambda *given: told.append(given)
    words = {"status": "refused", "reason": "full\x1b]0;root\x07\x1b[2J"}
    exchange.grid.handlers["silo-0"] = lambda message: Message(
        RecordDict({"reply": ConfigRecord(words)}), reply_to=message
    )
    broken = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no\x1b[2J room")
    exchange.grid.handlers["silo-1"] = lambda message: Message(broken, reply_to=message)
    turn(exchange, 3)
    exchange._look_at_carrier()
    notes = {name: line.note for name, line in exchange.carrier.lines.items()}
    assert notes["silo-0"] == "refused upload: full ]0;root  [2J; asked again in 2 s"
    assert "no [2J room; asked again in" in notes["silo-1"]
    assert told == [("silo-0", "round 0: refused upload: full ]0;root  [2J; it is asked again")]
    exchange.spool.put("silo-0", 0, [b"an upload"])
    exchange.refuse("silo-0", 0, UploadError("labels \x1b[2J"))
    assert exchange.spool.of("silo-0")[0].note == "labels  [2J"
    assert "\x1b" not in caplog.text


def test_what_a_server_says_reaches_no_terminal_as_it_is(silo, exchange, monkeypatch, caplog):
    request = {"experiment": silo.settings.experiment, "round": 0, "version": 99, "crosslm": "9\x1b[2J"}
    message = Message(RecordDict({"request": ConfigRecord(request)}), 100, "train.upload", ttl=60)
    from_kit(silo.kit, monkeypatch)(message)
    assert "the server's crosslm 9 [2J reads version 99: install the same" in silo.doing()["why"]
    assert "\x1b" not in caplog.text
    answer = io.BytesIO(b"0 silo-1\x1b[2J")
    answer.headers = {}
    monkeypatch.setattr(questions, "opened", lambda *_, **__: answer)
    with pytest.raises(FederationError, match=r"as that of silo silo-1 \[2J"):
        questions.ask(silo)


def test_an_install_that_is_answered_with_nonsense_is_owed_no_more(exchange):
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(), reply_to=message)
    turn(exchange, 4)
    (arrival,) = exchange.spool.arrivals()
    assert arrival.state == "delivered"
    assert arrival.note.startswith("the silo did not take it: its reply has no ConfigRecord")
    assert exchange.grid.pushed.count(("silo-0", "train.install", 0)) == 1


# -- bounds ----------------------------------------------------------------------------------


def test_an_upload_that_is_too_large_is_cut_off_and_the_next_one_taken(exchange):
    most = 10 * 2**20
    exchange.intake = type(exchange.intake)(
        exchange.intake.labels, exchange.intake.bounds.model_copy(update={"max_bytes": most})
    )
    exchange.carrier.max_bytes = most
    large = split([bytes(2 * most)])
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(ok(message=large)), reply_to=message)
    turn(exchange, 3)
    assert f"more than {most} bytes; no more are allowed (intake.max_bytes)" in exchange.carrier.lines["silo-0"].note
    assert [arrival.silo for arrival in exchange.spool.arrivals()] == ["silo-1"]
    assert not list(exchange.spool.folder.glob("silo-0*"))
    assert exchange.receive().client_id == "silo-1"


def test_bytes_are_counted_before_more_of_them_are_read():
    arrays = split([bytes(16 * 2**20)] * 3)
    with pytest.raises(UploadError, match=r"more than 17 bytes; no more are allowed \(intake.max_bytes\)"):
        list(joined(arrays, 17))
    assert len(arrays) == 2  # of three
    assert sum(map(len, joined(split([bytes(17)]), 17))) == 17


def test_a_file_of_the_spool_that_is_too_large_is_not_read(exchange, monkeypatch):
    turn(exchange, 2)
    bounds = exchange.intake.bounds.model_copy(update={"max_bytes": 1000})
    exchange.intake = type(exchange.intake)(exchange.intake.labels, bounds)
    monkeypatch.setattr(spool_module, "unchanged", lambda *_: pytest.fail("it was read"))
    assert exchange.receive() is None
    first = exchange.spool.of("silo-0")[0]
    assert first.state == "refused"
    assert "at most 1000 are allowed (intake.max_bytes)" in first.note


# -- a full disk -----------------------------------------------------------------------------


def test_a_full_disk_is_told_with_its_file_and_what_to_do(exchange, monkeypatch):
    """And ends the server: to start again does not help."""

    def full(path, parts):
        list(parts)
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(hashed_files, "write_whole", full)
        exchange.start()
        exchange.carrier.thread.join(PATIENCE)
        with pytest.raises(RunError, match=r"silo-\d-0000-up\.part: cannot be written: No space left.*make room"):
            exchange.finished()
        with pytest.raises(RunError, match="crosslm server"):
            exchange.spool.serve("silo-0", 0, b"download")
    assert exchange.spool.arrivals() == []
    assert exchange.spool.put("silo-0", 0, [b"whole"])  # and with room again it is taken


def test_a_journal_that_cannot_be_written_is_named(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool._journal._database.execute("PRAGMA max_page_count = 6")  # as good as a full disk
    with pytest.raises(RunError, match=r"journal\.sqlite: cannot be written: .*full.*make room"):
        spool.note("large", "x" * 10**6)
    spool.close()


@pytest.mark.parametrize("honest", [True, False], ids=["says so", "does not say so"])
def test_the_gateway_lets_no_request_through_that_is_too_large(kits, monkeypatch, honest):
    import httpx

    passed = []

    async def superlink(request):
        passed.append(len(await request.body()))
        return PlainTextResponse("")

    inner = httpx.ASGITransport(Starlette(routes=[Route("/{path:path}", superlink, methods=["POST"])]))
    _, asking = before(inner, kits / "server", monkeypatch)
    monkeypatch.setattr(gateway, "MOST", 1000)

    async def parts(size):
        for _ in range(size // 100):
            yield bytes(100)

    async def ask(size):
        content = bytes(size) if honest else parts(size)
        async with asking() as client:
            return (await client.post("/v1/fleet/push-object", content=content)).status_code

    assert [asyncio.run(ask(size)) for size in (1000, 1100, 900)] == [200, 413, 200]
    assert passed == [1000, 900]


def test_what_flower_sends_at_once_fits_through_the_gateway():
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    assert 2 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE < gateway.MOST
    array = next(iter(split([bytes(PART)]).values()))
    assert max(len(part.data) for _, part in array.slice_array()) <= FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


# -- a second process ------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "kit"), [("server", "server"), ("client", "silos/silo-0")])
def test_a_kit_is_run_by_one_process(kits, shell, monkeypatch, command, kit):
    """And the first one goes on: nothing of it is ended."""
    kit = kits / kit
    code = (
        "import sys, time; from pathlib import Path; from crosslm.federation.kits import held\n"
        "with held(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    monkeypatch.setattr(processes.Child, "start", lambda _: pytest.fail("something was started"))
    first = subprocess.Popen([sys.executable, "-c", code, kit], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        code, _, err = shell(command, kit)
        assert code == 2
        assert f"{kit}: is run by another process already (crosslm server or client)" in err.replace("\n", "")
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    with held(kit):  # a process that was killed holds nothing
        pass


def connecting(silo, monkeypatch, node, over):
    """A silo whose SuperNode is this program, at a server that says that all is over when ``over`` does."""
    change(silo.kit, runtime_port=free_ports(1)[0])
    silo, end = SiloState(silo.kit), time.time() + 60
    program = node.replace("PORT", str(silo.settings.runtime_port))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(silo_processes, "wait_for_server", lambda *_: True)
    monkeypatch.setattr(silo_processes, "ASK", 0.0)
    monkeypatch.setattr(silo_processes, "RESTART", 0.0)
    monkeypatch.setattr(silo_processes, "supernode_command", lambda _: [sys.executable, "-c", program])
    monkeypatch.setattr(silo_processes, "tasks_command", lambda _: sleep)
    for module in (questions, silo_processes):
        monkeypatch.setattr(module, "ask", lambda _: Answer(0, time.time() > end or over(silo), ""))
    return silo


LISTENS = """
import socket, time
with socket.create_server(("127.0.0.1", PORT)):
    time.sleep(600)
"""


def is_started(silo, name):
    return (silo.kit / "logs" / f"{name}.pid").exists()


def test_a_silo_whose_port_another_process_has_starts_nothing(silo, monkeypatch):
    silo = connecting(silo, monkeypatch, LISTENS, lambda _: True)
    monkeypatch.setattr(processes, "PORT_TIME", 0.5)
    port = silo.settings.runtime_port
    words = rf"port {port} of this machine \(runtime_port\) is in use.*silo\.toml"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(FederationError, match=words) as told:
        silo_processes.run_silo(silo, print)
    assert not isinstance(told.value, PassingError)  # exit code 2: the same command would say the same
    assert not is_started(silo, "supernode")
    assert not is_started(silo, "tasks")


def test_a_silo_ends_what_holds_its_port_from_an_earlier_start(silo, monkeypatch):
    silo = connecting(silo, monkeypatch, LISTENS, lambda found: is_started(found, "tasks"))
    orphan = processes.Child("supernode", silo_processes.supernode_command(silo.kit), silo.kit)
    orphan.start()
    try:
        while not orphan.listens_on(silo.settings.runtime_port):
            assert orphan.runs()
            time.sleep(0.1)
        with pytest.raises(FederationError, match="the run is over"):
            silo_processes.run_silo(silo, print)
        assert orphan.died()
        assert is_started(silo, "tasks")
    finally:
        orphan.stop()


def test_a_silo_takes_no_tasks_of_another_silos_supernode(silo, monkeypatch):
    """Of two that were started at once with one port, one has it, and the other's node has not ended yet."""
    faster, asked = [], []

    def over(found):
        if is_started(found, "supernode"):
            asked.append(1)
            if not faster:
                faster.append(socket.create_server(("127.0.0.1", found.settings.runtime_port)))
        return len(asked) > 4

    silo = connecting(silo, monkeypatch, "import time; time.sleep(600)", over)
    with pytest.raises(FederationError, match="the run is over"):
        silo_processes.run_silo(silo, print)
    faster[0].close()
    assert is_started(silo, "supernode")
    assert not is_started(silo, "tasks")


def test_when_the_process_that_trains_ends_both_are_started_again(silo, monkeypatch):
    starts = []

    def over(found):
        pid = found.kit / "logs" / "tasks.pid"
        if pid.exists() and pid.read_text() not in starts:
            starts.append(pid.read_text())
            if len(starts) == 1:
                psutil.Process(int(starts[0])).kill()
        return len(starts) > 1

    notes = []
    silo = connecting(silo, monkeypatch, LISTENS, over)
    with pytest.raises(FederationError, match="the run is over"):
        silo_processes.run_silo(silo, notes.append)
    assert sum("the process that trains ended and is started again" in note for note in notes) == 1


def test_why_the_supernode_ended_is_shown(silo, monkeypatch):
    notes = []
    says = r"print('\x1b[92mINFO \x1b[0m: fine\n\x1b[91mERROR \x1b[0m: 407 Proxy\x07\nTraceback:\n end'); exit(1)"
    silo = connecting(silo, monkeypatch, says, lambda _: any("SuperNode ended" in note for note in notes))
    with pytest.raises(FederationError, match="the run is over"):
        silo_processes.run_silo(silo, notes.append)
    (told, *_) = (note for note in notes if "SuperNode ended" in note)
    assert told.splitlines()[1:] == ["  ERROR : 407 Proxy"]
    assert silo_processes._errors_in("one\ntwo\n") == "\n  one\n  two"  # no error is named
    assert silo_processes._errors_in("") == ""


@contextmanager
def proxy(kit, answer):
    """A proxy that answers so, with nothing but the server of this kit behind it; gives its port and what came."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    came = []

    def serve():
        with suppress(OSError):
            while True:
                link, _ = listening.accept()
                with link:
                    came.append(link.recv(4096).decode())
                    link.sendall(f"HTTP/1.1 {answer}\r\n\r\n".encode())
                    if answer.startswith("200"):
                        with suppress(OSError), context.wrap_socket(link, server_side=True) as inner:
                            if inner.recv(4096).startswith(b"GET "):
                                inner.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n2 silo-0")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1], came
        listening.shutdown(socket.SHUT_RDWR)  # which ends the wait of the thread
        thread.join(PATIENCE)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_silo_says_all_to_its_server_by_the_proxy_that_is_named(federated, tmp_path, monkeypatch, name):
    """As Flower's SuperNode does, which is httpx's way."""
    without_proxies(monkeypatch)
    provision(Config.model_validate(federated), "server.example:9400", tmp_path / "far")
    silo = SiloState(tmp_path / "far" / "silos" / "silo-0")
    with proxy(tmp_path / "far" / "server", "200 OK") as (port, came):
        monkeypatch.setenv(name, f"http://who:se%20cret@127.0.0.1:{port}")
        questions.greet("server.example:9400", silo.kit / "ca.crt")
        assert questions.ask(silo).complete == 2
        with pytest.raises(FederationError, match="is for another name"):
            questions.greet("other.example:9400", silo.kit / "ca.crt")
    assert [words.split(" ")[1] for words in came] == [
        "server.example:9400",
        "server.example:9400",
        "other.example:9400",
    ]
    assert all("Proxy-Authorization: Basic d2hvOnNlIGNyZXQ=\r\n" in words.replace("-a", "-A") for words in came)
    assert proxies.proxy_for("localhost:9400") is None
    monkeypatch.setenv("NO_PROXY", "server.example")
    assert proxies.proxy_for("server.example:9400") is None


def test_a_proxy_that_says_no_is_named_without_its_password(federated, tmp_path, monkeypatch):
    without_proxies(monkeypatch)
    provision(Config.model_validate(federated), "server.example:9400", tmp_path / "far")
    silo = SiloState(tmp_path / "far" / "silos" / "silo-0")
    with proxy(tmp_path / "far" / "server", "403 Forbidden") as (port, _):
        monkeypatch.setenv("HTTPS_PROXY", f"who:secret@127.0.0.1:{port}")
        with pytest.raises(OSError, match=f"^by the proxy 127.0.0.1:{port}: .*403 Forbidden; look at HTTPS_PROXY"):
            questions.greet("server.example:9400", silo.kit / "ca.crt")
        assert questions.ask(silo) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:none")
    with pytest.raises(OSError, match=r"by the proxy 127\.0\.0\.1:none: "):
        questions.greet("server.example:9400", silo.kit / "ca.crt")


def without_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_what_a_killed_command_left_running_is_ended_by_the_next_and_nothing_else_is(tmp_path):
    sleep = "import time; time.sleep(600)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleep!r}]); time.sleep(600)"
    command = [sys.executable, "-c", code]
    first, second = (processes.Child("superlink", command, tmp_path) for _ in range(2))
    first.start()
    while not (started := psutil.Process(first.process.pid).children()):
        time.sleep(0.1)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(601)"])
    try:
        second.start()
        assert first.died()
        assert psutil.wait_procs(started, timeout=30)[1] == []
        assert second.process.poll() is None
        (tmp_path / "logs" / "superlink.pid").write_text(str(other.pid))  # a number that was given out again
        second.end_orphan()
        assert other.poll() is None
        (tmp_path / "logs" / "superlink.pid").write_text("none")
        second.end_orphan()
    finally:
        second.stop()
        for process in (first.process, other):
            process.kill()
            process.wait()


# -- the port --------------------------------------------------------------------------------


def with_port(kit, port):
    settings = read_server(kit)
    (kit / SERVER_FILE).write_text(
        dump(settings.model_copy(update={"address": f"localhost:{port}", "bind": "127.0.0.1"}))
    )


def test_a_port_that_is_taken_ends_the_server_before_anything_is_started(kits, shell, monkeypatch):
    monkeypatch.setattr(processes.Child, "start", lambda _: pytest.fail("something was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with_port(kits / "server", port)
        code, _, err = shell("server", kits / "server")
    assert code == 2
    said = " ".join(err.split())
    assert f"server.toml: cannot listen on 127.0.0.1:{port} (bind, and the port of address): Address already" in said


def test_a_gateway_that_ends_is_opened_again(kits, monkeypatch):
    notes, served = [], []

    def ends(kit, listening, superlink_port):
        served.append(listening.getsockname())
        listening.close()

    monkeypatch.setattr(server_processes, "serve", ends)
    monkeypatch.setattr(server_processes, "RESTART", 0.0)
    with_port(kits / "server", 1)
    server = server_processes.ServerProcesses(kits / "server", notes.append)
    monkeypatch.setattr(server, "settings", server.settings.model_copy(update={"address": "localhost:0"}))
    server.superlink.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(server, "_register_and_run", lambda: None)
    try:
        server._open_gateway()
        server.gateway.join(PATIENCE)
        server._keep_up()
        server.gateway.join(PATIENCE)
        assert notes[1] == "the gateway ended and is started again"
        assert len(served) == 2
    finally:
        server.superlink.process.kill()
        server.superlink.process.wait()
        server.spool.close()


# -- keys and old uploads --------------------------------------------------------------------


def test_a_silo_with_another_silos_key_is_told_whose_it_is(kits, silo, monkeypatch):
    answer = io.BytesIO(b"0 silo-1")
    answer.headers = {}
    monkeypatch.setattr(questions, "opened", lambda *_, **__: answer)
    with pytest.raises(
        FederationError, match=r"silo silo-0: the server knows the key .*silo.key as that of silo silo-1"
    ):
        silo_processes.rounds_complete(silo)
    (silo.kit / "silo.key").unlink()
    with pytest.raises(FederationError, match=r"silo.key: cannot be read: No such file"):
        silo_processes.rounds_complete(silo)


def test_an_old_upload_is_not_taken_as_that_of_a_new_round(exchange, kits, monkeypatch):
    exchange.config = exchange.carrier.config = FederationConfig(participations=2)
    exchange.grid.online = ["silo-0"]
    kit = kits / "silos" / "silo-0"
    change(kit, max_participations=2)
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    for kind in ("", ".sha256"):
        shutil.copy(kit / "state" / f"upload-0000.safetensors{kind}", kit / "state" / f"upload-0001.safetensors{kind}")
    turn(exchange, 4)
    assert [(arrival.round, arrival.state) for arrival in exchange.spool.arrivals()] == [
        (0, "delivered"),
        (1, "received"),
    ]
    assert exchange.receive() is None
    refused = exchange.spool.of("silo-0")[1]
    assert refused.state == "refused"
    assert "its upload of round 1 claims to be of round 0" in refused.note
    assert "silo.toml" in refused.note
    turn(exchange, 2)
    asked = [kind for _, kind, _ in exchange.grid.pushed]
    assert asked == ["train.upload", "train.install", "train.upload", "train.not_used"]  # it is asked for no more


# -- provisioning ----------------------------------------------------------------------------


class Killed(BaseException):
    """As a process that is killed: nothing is cleaned up."""


def test_provisioning_that_is_cut_off_anywhere_is_completed_by_the_same_command(federated, tmp_path, monkeypatch):
    config, write = Config.model_validate(federated), provision_module._file
    provision(config, "localhost:9400", tmp_path / "whole")
    expected = sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*"))
    left = 0

    def cut(path, data):
        nonlocal left
        left -= 1
        if left < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[:1])
            raise Killed
        write(path, data)

    monkeypatch.setattr(provision_module, "_file", cut)
    for writes in range(40):
        left, output = writes, tmp_path / f"cut-{writes}"
        try:
            provision(config, "localhost:9400", output)
        except Killed:
            left = 1000
            made = provision(config, "localhost:9400", output)
            assert made[-1] == output / "silos" / "silo-1"
        else:
            break
        found = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
        assert found == expected, f"after {writes} files"
        assert {read_silo(output / "silos" / name).experiment for name in ("silo-0", "silo-1")} == {
            read_server(output / "server").experiment
        }
        fingerprints = {
            questions.fingerprint(output / place) for place in ("silos/silo-0/silo.key", "server/silos/silo-0.pub")
        }
        assert len(fingerprints) == 1
    assert writes > 15


def test_parts_of_a_federation_that_are_away_are_named(kits, federated):
    config = Config.model_validate(federated)
    (kits / "server").rename(kits.parent / "server")
    with pytest.raises(FederationError, match=r"holds the kit of silo-0 and no server/server\.toml"):
        provision(config, "localhost:9400", kits)
    shutil.rmtree(kits / "silos")
    (kits / "authority" / "ca.crt").unlink()
    with pytest.raises(FederationError, match=r"authority: has no ca\.crt"):
        provision(config, "localhost:9400", kits)
    shutil.rmtree(kits / "authority")
    (kits / "server").mkdir()
    with pytest.raises(FederationError, match=r"server: has no server\.toml"):
        provision(config, "localhost:9400", kits)


@pytest.mark.parametrize(
    ("unit", "what"),
    [("server/crosslm-server.service", "server"), ("silos/silo-0/crosslm-silo.service", "silo silo-0")],
)
def test_systemd_gives_a_user_without_a_home_a_cache(kits, unit, what):
    parsed = configparser.ConfigParser(interpolation=None)  # systemd has % of its own
    parsed.read(kits / unit)
    assert parsed["Unit"]["Description"] == f"crosslm {what}"
    service = parsed["Service"]
    assert (service["CacheDirectory"], service["CacheDirectoryMode"]) == ("crosslm", "0700")
    assert service["Environment"] == "CROSSLM_CACHE=%C/crosslm"  # %C: where systemd makes it


@pytest.mark.parametrize("unit", ["server/crosslm-server.service", "silos/silo-0/crosslm-silo.service"])
def test_systemd_starts_again_what_died_and_not_what_is_complete_or_wrong(kits, unit):
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read(kits / unit)
    assert parsed["Service"]["Restart"] == "on-failure"
    assert parsed["Service"]["RestartPreventExitStatus"].split() == ["2", "130"]


# -- Flower's own commands -------------------------------------------------------------------


def test_flowers_own_commands_find_the_server_of_a_kit_wherever_it_is(kits, tmp_path, shell, monkeypatch):
    """With the environment that the documentation says, as a shell takes it; also after the kit was moved."""
    kit = tmp_path / "it is mine"
    (kits / "server").rename(kit)
    code, out, err = shell("server", kit, "--environment")
    assert (code, err) == (0, "")
    script = f"{out}\nenv | grep -E 'FLWR|CROSSLM_KIT'; {processes.program('flwr')} config list"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR")}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert {
        f"CROSSLM_KIT={kit}",
        f"FLWR_HOME={kit / 'flower'}",
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
    } <= set(done.stdout.splitlines())
    assert "crosslm (default)" in done.stdout
    told = (kit / "flower" / "config.toml").read_text()
    links = tomllib.loads(told)["superlink"]
    assert links == {
        "default": "crosslm",
        "crosslm": {"address": "127.0.0.1:9091", "root-certificates": str(kit / "ca.crt")},
    }
    monkeypatch.setenv("CROSSLM_CACHE", "elsewhere")
    code, out, _ = shell("client", kits / "silos" / "silo-0", "--environment", "--cache-dir", tmp_path / "models")
    assert code == 0
    assert f"export CROSSLM_CACHE={tmp_path / 'models'}" in out
    assert f"export CROSSLM_KIT={kits / 'silos' / 'silo-0'}" in out
