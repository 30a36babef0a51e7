"""The server cannot choose what a silo runs: app bundles through Flower's own functions and Runtime interface."""

import dataclasses
import hashlib
import io
import os
import sys
import threading
import time
import zipfile

import pytest
import uvicorn
from conftest import PATIENCE
from of_federations import change, free_ports

from crosslm.config import IntakeConfig
from crosslm.errors import FederationError, UploadError
from crosslm.federation import messages
from crosslm.federation.flower import answer, payload, tasks
from crosslm.federation.flower.bundle import MAX_BYTES, check_bundle
from crosslm.federation.flower.processes import environment
from crosslm.federation.kit_texts import FLOWER_APP
from crosslm.federation.kits import KIT

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict  # isort: skip
from flwr.cli.build import build_fab_from_files  # isort: skip
from flwr.cli.install import install_from_fab  # isort: skip
from flwr.clientapp.utils import get_load_client_app_fn  # isort: skip
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT  # isort: skip
from flwr.supercore.constant import TaskType  # isort: skip
from flwr.supercore.fab import Fab  # isort: skip
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree  # isort: skip
from flwr.supercore.object_store import ObjectStoreFactory  # isort: skip
from flwr.supercore.run import Run  # isort: skip
from flwr.supernode.main import create_app  # isort: skip
from flwr.supernode.nodestate import NodeStateFactory  # isort: skip
from flwr.supernode.start_client_internal import _pull_and_store_message  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # what Flower's own builder uses

APP_ID, APP_VERSION = "crosslm/crosslm-federation", "1.0.0"
GENUINE = {"pyproject.toml": FLOWER_APP.encode()}


def bundle(files):
    return build_fab_from_files(files)[0]


def canary(path):
    """An app with crosslm's name and version, and code that leaves a file behind."""
    code = f"from pathlib import Path\nPath({str(path)!r}).write_text('the server was here')\n"
    settings = FLOWER_APP.replace("crosslm.federation.flower.client_app:app", "evil:app")
    code += "from crosslm.federation.flower.client_app import app\n"
    return bundle({"pyproject.toml": settings.encode(), "evil.py": code.encode()})


