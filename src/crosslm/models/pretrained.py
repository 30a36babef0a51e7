"""A classifier's model and tokenizer: pretrained, with a head for the task's labels, or as they travel."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from crosslm.config import SLMSpec
from crosslm.errors import ModelError, UploadError
from crosslm.models.architecture import SPECIAL_TOKENS, longest_text, special_tokens, travelling
from crosslm.models.loading import loading
from crosslm.models.pooling import check_pooling, pool_by_mean
from crosslm.records import SlmState

logger = logging.getLogger(__name__)

DRAWS = frozenset({"kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_"})
"""What torch and transformers draw a new model's weights by."""


class _NothingDrawn(TorchFunctionMode):
    """A model that is made within it has zeros where weights would be drawn; of this thread alone.

    To draw them takes far longer than to load those that overwrite them all, and disturbs the random state of others.
    Zeros and not what the memory held, since a truncated normal is drawn again until it is within its bounds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            tensor.detach().zero_()
            return tensor
        return func(*args, **(kwargs or {}))


def pretrained_classifier(
    folder: str, labels: Sequence[str], seed: int, num_hidden_layers: int | None, pooling: str | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model, whose ``id2label`` has the labels in the order of its outputs, and its tokenizer.

    See :meth:`crosslm.models.slm.SLM.load`. A folder that is a classifier of these labels keeps its own order.

    Raises:
        ModelError: it cannot be loaded as a sequence classifier, has fewer layers, or cannot have that pooling.
    """
    with loading(f"SLM {folder!r} (slm.models, or a client's own) cannot be loaded as a sequence classifier"):
        config = AutoConfig.from_pretrained(folder)
        outputs = config.num_labels
        if num_hidden_layers is not None:
            _keep_layers(config, num_hidden_layers, f"SLM {folder!r}")
        ordered = _in_its_order(config.id2label, labels, folder)
        config.id2label = dict(enumerate(ordered))
        config.label2id = {label: index for index, label in enumerate(ordered)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, told = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # of the head alone
                output_loading_info=True,
            )
            _check_fit(model, told["mismatched_keys"], folder, outputs)
            if pooling == "mean":
                pool_by_mean(model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_is_fast(tokenizer, folder)
    agree_on_padding(model, tokenizer)
    return model, tokenizer


def untrained_state(folder: str, spec: SLMSpec, labels: Sequence[str], max_length: int) -> SlmState:
    """What would travel of a pretrained classifier, with weights that have a shape and no numbers (the meta device).

    Args:
        folder: of the model, of which the weights are not read.
        spec: the architecture that is made of it.
        labels: class names.
        max_length: tokens of a text that are read.

    Raises:
        ModelError: it cannot be loaded, is no sequence classifier, or has a tokenizer that cannot travel.
    """
    with loading(f"SLM {folder!r} (slm.models, or a client's own) cannot be loaded as a sequence classifier"):
        config = AutoConfig.from_pretrained(folder)
        if spec.num_hidden_layers is not None:
            _keep_layers(config, spec.num_hidden_layers, f"SLM {folder!r}")
        config.id2label = dict(enumerate(labels))
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            if spec.pooling == "mean":
                pool_by_mean(model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_is_fast(tokenizer, folder)
    agree_on_padding(model, tokenizer)
    longest = tokens_read(model, tokenizer, max_length, folder)
    architecture = travelling(json.loads(model.config.to_json_string()), labels)
    return SlmState(architecture, tokenizer_files(tokenizer, longest), tuple(labels), longest, model.state_dict())


def tokens_read(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: str) -> int:
    """How many tokens of a text a classifier reads: as many as are asked for, and as it has places for.

    Raises:
        ModelError: its tokenizer's own tokens take all of them, and it would cut no text.
    """
    longest = min(max_length, longest_text(model, max_length))
    if longest <= (added := tokenizer.num_special_tokens_to_add()):
        raise ModelError(
            f"SLM {folder!r}: its tokenizer adds {added} tokens to each text, which is cut at {longest}: raise "
            "slm.max_length (max_length in a silo's kit)"
        )
    return longest


def tokenizer_files(tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, str]:
    """The two files that a tokenizer travels as, the side on which it cuts texts at ``max_length`` among what they say.

    The side is written down when a text is read, and one that has read none would cut on the right elsewhere.
    """
    tokenizer("", truncation=True, max_length=max_length)
    named = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name, None)}
    return {"tokenizer.json": tokenizer.backend_tokenizer.to_str(), "tokenizer_config.json": json.dumps(named)}


