"""Takes the SuperNode's tasks, in the place of Flower's SuperExec, and has another process answer them.

Of all kinds of tasks that a server may send, tasks for a client application alone are taken.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

POLL = 1.0  # seconds between looks for a task
REST = 60.0  # seconds without a task until the process that answers is ended: it holds memory, of a GPU too
TAKEN = (TaskType.CLIENT_APP,)


def take_tasks(address: str) -> None:
    """Answer one task after the other until the process is ended.

    Args:
        address: HOST:PORT of the SuperNode's interface on this machine.
    """
    client, answers = _client(address, RuntimeVersionHttpInterceptor("SuperExec")), Answers(address)
    while True:
        take_one(client, answers)
        answers.rest()
        time.sleep(POLL)


class Answers:
    """The process that answers, kept for the tasks that come soon after: it imports for seconds."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.process: subprocess.Popen[str] | None = None
        self.since = 0.0
        """When it answered last."""

    def answer(self, token: str) -> None:
        """Have the task of this token answered.

        Raises:
            SystemExit: the process has died. The SuperNode would wait for the rest of what it was handing over for
                ever, so this process ends too, and the silo starts both again.
        """
        if self.process is not None and self.process.poll() is not None:
            self.end()  # it died when nothing was asked of it
        if self.process is None:
            self.process = self._start()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has died, which the next line sees
            process.stdin.write(f"{token}\n")
            process.stdin.flush()
        if not process.stdout.readline():
            self.end()
            code = process.returncode
            raise SystemExit(f"the process that answers a message of the server ended with code {code}")
        self.since = time.monotonic()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "crosslm.federation.flower.answer", self.address]
        pipe = subprocess.PIPE  # tokens go through it, since others can read arguments
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def rest(self) -> None:
        """End the process if nothing has come for a while."""
        if self.process is not None and time.monotonic() - self.since > REST:
            self.end()

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.communicate()  # closes its input
            self.process = None


def take_one(client: RuntimeHttpClient, answers: Answers) -> bool:
    """Answer a task if one waits; whether one did.

    Raises:
        SystemExit: as :meth:`Answers.answer`.
    """
    try:
        token = client.AcquireTask(AcquireTaskRequest(supported_task_types=TAKEN)).token
    except httpx.TransportError:  # the SuperNode does not listen yet
        return False
    if token:
        with _signs_of_life(answers.address, token):
            answers.answer(token)
    return bool(token)


@contextmanager
def _signs_of_life(address: str, token: str) -> Iterator[None]:
    """Tell the SuperNode that a task is being worked on, from the first moment: the process that does may take a while.

    Flower's own signs would end this process when the task is no more; here it goes on, and what was trained is sent
    when the server asks again.
    """
    client = _client(address, RuntimeTokenHttpInterceptor(token))

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()
        client.close()


def _client(
    address: str, interceptor: RuntimeVersionHttpInterceptor | RuntimeTokenHttpInterceptor
) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=[interceptor]
    )


if __name__ == "__main__":
    take_tasks(sys.argv[1])
