"""What silos answer, taken apart: a reply is a stranger's, whatever key it came with, and may hold anything."""

from dataclasses import dataclass

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from crosslm.errors import ShortageError, UploadError
from crosslm.federation.flower.payload import at_most
from crosslm.support.plain import plain


@dataclass(frozen=True)
class Answer:
    """One reply, whose structure is as it must be."""

    refusal: str | None
    """Why the silo does not do what it was asked for; None where it did."""
    message: ArrayRecord | None
    """The upload, if that was asked for."""
    accepted: bool
    """Whether the silo uses the SLM that it was asked to install."""
    agreed: int | None = None
    """Uploads that the silo agrees to in all; None where it does not say."""


def are_own_answers(body: bytes) -> bool:
    """Whether a node pushes answers alone, and in its own name: Flower checks who pushes, and not this.

    Args:
        body: of a request to push messages.
    """
    try:
        pushed = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    who, heads = pushed.node.node_id, [message.metadata for message in pushed.messages_list]
    return bool(heads) and all(
        head.reply_to_message_id and (head.src_node_id, head.dst_node_id) == (who, SUPERLINK_NODE_ID) for head in heads
    )


def pulled(grid: Grid, message_id: str, most: int) -> Message | None:
    """The reply to a message, or None where there is none yet.

    Flower also gives out here what was sent to the server and answers nothing: that is nobody's answer.

    Args:
        grid: Flower's.
        message_id: of the message.
        most: bytes that the reply's arrays may have.

    Raises:
        UploadError: what came is no message, or too large.
        ShortageError: this machine has no room for it; nothing is known of it.
        httpx.HTTPError: the SuperLink does not answer.
    """
    try:
        with at_most(most):
            replies = list(grid.pull_messages([message_id]))
    except (UploadError, httpx.HTTPError, OSError):
        raise
    except RecursionError as error:  # of what it holds, although it is a RuntimeError
        raise _unusable(f"cannot be put together: {type(error).__name__}: {error}") from error
    except (MemoryError, RuntimeError) as error:  # Flower also starts threads for it
        raise ShortageError(
            f"there is no room for its reply: {type(error).__name__}: {error}; this machine must have room for it"
        ) from error
    except Exception as error:  # Flower puts the message together here, from parts that the silo made
        raise _unusable(f"cannot be put together: {type(error).__name__}: {error}") from error
    return next((reply for reply in replies if reply.metadata.reply_to_message_id == message_id), None)


def answer_in(reply: Message, kind: str) -> Answer:
    """What a silo has answered.

    Args:
        reply: without an error of Flower's.
        kind: what it was asked for: ``upload``, ``install``, ``closing`` or to know that its upload was ``not_used``.

    Raises:
        UploadError: a part is missing, or is of another kind than it must be.
    """
    content = reply.content
    told = content.get("reply")
    if not isinstance(told, ConfigRecord):
        raise _unusable("has no ConfigRecord 'reply'")
    status = told.get("status")
    if status == "refused":
        return Answer(plain(str(told.get("reason", "no reason given"))[:200]), None, False)
    if status != "ok":
        raise _unusable(f"has the status {str(status)[:40]!r}; 'ok' and 'refused' are known")
    message = content.get("message")
    if kind == "upload" and not isinstance(message, ArrayRecord):
        raise _unusable("has no ArrayRecord 'message'")
    given = message if isinstance(message, ArrayRecord) else None
    return Answer(None, given, _accepted(content.get("metrics")), _agreed(told.get("max_participations")))


def _accepted(metrics: object) -> bool:
    """A silo that says nothing of it has taken what it got."""
    return not isinstance(metrics, MetricRecord) or metrics.get("accepted", 1.0) != 0.0


def _agreed(number: object) -> int | None:
    """A silo of an earlier crosslm does not say it."""
    return number if type(number) is int and number > 0 else None


def _unusable(what: str) -> UploadError:
    return UploadError(f"its reply {plain(what[:200])}; is its crosslm the same as the server's?")
