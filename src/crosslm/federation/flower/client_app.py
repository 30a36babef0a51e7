"""The client application: answers four requests of the server, and runs nothing that comes with them."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from crosslm import __version__
from crosslm.errors import CrosslmError, KeptFileError, RunError
from crosslm.federation import leaving, messages
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.kits import KIT
from crosslm.federation.silo import OF_THE_DOWNLOAD, Silo
from crosslm.models.sources import cache_folder
from crosslm.support.files import parts_of
from crosslm.support.plain import plain

app = ClientApp()
logger = logging.getLogger(__name__)


@app.train("upload")
def upload(message: Message, context: Context) -> Message:
    """Step 1 and 2: train on the private text and upload the SLM."""
    request = message.content["request"]
    try:
        silo, number = _silo_for(request)
        file = silo.upload(str(request["experiment"]), number)
    except (KeptFileError, RunError) as error:  # a RunError is of the disk
        raise _ask_again(message, error) from None
    except CrosslmError as error:
        return refusal(message, error)
    reply = {"reply": ConfigRecord(silo.done(number)), "message": split(parts_of(file))}
    return Message(RecordDict(reply), reply_to=message)


@app.train("install")
def install(message: Message, context: Context) -> Message:
    """Step 5: install the enhanced SLM."""
    return _installed(message, Silo.install)


def _installed(message: Message, take: Callable[[Silo, str, int, Iterable[bytes]], dict[str, float]]) -> Message:
    request, arrays = message.content["request"], message.content["message"]
    try:
        silo, number = _silo_for(request)
        assert isinstance(arrays, ArrayRecord)
        parts = joined(arrays, silo.settings.intake.max_bytes)
        metrics = take(silo, str(request["experiment"]), number, parts)
    except OF_THE_DOWNLOAD as error:
        return refusal(message, error)
    except CrosslmError as error:
        raise _ask_again(message, error) from None
    reply = {"reply": ConfigRecord(silo.done(number)), "metrics": MetricRecord(dict(metrics))}
    return Message(RecordDict(reply), reply_to=message)


@app.train("closing")
def closing(message: Message, context: Context) -> Message:
    """Step 5 once more, when no more uploads come."""
    return _installed(message, Silo.close)


@app.train("not_used")
def not_used(message: Message, context: Context) -> Message:
    """The server did not use the upload, and nothing comes back."""
    request = message.content["request"]
    try:
        silo, number = _silo_for(request)
        assert isinstance(request, ConfigRecord)
        silo.not_used(str(request["experiment"]), number, str(request["reason"]))
    except KeptFileError as error:
        raise _ask_again(message, error) from None
    except CrosslmError as error:
        return refusal(message, error)
    return Message(RecordDict({"reply": ConfigRecord(silo.done(number))}), reply_to=message)


def _silo() -> Silo:
    return Silo(Path(os.environ[KIT]), cache_folder())


def _silo_for(request: object) -> tuple[Silo, int]:
    """This silo, and the number of the round; the server must write messages of the version that is read here."""
    assert isinstance(request, ConfigRecord)
    silo, version, crosslm = _silo(), int(str(request["version"])), plain(str(request["crosslm"])[:40])
    if version != messages.VERSION:
        raise CrosslmError(
            f"silo {silo.settings.id}: its crosslm {__version__} writes messages of version {messages.VERSION}; "
            f"the server's crosslm {crosslm} reads version {version}: install the same"
        )
    return silo, int(str(request["round"]))


class AskAgainError(RuntimeError):
    """Something of the silo's own is amiss, and its operator has been told what; the server asks again."""


def _ask_again(message: Message, error: CrosslmError) -> AskAgainError:
    """What ends this answer where something of the silo's own is amiss: nothing is decided, and the server asks again.

    It learns the kind of error alone; the silo's own log has more.
    """
    refusal(message, error)
    return AskAgainError(type(error).__name__)


def refusal(message: Message, error: CrosslmError) -> Message:
    """An answer by which the server learns that it was refused and the kind of error; the silo's own log has more."""
    why = plain(str(error))  # the server's words may be in it
    logger.error("%s", why)
    tell_operator(why)
    return Message(RecordDict({"reply": ConfigRecord(leaving.refused(error))}), reply_to=message)


def tell_operator(why: str) -> None:
    """Have ``crosslm status`` say why the last request was not answered."""
    with suppress(CrosslmError, OSError):  # a kit or a disk that cannot be used is what it may be about
        _silo().now("refused", why=why)
