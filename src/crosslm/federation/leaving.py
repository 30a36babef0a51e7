"""All that leaves a silo between machines: the message with the upload, and the short answers around it.

The client application sends what is made here and nothing else, the dry run prints it, and receipts keep uploads and
the answers to what came back.
"""

from typing import Any

from crosslm import __version__
from crosslm.client import EXACT_SHARE
from crosslm.config import FitConfig, PrivacyConfig
from crosslm.errors import CrosslmError
from crosslm.federation.messages import VERSION, describe
from crosslm.records import Upload

DP_METRICS = ("epsilon", "delta", "clip", "noise_multiplier", "sample_rate", "steps", "means", "count_epsilon")
CARRIER = (
    "Flower adds of its own: numbers of message, run and node, the kind of message, its time and how long it is kept, "
    "its own version, a signature by this silo's key, how long the answer took to make, and a sign of life now and then"
)
QUESTION = (
    "crosslm client, while it is connected, and crosslm doctor ask the server, by the SHA-256 of this silo's public "
    "key, how many of its rounds are complete there"
)


def done(number: int, agreed: int) -> dict[str, Any]:
    """The answer beside an upload, and the one to what came back for a round.

    Args:
        number: the round.
        agreed: uploads that this silo agrees to: when they are made it leaves, and the server waits for no more.
    """
    return {"status": "ok", "round": number, "crosslm": __version__, "max_participations": agreed}


def refused(error: CrosslmError) -> dict[str, Any]:
    """The answer to what this silo does not do: the kind of error, since its words may name private files."""
    reason = f"{type(error).__name__}, see the silo's own log"
    return {"status": "refused", "reason": reason, "crosslm": __version__}


def confirmation(number: int, accepted: bool) -> dict[str, float]:
    """What is told of an SLM that came back: ``accepted`` may depend on held-out private rows."""
    return {"round": float(number), "accepted": float(accepted)}


def answers() -> dict[str, list[str]]:
    """The fields of every answer, by the occasion."""
    return {
        "beside the upload": list(done(0, 1)),
        "when an SLM came back, and once more in the end": [
            *done(0, 1),
            *(f"metrics.{name}" for name in confirmation(0, True)),
        ],
        "when the server did not use the upload": list(done(0, 1)),
        "when this silo refuses": list(refused(CrosslmError())),
        "when something went wrong here": [f"error.{field}" for field in ("code", "reason")],
    }


def contents(upload: Upload) -> dict[str, Any]:
    """All that is in an upload: every field by name, the tensors by shape, type and size."""
    state, described = upload.slm, describe(upload)
    fields = {name: value for name, value in described.items() if name not in ("tensors", "bytes")}
    return {
        "fields": {
            "version": VERSION,
            "kind": "upload",
            **fields,
            "labels": list(state.labels),
            "max_length": state.max_length,
            "architecture": dict(state.architecture),
            "tokenizer": {name: f"{len(text.encode())} bytes" for name, text in state.tokenizer.items()},
        },
        "tensors": described["tensors"],
        "tensor_bytes": described["bytes"],
    }


def metric_names(fit: FitConfig, privacy: PrivacyConfig) -> list[str]:
    """The metrics of an upload by name, which training gives their values."""
    if privacy.epsilon:
        return ["epochs", *(f"dp/{name}" for name in DP_METRICS)]
    share = [] if privacy.told_counts == "hidden" else [EXACT_SHARE]
    return ["loss", "epochs"] + (["holdout_loss", *share] if fit.patience else [])
