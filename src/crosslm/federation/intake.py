"""Intake: what comes from elsewhere is hostile until shown otherwise, and nothing of it is loaded before.

In this order: size, header, table of tensors, fields, labels, architecture (allow-list), names, shapes
and dtypes of the tensors against what that architecture must have (computed without allocating),
tokenizer (allow-list), and then the numbers themselves: finite, and within a bound. The server checks
uploads, and a client checks what returns, by the same rules.
"""

import json
import math
import re
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosslm.config import IntakeConfig
from crosslm.errors import FederationError, ModelError, ShortageError, UploadError
from crosslm.federation import strict_json
from crosslm.federation.messages import MAX_HEADER, VERSION, decode_download, decode_upload
from crosslm.federation.tokenizer_rules import check_tokenizer
from crosslm.models.architecture import SPECIAL_TOKENS, check_architecture, longest_text, on_meta
from crosslm.records import Download, SlmState, Upload

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
METRIC = re.compile(r"[A-Za-z0-9/_.-]{1,64}")
MAX_TENSORS, MAX_NAME = 4096, 256
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
FLOATS = ("F32", "F16", "BF16")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
"""Of dtypes, in safetensors."""
MAX_COUNT, MAX_METRICS, MAX_TEXTS = 10**9, 64, 10**6
UNFORESEEN = "a check could not be made"
NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)  # as PyTorch says it
FIELDS = {
    "upload": {"version", "kind", "client_id", "client_round", "class_counts", "metrics", "slm"},
    "download": {"version", "kind", "client_id", "client_round", "step", "metrics", "texts", "slm"},
}
SLM_FIELDS = {"architecture", "tokenizer", "labels", "max_length"}


@dataclass(frozen=True)
class Intake:
    """The checks for one task's labels, with their bounds, for whatever carries messages."""

    labels: tuple[str, ...]
    bounds: IntakeConfig

    def upload(self, data: bytes | Path, client_id: str) -> Upload:
        """The upload in these bytes or this file, after every check.

        Args:
            data: as it came; of a file only the header is read before the header has passed.
            client_id: who sent it, as the carrier knows.

        Raises:
            UploadError: it is refused; names the client and the reason.
            ShortageError: this machine lacks what the checks need.
        """
        with _refusing(f"client {client_id}: "):
            deadline = time.thread_time() + self.bounds.max_seconds
            upload = decode_upload(_checked(data, "upload", self.labels, self.bounds, client_id, deadline))
            _check_numbers(upload.slm, self.bounds, deadline)
        return upload

    def download(self, data: bytes | Path, client_id: str) -> Download:
        """The download in these bytes or this file, after the same checks as :meth:`upload`.

        Raises:
            UploadError: it is refused; names the client and the reason.
            ShortageError: as of :meth:`upload`.
        """
        with _refusing(f"client {client_id}: what the server returned is refused: "):
            deadline = time.thread_time() + self.bounds.max_seconds
            download = decode_download(_checked(data, "download", self.labels, self.bounds, client_id, deadline))
            _check_numbers(download.slm, self.bounds, deadline)
        return download

    def untrained(self, state: SlmState, who: str) -> None:
        """Find out that uploads of a classifier would pass, before it is trained for one.

        Args:
            state: as it would be sent; its weights may be on the meta device, since no number is looked at.
            who: would send it, and which model.

        Raises:
            ModelError: they would be refused; says why.
        """
        slm = {name: value for name, value in vars(state).items() if name != "weights"}
        table = {
            name: (NAMES.get(each.dtype, str(each.dtype)), tuple(each.shape)) for name, each in state.weights.items()
        }
        header = len(json.dumps(json.dumps(slm)))  # the tokenizer is nearly all of it
        size, most = header + sum(each.nbytes for each in state.weights.values()), self.bounds.max_bytes
        if size > most:
            raise ModelError(
                f"{who} has {size} bytes as an upload, and at most {most} are allowed; raise intake.max_bytes, or "
                "choose a smaller model (between machines wire_dtype = 'float16' in silo.toml halves the bytes)"
            )
        try:
            if header > MAX_HEADER:
                raise UploadError(f"the upload's header has {header} bytes; allowed are {MAX_HEADER}")
            arriving = json.loads(json.dumps(slm))  # with lists for tuples
            _check_slm(arriving, table, self.labels, self.bounds, math.inf)
        except UploadError as error:
            raise ModelError(f"{who} cannot be uploaded: {error}; choose another model") from error


def check_same_model(mine: SlmState, returned: SlmState, who: str) -> None:
    """Find out that what came back is the model that was sent, with other weights and nothing else.

    Raises:
        FederationError: it is another one.
    """
    parts = [(slm.architecture, slm.tokenizer, slm.labels, slm.max_length) for slm in (mine, returned)]
    if parts[0] != parts[1]:
        raise FederationError(
            f"{who}: the SLM that came back has another architecture, tokenizer, label order or maximum length, and is "
            "not installed; "
            "ask whoever runs the server why, before this silo agrees to more (max_participations)"
        )
    if _shapes(mine.weights) != _shapes(returned.weights):
        raise FederationError(
            f"{who}: the SLM that came back has other tensors than the one that was sent, and is not installed; "
            "ask whoever runs the server why, before this silo agrees to more (max_participations)"
        )