def travelled_classifier(state: SlmState) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model as it came from elsewhere, and its tokenizer. No code comes with it.

    Raises:
        UploadError: the architecture is unknown, or the weights do not fit it.
    """
    architecture = dict(state.architecture)
    model_type = architecture.pop("model_type", None)
    if "auto_map" in architecture:
        raise UploadError(f"the SLM ({model_type}) names code to load (auto_map); it must be one of transformers")
    try:
        config = AutoConfig.for_model(model_type, **architecture)
        with _NothingDrawn():
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.load_state_dict(state.weights, strict=True)  # strict: whatever was not drawn comes from here
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(state.tokenizer["tokenizer.json"]),
            **special_tokens(state.tokenizer["tokenizer_config.json"]),
        )
    except Exception as error:
        raise UploadError(f"the SLM ({model_type}) cannot be rebuilt; use another model: {error}") from error
    if model.config.num_labels != len(state.labels):
        raise UploadError(
            f"the SLM has {model.config.num_labels} outputs; it must have one for each of {list(state.labels)}"
        )
    model.config.id2label = dict(enumerate(state.labels))
    model.config.label2id = {label: index for index, label in enumerate(state.labels)}
    try:
        agree_on_padding(model, tokenizer)
    except ModelError as error:
        raise UploadError(f"the SLM cannot be used; choose another model: {error}") from error
    return model, tokenizer


def check_spec(folder: str, spec: SLMSpec, who: str) -> None:
    """Find out that a model is there, has so many layers and can have such pooling, without loading its weights.

    Raises:
        ModelError: it is not so.
    """
    with loading(f"{who}: SLM {folder!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder)
    if spec.num_hidden_layers is not None:
        _keep_layers(config, spec.num_hidden_layers, f"{who}: SLM {folder!r}")
    if spec.pooling == "mean":
        check_pooling(config.model_type, who)


def _check_is_fast(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Only a tokenizer of the tokenizers library can travel: one in Python is code, and is not sent."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"SLM {folder!r}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json and cannot be made into "
            "one, so the SLM cannot be uploaded; choose a model with a fast tokenizer"
        )


def _check_fit(model: Any, mismatched: Iterable[tuple[str, Any, Any]], folder: str, outputs: int) -> None:
    """Weights that do not fit may be those of the head alone, which is made anew; that is said."""
    names = sorted(name for name, *_ in mismatched)
    body = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    if body:
        raise ModelError(f"SLM {folder!r}: {body[0]} is not as its config.json says; give a folder that is whole")
    if names:
        _say_once(
            f"SLM {folder!r} is a classifier of {outputs} labels and the task has {model.config.num_labels}: "
            "it gets a new head"
        )


def _in_its_order(names: Mapping[int, str], labels: Sequence[str], folder: str) -> list[str]:
    """The task's labels in the order of a folder's outputs; in the task's where it does not name its outputs so."""
    own, known = [str(names[place]) for place in sorted(names)], {label.casefold(): label for label in labels}
    found = [known[name.casefold()] for name in own if name.casefold() in known]
    if len(own) == len(labels) == len(known) == len(set(found)):
        return found
    if len(own) == len(labels) and not all(re.fullmatch(r"LABEL_\d+", name) for name in own):
        _say_once(f"SLM {folder!r} calls its labels {own}, which are taken for {list(labels)}, in this order")
    return list(labels)


@cache
def _say_once(message: str) -> None:
    """Clients with the same model, and attacks that train many, would repeat it."""
    logger.warning(message)


def _keep_layers(config: Any, layers: int, what: str) -> None:
    has = getattr(config, "num_hidden_layers", None)
    if has is None or layers > has:
        raise ModelError(f"{what} has {has} hidden layers; num_hidden_layers = {layers} must be no more")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):  # one for each layer, of ModernBERT, Qwen and Gemma 3
        config.layer_types = list(config.layer_types)[:layers]


def agree_on_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """One padding token for a classifier and its tokenizer.

    A causal classifier reads a text's last token, which is the last one that is not its configuration's padding. Where
    the tokenizer pads with another one that takes padding for the end of the text. Other types keep an id of their own:
    RoBERTa's says where positions begin.

    Raises:
        ModelError: a causal classifier has no token to pad with.
    """
    own = model.config.pad_token_id
    if tokenizer.pad_token is None:
        is_known = own is not None and 0 <= own < len(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own) if is_known else tokenizer.eos_token
    reads_last_token = hasattr(model, "score")  # the head's name in these, and in no other
    if reads_last_token and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{model.config.model_type}: its tokenizer has no token to pad with, and none that ends a text; set "
            "pad_token in the model's tokenizer_config.json, or choose another of slm.models"
        )
    if own is None or reads_last_token:
        model.config.pad_token_id = tokenizer.pad_token_id
