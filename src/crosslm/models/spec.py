"""What can be known of a client's model from its configuration alone."""

from typing import Any

from transformers import AutoConfig

from crosslm.config import SLMSpec
from crosslm.errors import ModelError
from crosslm.models.pooling import check_pooling


def check_spec(folder: str, spec: SLMSpec, who: str) -> None:
    """Find out that a model is there, has so many layers and can have such pooling, without loading its weights.

    Raises:
        ModelError: it is not so.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{who}: SLM {folder!r} cannot be loaded; give a sequence classifier: {error}") from error
    if spec.num_hidden_layers is not None:
        keep_layers(config, spec.num_hidden_layers, folder)
    if spec.pooling == "mean":
        check_pooling(config.model_type, who)


def keep_layers(config: Any, layers: int, folder: str) -> None:
    """Have a configuration keep only its lowest layers.

    Raises:
        ModelError: it has fewer.
    """
    has = getattr(config, "num_hidden_layers", None)
    if has is None or layers > has:
        raise ModelError(f"SLM {folder!r} has {has} hidden layers; num_hidden_layers = {layers} must be no more")
    config.num_hidden_layers = layers
