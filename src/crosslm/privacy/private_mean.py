"""Under DP, what the classification head reads is centred by a mean that is itself differentially private.

Vectors of texts share a large common part. The noise that DP-SGD adds to the head's weights along it shifts all texts
alike, which can make a head of few rows give all of them the same label. Without the common part the same noise does
little. The mean over the private rows is told with noise once for each upload, out of the same budget, and is put into
the head's bias in the end, so the classifier stays an ordinary one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from crosslm.errors import ModelError
from crosslm.models.architecture import output_layer
from crosslm.models.slm import SLM
from crosslm.privacy.private_noise import gaussian


def check_center(folder: str, who: str) -> None:
    """Find out that a model's head can be centred, without loading its weights.

    Raises:
        ModelError: it cannot.
    """
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    last_linear(model, who)


def last_linear(model: Any, who: str = "the classifier") -> nn.Linear:
    """The layer that makes the outputs.

    Raises:
        ModelError: it has no bias to put the mean into.
    """
    layer = output_layer(model)
    if layer.bias is None:
        raise ModelError(
            f"{who}: privacy.center needs a head with a bias; leave center out, or choose another of slm.models"
        )
    return layer


@torch.no_grad()
def noisy_mean(slm: SLM, rows: Sequence[list[int]], noise_multiplier: float, generator: np.random.Generator) -> Tensor:
    """``(sum of clipped vectors + noise_multiplier * radius * N(0, I)) / rows`` of what the last layer reads.

    A vector is clipped to a norm of ``radius``, the largest norm of those of the label names, which are public: one
    row more or less changes the sum by no more than that, since each row goes through the model alone: beside others
    its vector would differ by rounding, which weights that came back can make as large as is wished. A vector that is
    not finite counts as zero: clipping cannot mend it, and one would show in the whole mean.

    Args:
        slm: the classifier.
        rows: the private rows as tokens; their number is taken as known.
        noise_multiplier: standard deviation of the noise over the radius.
        generator: draws the noise.

    Returns:
        ``(width,)``.

    Raises:
        ModelError: the vectors of the label names are not finite.
    """
    radius = _read_by_head(slm, slm.encode(slm.labels)).norm(dim=1).max()
    if not radius.isfinite():  # no noise would be of the right size
        raise ModelError(
            "privacy.center: what the head reads of the label names is not finite, so the classifier is damaged; "
            "leave out what the server sent back, or set privacy.center = false"
        )
    vectors = _read_by_head(slm, rows)
    vectors = vectors * (radius / vectors.norm(dim=1, keepdim=True)).clamp(max=1)
    vectors[~vectors.isfinite().all(dim=1)] = 0.0
    total = vectors.sum(dim=0)
    mean: Tensor = (total + noise_multiplier * radius * gaussian(generator, total)) / len(rows)
    return mean


@contextmanager
def centred(slm: SLM, mean: Tensor) -> Iterator[None]:
    """Inside, the last layer reads ``vector - mean``; the bias makes up for it, so the outputs are the same."""
    linear = last_linear(slm.model)
    with torch.no_grad():
        linear.bias.add_(linear.weight @ mean)
    handle = linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] - mean, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            linear.bias.sub_(linear.weight @ mean)


@torch.no_grad()
def _read_by_head(slm: SLM, rows: Sequence[list[int]]) -> Tensor:
    read: list[Tensor] = []
    handle = last_linear(slm.model).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    slm.model.eval()
    try:
        for row in rows:
            slm.logits([row])
    finally:
        handle.remove()
    return torch.cat(read)
