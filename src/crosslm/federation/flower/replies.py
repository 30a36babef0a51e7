"""What silos answer, taken apart: a reply is a stranger's, whatever key it came with, and may hold anything."""

from dataclasses import dataclass

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from crosslm.errors import UploadError
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


def pulled(grid: Grid, message_id: str) -> Message | None:
    """The reply to a message, or None where there is none yet.

    Raises:
        UploadError: what came is no message.
        httpx.HTTPError: the SuperLink does not answer.
    """
    try:
        replies = list(grid.pull_messages([message_id]))
    except (httpx.HTTPError, OSError):
        raise
    except Exception as error:  # Flower puts the message together here, from parts that the silo made
        raise _unusable(f"cannot be put together: {type(error).__name__}: {error}") from error
    return replies[0] if replies else None


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
