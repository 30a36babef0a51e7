"""A BERT classifier whose head reads the mean of a text's tokens, not its first one.

Sentence encoders such as all-MiniLM are trained so that the mean of the last layer's vectors stands for a text (Reimers
and Gurevych 2019); of the first token's vector, which BERT's head reads, little is known to be good. The mean is taken
by one more layer of BERT's own kind with weights made for it, so what leaves a silo is a BERT like any other: the same
checks, the same folder for ``AutoModelForSequenceClassification``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertForSequenceClassification, BertLayer
from transformers.utils import cached_file

from crosslm.errors import ModelError

MEAN_OVER_FIRST = 10.0
"""How much the mean outweighs the first token's own vector, which the residual path adds to it."""
POOLER_SLOPE = 0.1
"""Small enough for the pooler's tanh to be nearly a straight line."""


def check_pooling(model_type: str, who: str) -> None:
    """Find out that the mean layer can be put on models of this type.

    Raises:
        ModelError: it cannot.
    """
    if model_type != "bert":
        raise ModelError(f"{who}: pooling = 'mean' needs a model of the type bert, not {model_type}; leave it out")


def made_by_mean(folder: str) -> bool:
    """Whether a model is a sentence encoder whose vectors are the mean of its tokens, and can have the mean layer.

    Args:
        folder: of it, or its hub id.
    """
    found = _read(folder, "1_Pooling/config.json")  # of sentence-transformers
    # the second is how newer versions write it
    is_mean = found.get("pooling_mode_mean_tokens") is True or found.get("pooling_mode") == "mean"
    return is_mean and _read(folder, "config.json").get("model_type") == "bert"


def _read(folder: str, name: str) -> dict[str, Any]:
    try:
        path = cached_file(folder, name)
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is not there, or no JSON
        return {}
    return found if isinstance(found, dict) else {}


@torch.no_grad()
def pool_by_mean(model: Any) -> None:
    """Put the layer on top, in place, and let the pooler pass its vector on.

    All tokens get the same attention (keys are zero; queries are not, or neither would ever learn), values and output
    are the identity, so the first token's vector becomes ``LayerNorm(10 mean + first)``; the feed-forward half adds
    nothing until it is trained. What is left to chance comes from PyTorch's global generator.

    Raises:
        ModelError: it is no BERT classifier.
    """
    if not isinstance(model, BertForSequenceClassification):
        raise ModelError(f"pooling = 'mean' needs a BERT classifier, not {type(model).__name__}; leave it out")
    encoder, config = model.bert.encoder, model.config
    layer = BertLayer(config, layer_idx=len(encoder.layer))
    attention, identity = layer.attention, torch.eye(config.hidden_size)
    _set(attention.self.key, torch.zeros_like(identity))
    _set(attention.self.value, identity)
    _set(attention.output.dense, MEAN_OVER_FIRST * identity)
    _set(layer.output.dense, torch.zeros_like(layer.output.dense.weight))
    _set(model.bert.pooler.dense, POOLER_SLOPE * identity)
    encoder.layer.append(layer.to(model.device).eval())
    config.num_hidden_layers = len(encoder.layer)


def _set(linear: nn.Linear, weight: torch.Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.zero_()