class Node:
    """Flower's SuperNode without its connection: its state, its Runtime interface, its intake of messages."""

    def __init__(self):
        self.factory = NodeStateFactory(ObjectStoreFactory())
        self.state, self.store = self.factory.state(), self.factory.objectstore_factory.store()
        self.state.set_node_id(1)
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        config = uvicorn.Config(create_app(self.factory), host="127.0.0.1", port=port, log_level="warning", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the SuperNode's interface does not start"
            time.sleep(0.05)

    def receives(self, message, content, kind=TaskType.SERVER_APP):
        """What the SuperNode does with a message and the app that comes along."""
        digest = hashlib.sha256(content).hexdigest()
        run = dataclasses.replace(
            Run.create_empty(1),
            fab_id=APP_ID,
            fab_version=APP_VERSION,
            fab_hash=digest,
            primary_task_type=kind,
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        received = _pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda _: run,
            get_fab=lambda *_: Fab(digest, content, {}),
            pull_object=lambda _, name: objects[name],
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )
        assert received == 1

    def reply(self):
        (message,) = self.state.get_messages_legacy(is_reply=True)
        return message

    def stop(self):
        self.server.should_exit = True
        self.thread.join(PATIENCE)


@pytest.fixture
def node(silo, monkeypatch, flower_run):
    for name, value in environment(silo.kit).items():
        monkeypatch.setenv(name, value)
    made = Node()
    yield made
    made.stop()


def request(silo):
    fields = {"experiment": silo.settings.experiment, "round": 0, "version": messages.VERSION, "crosslm": "any"}
    return Message(RecordDict({"request": ConfigRecord(fields)}), 1, "train.upload", ttl=3600)


@pytest.fixture
def answered(node):
    """Whether a task was there for the silo's process, as it asks for one."""
    client, answers = (
        tasks.RuntimeHttpClient.from_server_address(node.address, True, None, []),
        tasks.Answers(node.address),
    )
    yield lambda: tasks.take_one(client, answers)
    answers.end()
    client.close()


def starting(monkeypatch, code):
    """Another process than the one that answers; gives those that were started."""
    popen, started = tasks.subprocess.Popen, []

    def start(_, **given):
        started.append(popen([sys.executable, "-c", code], **given))
        return started[-1]

    monkeypatch.setattr(tasks.subprocess, "Popen", start)
    return started


def test_flower_itself_would_run_what_the_server_sends(tmp_path, monkeypatch):
    """Which is why its programs for apps are not used at a silo."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    written = tmp_path / "canary"
    content = canary(written)
    install_from_fab(content, skip_prompt=True)
    get_load_client_app_fn("", None, True)(APP_ID, APP_VERSION, hashlib.sha256(content).hexdigest())
    assert written.exists()


def test_code_that_the_server_sends_is_not_run_and_not_even_unpacked(node, silo, answered, tmp_path):
    written = tmp_path / "canary"
    node.receives(request(silo), canary(written))
    assert answered()
    assert not written.exists()
    assert not list(silo.kit.rglob("evil*"))
    assert silo.doing()["now"] == "refused"
    assert "it holds '.info/CONTENT', 'evil.py', 'pyproject.toml'" in silo.doing()["why"]
    assert not silo.receipts()
    assert len(node.state.get_messages_legacy(is_reply=True)) == 1


def test_the_genuine_app_is_answered_by_the_installed_crosslm(node, silo, answered):
    node.receives(request(silo), bundle(GENUINE))
    assert answered()
    assert node.reply().metadata.message_type == "train.upload"
    assert (silo.state / "upload-0000.safetensors").exists()
    assert not list(silo.kit.rglob("pyproject.toml"))  # it is not unpacked either
    assert not answered()


def test_when_the_process_that_answers_dies_so_does_the_one_that_started_it(node, silo, answered, monkeypatch):
    """The SuperNode would wait for the rest of the answer for ever; the silo starts both again."""
    node.receives(request(silo), bundle(GENUINE))
    starting(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(SystemExit, match="answers a message of the server ended with code -9"):
        answered()


def test_one_process_answers_what_comes_soon_after_and_none_is_left_for_long(monkeypatch):
    code = "import sys\nfor token in sys.stdin: print(token, end='', file=sys.stderr); print('done', flush=True)"
    started = starting(monkeypatch, code)
    answers = tasks.Answers("127.0.0.1:1")
    answers.end()  # there is none yet
    for token in ("one", "two"):
        answers.answer(token)
        answers.rest()
    assert len(started) == 1
    started[0].kill()  # while nothing was asked of it
    started[0].wait()
    answers.answer("three")
    assert len(started) == 2
    monkeypatch.setattr(tasks, "REST", 0.0)
    answers.rest()
    assert started[1].returncode == 0
    answers.answer("four")
    assert len(started) == 3
    answers.end()
    assert started[2].returncode == 0


def test_each_task_is_answered_before_it_is_called_done(monkeypatch):
    said, done = [], io.StringIO()
    monkeypatch.setattr(answer, "answer", lambda *given: said.append((given, done.getvalue())))
    answer.answer_each("127.0.0.1:1", io.StringIO("one\ntwo\n"), done)
    assert said == [(("127.0.0.1:1", "one"), ""), (("127.0.0.1:1", "two"), "done\n")]
    assert done.getvalue() == "done\ndone\n"


def test_what_a_library_prints_is_not_taken_for_an_answer(monkeypatch, capfd):
    monkeypatch.setattr(answer, "start_parent_process_monitor", lambda _: None)
    monkeypatch.setattr(answer, "answer", lambda *_: os.write(1, b"a loading bar\n"))
    monkeypatch.setattr("sys.argv", ["answer", "127.0.0.1:1"])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    answer.main()
    assert capfd.readouterr() == ("done\n", "a loading bar\n")


def test_the_supernode_hears_that_a_task_is_worked_on_for_as_long_as_it_is(node, silo, answered, monkeypatch):
    """It would give the task up else, and training takes longer than its patience."""
    monkeypatch.setattr("flwr.supercore.heartbeat.HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_CALL_TIMEOUT + 0.1)
    heard, state = [], type(node.state)
    acknowledged = state.acknowledge_task_heartbeat
    monkeypatch.setattr(
        state, "acknowledge_task_heartbeat", lambda *given: heard.append(given[1:]) or acknowledged(*given)
    )

    def trains(*_, **__):
        end = time.monotonic() + PATIENCE
        while len(heard) < 3:
            assert time.monotonic() < end, "no sign of life has come"
            time.sleep(0.02)

    monkeypatch.setattr(tasks.Answers, "answer", trains)
    node.receives(request(silo), bundle(GENUINE))
    assert answered()
    assert len(set(heard)) == 1
    before = len(heard)
    time.sleep(0.5)
    assert len(heard) == before


def test_tasks_of_other_kinds_are_not_taken(node, silo, answered, tmp_path):
    node.receives(request(silo), canary(tmp_path / "canary"), TaskType.AGENT_APP)
    assert not answered()


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def with_settings(text):
    return zipped(**{"pyproject.toml": text, ".info/CONTENT": ""})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no archive", "cannot be read"),
        (zipped(), "it holds"),
        (zipped(**{"pyproject.toml": FLOWER_APP}), "it holds 'pyproject.toml'; allowed are"),
        (zipped(**{"pyproject.toml": FLOWER_APP, ".info/CONTENT": "", "evil.py": "pass"}), "evil.py"),
        (zipped(**{"pyproject.toml": FLOWER_APP, ".info/CONTENT": "", "../up": "pass"}), r"\.\./up"),
        (with_settings(b"\xff"), "cannot be read"),
        (with_settings("name ="), "cannot be read"),
        (with_settings(FLOWER_APP.replace("client_app:app", "server_app:app")), "names another app"),
        (with_settings(FLOWER_APP.replace("dependencies = []", 'dependencies = ["evil"]')), "names another app"),
        (with_settings(FLOWER_APP + "\n[tool.uv]\nindex-url = 'http://evil'\n"), "names another app"),
        (with_settings(" " * (MAX_BYTES + 1)), "a file in it is larger"),
        (b"\0" * (MAX_BYTES + 1), "bytes, at most"),
    ],
)
def test_any_other_bundle_is_refused(content, reason):
    with pytest.raises(FederationError, match=reason):
        check_bundle(content)


def test_the_genuine_bundle_passes_as_flower_builds_it():
    check_bundle(bundle(GENUINE))


@pytest.mark.parametrize(
    ("kind", "is_asked_again"), [("upload", False), ("install", True), ("closing", True), ("not_used", False)]
)
def test_a_server_of_another_version_gets_nothing_done(silo, flower_run, kind, is_asked_again, monkeypatch, caplog):
    for name, value in environment(silo.kit).items():
        monkeypatch.setenv(name, value)
    fields = {"experiment": silo.settings.experiment, "round": 0, "version": messages.VERSION + 1, "crosslm": "9.9"}
    content = {"request": ConfigRecord(fields | {"reason": "x"}), "message": ArrayRecord()}
    asked = Message(RecordDict(content), 1, f"train.{kind}", ttl=3600)
    reply = answer.answer_to(asked, Context(1, 1, {}, RecordDict(), {}), bundle(GENUINE))
    assert reply.has_error() == is_asked_again
    assert f"the server's crosslm 9.9 reads version {messages.VERSION + 1}: install the same" in caplog.text
    assert not list(silo.state.glob("upload-*"))
    assert "install the same" in silo.doing()["why"]  # what crosslm status says, whether it is asked again or not


def test_an_unforeseen_error_is_told_without_its_words(silo, flower_run, monkeypatch, caplog):
    for name, value in environment(silo.kit).items():
        monkeypatch.setenv(name, value)

    def fails(*_):
        raise RuntimeError("a private sentence")

    monkeypatch.setattr(answer, "app", lambda message, context: fails())
    reply = answer.answer_to(request(silo), Context(1, 1, {}, RecordDict(), {}), bundle(GENUINE))
    assert reply.error.reason == answer.UNSAID
    assert "a private sentence" in caplog.text
    now = silo.doing()  # what crosslm status says at the silo
    assert now["now"] == "refused"
    assert now["why"].startswith("RuntimeError, which was not foreseen")


def test_a_silo_puts_no_message_together_that_is_far_too_large(silo, monkeypatch):
    """As no server does with a silo's; what is somewhat too large is answered by the application."""
    seen = []

    def pulled(_):
        seen.append(payload._left.bytes)
        raise UploadError("its message names more bytes than are allowed")

    monkeypatch.setattr(answer, "pull_task_input", pulled)
    monkeypatch.setenv(KIT, str(silo.kit))
    change(silo.kit, intake=IntakeConfig(max_bytes=1000))
    with pytest.raises(UploadError, match="more bytes"):
        answer.answer("127.0.0.1:1", "token")
    (silo.kit / "silo.toml").write_text("no settings")  # which the application says
    with pytest.raises(UploadError, match="more bytes"):
        answer.answer("127.0.0.1:1", "token")
    assert seen == [2000, 2 * IntakeConfig().max_bytes]
