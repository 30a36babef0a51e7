"""Uploads and downloads as bytes: safetensors, with everything else as JSON in its header.

No pickle. The header is read with a size limit before any tensor is.
"""

import json
import struct
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from crosslm.errors import UploadError
from crosslm.records import Download, SlmState, Upload

VERSION = 1
MAX_HEADER = 32 * 2**20  # bytes; the largest part is the tokenizer


def encode(message: Upload | Download) -> bytes:
    """A message as one safetensors file."""
    kind = "upload" if isinstance(message, Upload) else "download"
    weights = message.slm.weights
    fields = {name: value for name, value in vars(message).items() if name != "slm"}
    slm = {name: value for name, value in vars(message.slm).items() if name != "weights"}
    header = json.dumps({"version": VERSION, "kind": kind, **fields, "slm": slm})
    return save(weights, metadata={"crosslm": header})


def decode_upload(data: bytes) -> Upload:
    """The upload in these bytes.

    Raises:
        UploadError: they are not an upload.
    """
    fields, slm = _decode(data, "upload")
    try:
        return Upload(
            str(fields["client_id"]),
            int(fields["client_round"]),
            tuple(int(count) for count in fields["class_counts"]),
            {str(name): float(value) for name, value in fields["metrics"].items()},
            slm,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UploadError(
            f"the upload lacks a field or holds a wrong value; both sides need the same crosslm: {error!r}"
        ) from error


def decode_download(data: bytes) -> Download:
    """The download in these bytes.

    Raises:
        UploadError: they are not a download.
    """
    fields, slm = _decode(data, "download")
    try:
        return Download(
            str(fields["client_id"]),
            int(fields["client_round"]),
            int(fields["step"]),
            {str(name): float(value) for name, value in fields["metrics"].items()},
            slm,
            tuple(map(str, fields["texts"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UploadError(
            f"the download lacks a field or holds a wrong value; both sides need the same crosslm: {error!r}"
        ) from error


def describe(message: Upload | Download) -> dict[str, Any]:
    """What a message holds besides weights, with the tensors' names, shapes and bytes: for reports."""
    fields = {name: value for name, value in vars(message).items() if name != "slm"}
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "bytes": tensor.nbytes}
        for name, tensor in message.slm.weights.items()
    }
    return {**fields, "tensors": tensors, "bytes": sum(entry["bytes"] for entry in tensors.values())}


def _decode(data: bytes, kind: str) -> tuple[dict[str, Any], SlmState]:
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(MAX_HEADER, len(data) - 8):
            raise UploadError(f"the {kind}'s header claims {length} bytes; allowed are {MAX_HEADER}")
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["crosslm"])
        if fields["version"] != VERSION or fields["kind"] != kind:
            raise UploadError(
                f"expected a {kind} of version {VERSION}, found a {fields['kind']} of version {fields['version']}; "
                "both sides need the same crosslm"
            )
        slm = fields["slm"]
        state = SlmState(
            dict(slm["architecture"]), dict(slm["tokenizer"]), tuple(slm["labels"]), int(slm["max_length"]), load(data)
        )
    except (struct.error, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UploadError(f"not a crosslm {kind}; was it cut or changed on its way? {error!r}") from error
    return fields, state
