"""The client application: answers two requests of the server, and runs nothing that comes with them."""

import logging
import os
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from crosslm import __version__
from crosslm.errors import CrosslmError
from crosslm.federation import messages
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.kits import KIT
from crosslm.federation.silo import Silo
from crosslm.models.sources import cache_folder

app = ClientApp()
logger = logging.getLogger(__name__)


@app.train("upload")
def upload(message: Message, context: Context) -> Message:
    """Step 1 and 2: train on the private text and upload the SLM."""
    request = message.content["request"]
    try:
        silo, number = _silo(), _round(request)
        _check_version(request, silo)
        data = silo.upload(str(request["experiment"]), number)
    except CrosslmError as error:
        return _refusal(message, error)
    return Message(RecordDict({"reply": _answer("ok", number), "message": split(data)}), reply_to=message)


@app.train("install")
def install(message: Message, context: Context) -> Message:
    """Step 5: install the enhanced SLM."""
    request, arrays = message.content["request"], message.content["message"]
    try:
        silo, number = _silo(), _round(request)
        assert isinstance(arrays, ArrayRecord)
        metrics = silo.install(
            str(request["experiment"]), number, b"".join(joined(arrays, silo.settings.intake.max_bytes))
        )
    except CrosslmError as error:
        return _refusal(message, error)
    content = RecordDict({"reply": _answer("ok", number), "metrics": MetricRecord(dict(metrics))})
    return Message(content, reply_to=message)


def _silo() -> Silo:
    return Silo(Path(os.environ[KIT]), cache_folder())


def _round(request: object) -> int:
    assert isinstance(request, ConfigRecord)
    return int(str(request["round"]))


def _check_version(request: object, silo: Silo) -> None:
    assert isinstance(request, ConfigRecord)
    if int(str(request["version"])) != messages.VERSION:
        raise CrosslmError(
            f"silo {silo.settings.id}: its crosslm {__version__} writes messages of version {messages.VERSION}; "
            f"the server's crosslm {request['crosslm']} reads version {request['version']}: install the same"
        )


def _answer(status: str, number: int) -> ConfigRecord:
    return ConfigRecord({"status": status, "round": number, "crosslm": __version__})


def _refusal(message: Message, error: CrosslmError) -> Message:
    """The server learns that it was refused, and no more: the words may name private files."""
    logger.error("%s", error)
    kind = type(error).__name__
    reply = ConfigRecord({"status": "refused", "reason": f"{kind}, see the silo's own log", "crosslm": __version__})
    return Message(RecordDict({"reply": reply}), reply_to=message)