@contextmanager
def _refusing(prefix: str) -> Iterator[None]:
    """Whatever goes wrong with a stranger's bytes is a refusal of them, and never the end of who checks them.

    But for what this machine lacks meanwhile, which says nothing of them.
    """
    try:
        yield
    except UploadError as error:
        raise UploadError(f"{prefix}{error}") from error
    except Exception as error:
        what = f"{prefix}{UNFORESEEN}: {type(error).__name__}: {str(error)[:120]}"
        if isinstance(error, MemoryError | OSError) or NO_MEMORY.search(str(error)):
            raise ShortageError(f"{what}; see to it that this machine has room") from error
        raise UploadError(what) from error


def _checked(
    data: bytes | Path, kind: str, wanted: tuple[str, ...], bounds: IntakeConfig, client_id: str, deadline: float
) -> bytes:
    """The bytes, once all that can be said without their tensors has been checked."""
    if not CLIENT_ID.fullmatch(client_id):
        raise UploadError("its id must be 1 to 64 letters, digits, dots, dashes and underscores")
    size, head = _head(data, kind, bounds)
    header = strict_json.parse(head, "header", 16 * MAX_TENSORS)
    table = _check_table(header, size - 8 - len(head))
    fields = _fields(header, kind, client_id)
    _check_slm(fields["slm"], table, wanted, bounds, deadline)
    return data if isinstance(data, bytes) else data.read_bytes()


def _check_slm(
    slm: Mapping[str, Any],
    table: Mapping[str, tuple[str, tuple[int, ...]]],
    wanted: tuple[str, ...],
    bounds: IntakeConfig,
    deadline: float,
) -> None:
    """The fields of a classifier, and its tensors' dtypes and shapes."""
    labels = _check_labels(slm["labels"], wanted)
    architecture = _object(slm["architecture"], "architecture")
    check_architecture(architecture)
    _check_label_map(architecture, labels)
    model = on_meta(architecture, len(labels))
    _check_tensors(table, model.state_dict())
    _in_time(deadline, bounds)
    longest, places = slm["max_length"], longest_text(model, 2**20)
    if type(longest) is not int or not 0 < longest <= places:
        raise UploadError(f"its max_length is {str(longest)[:40]}; the architecture reads 1 to {places} tokens")
    check_tokenizer(_object(slm["tokenizer"], "tokenizer"), SPECIAL_TOKENS, model.config.vocab_size, longest)
    _in_time(deadline, bounds)


def _head(data: bytes | Path, kind: str, bounds: IntakeConfig) -> tuple[int, bytes]:
    """Size of the whole, and the bytes of the safetensors header."""
    if isinstance(data, Path):
        if data.is_symlink() or not data.is_file():
            raise UploadError(f"the {kind} is not an ordinary file")
        size = data.stat().st_size
    else:
        size = len(data)
    if size > bounds.max_bytes:
        raise UploadError(f"the {kind} has {size} bytes; at most {bounds.max_bytes} are allowed (intake.max_bytes)")
    if isinstance(data, Path):
        with data.open("rb") as file:
            start = file.read(8)
            length = _header_length(start, size, kind)
            return size, file.read(length)
    length = _header_length(data[:8], size, kind)
    return size, data[8 : 8 + length]


def _header_length(start: bytes, size: int, kind: str) -> int:
    if len(start) < 8:
        raise UploadError(f"the {kind} has {size} bytes and is no safetensors file")
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise UploadError(f"the {kind}'s header claims {length} bytes of {size}; allowed are 2 to {MAX_HEADER}")
    return int(length)


