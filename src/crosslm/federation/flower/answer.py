"""Tasks of the SuperNode: the answers to messages of the server, one after the other, in a process of their own.

Flower's own ``flwr-clientapp`` unpacks the app bundle that the server sends and imports what its settings
name, so that whoever holds the server runs code at every silo. Here a bundle is looked at, never
unpacked, and the application is always the one of the crosslm that the silo has installed. To do without
Flower's program is less fragile than to guard it: a Flower in which these functions are named
otherwise ends this process with an error, and cannot make it install anything.
"""

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from crosslm.config import IntakeConfig
from crosslm.errors import FederationError
from crosslm.federation.flower.bundle import check_bundle
from crosslm.federation.flower.client_app import AskAgainError, app, refusal, tell_operator
from crosslm.federation.flower.payload import at_most
from crosslm.federation.kits import KIT, read_silo

UNSAID = "an error at the silo, see its own log"
logger = logging.getLogger(__name__)


def answer(address: str, token: str) -> None:
    """Take the message of a task from the SuperNode, answer it, and bring the answer back.

    Args:
        address: HOST:PORT of the SuperNode's interface on this machine.
        token: of the task.
    """
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor("flwr-clientapp"), RuntimeTokenHttpInterceptor(token)],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    try:
        with at_most(2 * _most_bytes()):  # what is larger than it may be, and not much, is answered by the application
            message, context, _, bundle = pull_task_input(client)
        push_message(client, answer_to(message, context, bundle.content), context)
        push_task_output(client=client, context=context, sub_status=SubStatus.COMPLETED, details="")
    finally:
        client.close()


def answer_each(address: str, tokens: Iterable[str], done: TextIO) -> None:
    """Answer tasks until no more come.

    Args:
        address: HOST:PORT of the SuperNode's interface on this machine.
        tokens: of each task, a line.
        done: gets a line after each.
    """
    for token in tokens:
        answer(address, token.strip())
        done.write("done\n")
        done.flush()


def _most_bytes() -> int:
    """Of what comes, by the silo's own settings; the application says what is wrong with these."""
    try:
        return read_silo(Path(os.environ[KIT])).intake.max_bytes
    except FederationError:
        return IntakeConfig().max_bytes


def answer_to(message: Message, context: Context, bundle: bytes) -> Message:
    """The answer of the installed application, or a refusal if the app that came along is another.

    An error that was not foreseen is told without its words, which may quote private text or name files.
    """
    try:
        check_bundle(bundle)
        return app(message=message, context=context)
    except FederationError as error:
        return refusal(message, error)
    except AskAgainError:
        logger.exception("the message could not be answered")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, UNSAID), reply_to=message)
    except Exception as error:
        logger.exception("the message could not be answered")
        tell_operator(f"{type(error).__name__}, which was not foreseen; the log of the process that trains has more")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, UNSAID), reply_to=message)


def main() -> None:
    """Answer tasks whose tokens come by the standard input; the standard output says which are done, and no more."""
    start_parent_process_monitor(os.getppid())
    with os.fdopen(os.dup(1), "w") as done:
        os.dup2(2, 1)  # what any library prints goes to the log
        answer_each(sys.argv[1], sys.stdin, done)


if __name__ == "__main__":
    main()
