"""Which classifier architectures may travel, which of their keys, and which tensors each must have.

An architecture that comes from elsewhere reaches transformers only through :func:`check_architecture`:
a model type and keys from an allow-list, values within bounds. What tensors it has is then computed
without allocating any (torch's meta device).
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import Linear
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSequenceClassification

from crosslm.errors import ModelError, UploadError
from crosslm.models.loading import loading

MODEL_TYPES = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "gemma3_text",
    "gpt2",
    "llama",
    "mobilebert",
    "modernbert",
    "mpnet",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)
ENCODERS = frozenset(MODEL_TYPES) - {"gemma3_text", "gpt2", "llama", "qwen2", "qwen3"}
"""Those that write no text: transformers gives some of them a head for words all the same."""
NOT_COMPUTED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "transformers_version",
    }
)
"""Keys that every configuration has and that no classifier of ours needs from outside."""
SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token")
LABEL_KEYS = ("id2label", "label2id")
MAX_COUNT, MAX_SIZE, MAX_ENTRIES, MAX_WORD = 256, 2**20, 256, 64
MAX_LABELS = 2**16  # each is held against the task's
SHARES = ("dropout", "pdrop")
COUNTS = ("layer", "heads", "n_head", "group", "networks", "block")
"""Parts of the names of keys that say how many modules there are."""


ALSO = {
    "deberta": frozenset({"cls_dropout", "talking_head"}),
    "deberta-v2": frozenset(
        {
            "attention_head_size",
            "cls_dropout",
            "conv_act",
            "conv_groups",
            "conv_kernel_size",
            "norm_rel_ebd",
            "position_buckets",
            "share_att_key",
        }
    ),
    "qwen2": frozenset({"head_dim"}),
}
"""Keys that a model asks its configuration for, and that its class has only where they are given."""


@cache
def allowed_keys(model_type: str) -> frozenset[str]:
    """The keys of an architecture of this type: those of its configuration class, and what its model asks for."""
    own = frozenset(CONFIG_MAPPING[model_type]().to_dict()) - NOT_COMPUTED - {"sinusoidal_pos_embds"}
    return own | ALSO.get(model_type, frozenset())


def travelling(architecture: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The part of a ``config.json`` that an upload or download carries, with the labels of the outputs."""
    model_type = architecture.get("model_type")
    known = allowed_keys(model_type) if model_type in MODEL_TYPES else set(architecture)  # refused on arrival
    return {key: value for key, value in architecture.items() if key in known} | {
        "id2label": {str(place): label for place, label in enumerate(labels)},
        "label2id": {label: place for place, label in enumerate(labels)},
    }


def special_tokens(text: str) -> dict[str, str]:
    """The special tokens in a ``tokenizer_config.json``; everything else in it is ignored."""
    return {name: token for name, token in json.loads(text).items() if name in SPECIAL_TOKENS}


def check_travels(folder: str, who: str) -> None:
    """Find out that a model is there and of a type that may be uploaded, without loading its weights.

    Raises:
        ModelError: it is not so.
    """
    with loading(f"{who}: SLM {folder!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder)
    try:
        check_model_type(config.model_type)
    except UploadError as error:
        raise ModelError(f"{who}: SLM {folder!r} cannot be uploaded: {error}") from error


def check_model_type(model_type: object) -> None:
    """Find out that classifiers of this type may travel.

    Raises:
        UploadError: they may not.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UploadError(f"its model type {_shown(model_type)} is not one of {', '.join(MODEL_TYPES)}")


def check_architecture(architecture: Mapping[str, Any]) -> None:
    """Find out that an architecture is of a known type, with known keys and values within bounds.

    Raises:
        UploadError: it is not; names the key.
    """
    model_type = architecture.get("model_type")
    check_model_type(model_type)
    for key, value in architecture.items():
        if key == "auto_map":
            raise UploadError("its architecture names code to load (auto_map), which is never done")
        if key not in allowed_keys(str(model_type)):
            raise UploadError(f"its architecture has the key {_shown(key)}, which no {model_type} may bring")
        _check_value(key, value, depth=0)


def on_meta(architecture: Mapping[str, Any], num_labels: int) -> Any:
    """A classifier of this architecture on the meta device: every shape and dtype, no data.

    Raises:
        UploadError: transformers cannot make a model of it, or makes one with other outputs.
    """
    fields = dict(architecture)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if config.num_labels != num_labels:
            raise UploadError(f"its architecture has {config.num_labels} outputs for {num_labels} labels")
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except UploadError:
        raise
    except Exception as error:
        raise UploadError(f"its architecture cannot be: {_shown(error)}") from error


def longest_text(model: Any, otherwise: int) -> int:
    """Tokens that a model has positions for; RoBERTa and its like count them from behind the padding's."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    first = getattr(embeddings, "padding_idx", None)
    return int(getattr(model.config, "max_position_embeddings", otherwise)) - (0 if first is None else first + 1)


def output_layer(model: Any) -> Linear:
    """The layer of a sequence classifier that makes its outputs: the last one that is no part of its body.

    Raises:
        ModelError: there is none.
    """
    body = f"{model.base_model_prefix}."
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, Linear) and not name.startswith(body)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no output layer that is known; choose another of slm.models")
    return layers[-1]


def _check_value(key: str, value: object, depth: int) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        most = MAX_COUNT if isinstance(value, int) and any(word in key for word in COUNTS) else MAX_SIZE
        # an embedding's scale is a size, a base of rotary frequencies is not
        most = 10**8 if "theta" in key else most
        if any(word in key for word in SHARES) and not 0 <= value <= 1:
            raise UploadError(f"its architecture has {key} = {_shown(value)}; 0 to 1 is allowed")
        if not math.isfinite(value) or abs(value) > most:
            raise UploadError(f"its architecture has {key} = {_shown(value)}; at most {most} is allowed")
    elif isinstance(value, str):
        if len(value) > MAX_WORD and key not in LABEL_KEYS:
            raise UploadError(f"its architecture has a text of {len(value)} characters as {key}")
    elif isinstance(value, (list, dict)) and depth < 3 and len(value) <= _most_entries(key):
        entries = value.items() if isinstance(value, dict) else ((key, entry) for entry in value)
        for name, entry in entries:
            _check_value(key if key in LABEL_KEYS else f"{key}.{name}"[:200], entry, depth + 1)
    else:
        raise UploadError(f"its architecture has a value that is too large or too deep as {key}")


def _most_entries(key: str) -> int:
    return MAX_LABELS if key in LABEL_KEYS else MAX_ENTRIES


def _shown(value: object) -> str:
    """A stranger's word, short and on one line."""
    text = repr(value) if isinstance(value, str) else str(value)
    return " ".join(text.split())[:120]