def _check_table(header: Any, body: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor; together they must fill the body exactly, in some order."""
    if not isinstance(header, dict):
        raise UploadError("its header is not an object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not 0 < len(entries) <= MAX_TENSORS:
        raise UploadError(f"it has {len(entries)} tensors; 1 to {MAX_TENSORS} are allowed")
    table, spans = {}, []
    for name, entry in entries.items():
        if len(name) > MAX_NAME or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise UploadError(f"its tensor {name[:60]!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise UploadError(
                f"its tensor {name[:60]!r} has the dtype {str(dtype)[:20]!r}; known: {', '.join(DTYPE_BYTES)}"
            )
        if not _whole_numbers(shape) or len(shape) > 4 or not _whole_numbers(offsets) or len(offsets) != 2:
            raise UploadError(f"its tensor {name[:60]!r} has a shape or offsets that cannot be")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise UploadError(f"its tensor {name[:60]!r} claims the shape {shape} in {offsets[1] - offsets[0]} bytes")
        table[name] = (str(dtype), tuple(shape))
        spans.append((offsets[0], offsets[1]))
    place = 0
    for start, end in sorted(spans):
        if start != place:
            raise UploadError("its tensors overlap, or leave bytes between them")
        place = end
    if place != body:
        raise UploadError(f"its tensors fill {place} bytes of {body}")
    return table


def _fields(header: Mapping[str, Any], kind: str, client_id: str) -> dict[str, Any]:
    metadata = _object(header.get("__metadata__"), "metadata")
    if set(metadata) != {"crosslm"} or not isinstance(metadata["crosslm"], str):
        raise UploadError("its metadata must be the one entry 'crosslm'")
    fields = _object(
        strict_json.parse(metadata["crosslm"].encode(), "metadata", 16 * MAX_TENSORS),
        "metadata",
    )
    if fields.get("version") != VERSION or fields.get("kind") != kind:
        raise UploadError(
            f"expected a {kind} of version {VERSION}, found {str(fields.get('kind'))[:20]!r} of version "
            f"{str(fields.get('version'))[:20]}"
        )
    if set(fields) != FIELDS[kind] or set(_object(fields["slm"], "slm")) != SLM_FIELDS:
        raise UploadError(f"its fields must be {sorted(FIELDS[kind])}, those of slm {sorted(SLM_FIELDS)}")
    if fields["client_id"] != client_id:
        raise UploadError(f"it says that it is of client {str(fields['client_id'])[:60]!r}")
    numbers = [fields["client_round"], fields.get("step", 0), *_listed(fields.get("class_counts", []))]
    if not all(type(number) is int and 0 <= number <= MAX_COUNT for number in numbers):
        raise UploadError(f"its round, step or class counts are {str(numbers)[:80]}; whole numbers from 0 are needed")
    metrics = _object(fields["metrics"], "metrics")
    if len(metrics) > MAX_METRICS or not all(map(METRIC.fullmatch, metrics)):
        raise UploadError(
            f"its metrics are more than {MAX_METRICS}, or have names that are not 1 to 64 letters, digits and / _ . -"
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values()):
        raise UploadError("its metrics are not all finite numbers")
    texts = _listed(fields.get("texts", []))
    if len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
        raise UploadError(f"its texts must be strings, at most {MAX_TEXTS}")
    if kind == "upload" and len(fields["class_counts"]) != len(_listed(fields["slm"]["labels"])):
        raise UploadError(f"its class counts are {str(fields['class_counts'])[:80]}; one for each label is needed")
    return fields


def _check_labels(labels: Any, wanted: tuple[str, ...]) -> list[str]:
    if not all(isinstance(label, str) for label in _listed(labels)) or sorted(labels) != sorted(wanted):
        raise UploadError(f"its labels are {str(labels)[:120]}, the task's are {list(wanted)}")
    return list(labels)


def _check_label_map(architecture: Mapping[str, Any], labels: list[str]) -> None:
    """``id2label`` and ``label2id`` must say the same as the labels in the order of the outputs."""
    stated = {str(place): label for place, label in enumerate(labels)}
    inverse = {label: place for place, label in enumerate(labels)}
    for key, right in (("id2label", stated), ("label2id", inverse)):
        if architecture.get(key) != right:
            raise UploadError(f"its {key} is {str(architecture.get(key))[:120]}, which is not its labels {labels}")


def _check_tensors(table: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, Any]) -> None:
    missing, unknown = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or unknown:
        first = f"{missing[0]!r} is missing" if missing else f"{unknown[0][:60]!r} is not one of it"
        raise UploadError(f"its tensors are not those of its architecture: {first}")
    for name, (dtype, shape) in table.items():
        right = tuple(expected[name].shape)
        if shape != right:
            raise UploadError(f"its tensor {name!r} has the shape {list(shape)}, the architecture says {list(right)}")
        if expected[name].is_floating_point() != (dtype in FLOATS):
            raise UploadError(
                f"its tensor {name!r} has the dtype {dtype}, the architecture says {expected[name].dtype}"
            )


def _check_numbers(state: SlmState, bounds: IntakeConfig, deadline: float) -> None:
    for name, weight in state.weights.items():
        _in_time(deadline, bounds)
        if not weight.is_floating_point() or not weight.numel():
            continue
        # a sum of squares in fp32 is infinite for numbers that are no weights, and refused
        root_mean_square = float(weight.float().norm()) / math.sqrt(weight.numel())
        if not math.isfinite(root_mean_square):
            raise UploadError(f"its weight {name} is not finite; lower the learning rate that it was trained with")
        if root_mean_square > bounds.max_rms:
            raise UploadError(
                f"its weight {name} has a root mean square of {root_mean_square:.3g}; at most {bounds.max_rms:g} "
                "is allowed (intake.max_rms)"
            )


def _in_time(deadline: float, bounds: IntakeConfig) -> None:
    if time.thread_time() > deadline:  # work alone counts: a machine may be suspended, or wait for its disk
        raise UploadError(f"its checks took more than {bounds.max_seconds:g} s (intake.max_seconds)")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UploadError(f"its {what} is not an object")
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**48 for number in value)


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}
