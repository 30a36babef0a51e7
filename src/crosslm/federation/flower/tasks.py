"""Takes the SuperNode's tasks, in the place of Flower's SuperExec, and answers each in a process of its own.

Of all kinds of tasks that a server may send, tasks for a client application alone are taken.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

POLL = 1.0  # seconds between looks for a task
TAKEN = (TaskType.CLIENT_APP,)


def take_tasks(address: str) -> None:
    """Answer one task after the other until the process is ended.

    Args:
        address: HOST:PORT of the SuperNode's interface on this machine.
    """
    client = _client(address, RuntimeVersionHttpInterceptor("SuperExec"))
    while True:
        take_one(client, address)
        time.sleep(POLL)


def take_one(client: RuntimeHttpClient, address: str) -> bool:
    """Answer a task if one waits; whether one did.

    Raises:
        SystemExit: the process that answers has died. The SuperNode would wait for the rest of what it was handing over
            for ever, so this process ends too, and the silo starts both again.
    """
    try:
        token = client.AcquireTask(AcquireTaskRequest(supported_task_types=TAKEN)).token
    except httpx.TransportError:  # the SuperNode does not listen yet
        return False
    if token:
        with _signs_of_life(address, token):
            command = [sys.executable, "-m", "crosslm.federation.flower.answer", address]
            done = subprocess.run(command, input=token, text=True, check=False)  # others can read arguments
        if done.returncode:
            raise SystemExit(f"the process that answers a message of the server ended with code {done.returncode}")
    return bool(token)


@contextmanager
def _signs_of_life(address: str, token: str) -> Iterator[None]:
    """Tell the SuperNode that a task is being worked on, from the first moment: the process that does takes a while.

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
