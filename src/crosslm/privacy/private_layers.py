"""Which layers of a classifier are trained under DP."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from crosslm.config import PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import ModelError
from crosslm.models.architecture import ENCODERS
from crosslm.models.slm import SLM
from crosslm.privacy.private_mean import centred, check_center, noisy_mean

LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
EMBEDDINGS = re.compile(r"embed|\bwte\b|\bwpe\b")
MAX_KEPT = 2**31  # bytes of what the body made of the rows: 2 GiB


def check_private(folder: str, privacy: PrivacyConfig, who: str) -> None:
    """Find out that a model can be trained by DP-SGD as is asked, without loading its weights.

    Args:
        folder: of the model.
        privacy: which layers are trained.
        who: trains it.

    Raises:
        ModelError: it cannot; says what can.
    """
    if privacy.trained_layers is not None and AutoConfig.from_pretrained(folder).model_type == "albert":
        raise ModelError(
            f"{who}: the layers of a model of the type albert share their weights; leave privacy.trained_layers out, "
            "or choose another of slm.models"
        )
    if privacy.center:
        check_center(folder, who)


@contextmanager
def as_under_dp(slm: SLM, examples: Examples, privacy: PrivacyConfig) -> Iterator[None]:
    """Train the same weights on the same input as DP-SGD does, without its noise: what an attacker would do.

    Raises:
        ModelError: as for :func:`frozen_below` and :func:`noisy_mean`.
    """
    with frozen_below(slm, privacy.trained_layers):
        if not privacy.center:
            yield
            return
        with centred(slm, noisy_mean(slm, slm.encode(examples.texts), 0.0, np.random.default_rng())):
            yield


@contextmanager
def frozen_below(slm: SLM, layers: int | None) -> Iterator[None]:
    """Train only the highest layers and what lies above them; 0: only the new head; None: what is trained anyhow.

    Noise grows with the number of trained parameters, so fewer of them often learn more.

    Raises:
        ModelError: the model's layers cannot be told apart.
    """
    trained = {name: parameter for name, parameter in slm.model.named_parameters() if parameter.requires_grad}
    if layers is not None:
        body = f"{slm.model.base_model_prefix}."
        numbers = {name: int(found.group(1)) for name in trained if (found := LAYER.search(name))}
        if not numbers or not any(name.startswith(body) for name in trained):
            raise ModelError(
                "privacy.trained_layers: this classifier's layers have no numbers to tell them apart by; "
                "leave trained_layers out, or choose another of slm.models"
            )
        lowest = max(numbers.values()) - layers + 1
        for name, parameter in trained.items():
            above = layers > 0 and name not in numbers and not EMBEDDINGS.search(name)
            keep = not name.startswith(body) or above or numbers.get(name, -1) >= lowest
            parameter.requires_grad_(keep)
    try:
        yield
    finally:
        for parameter in trained.values():
            parameter.requires_grad_(True)


@contextmanager
def body_read_once(slm: SLM, rows: Sequence[list[int]]) -> Iterator[None]:
    """Inside, a body that is not trained (``trained_layers = 0``) computes each row once, and not in each step again.

    Each row goes through it alone, as it does without this, so the values are the same. Nothing is done for a body
    that is trained in part, for types that write text, which keep far more of a row, and where all rows together would
    take more than ``MAX_KEPT``.

    Args:
        slm: without dropout (``eval``).
        rows: all that will be read, as tokens.
    """
    body, config = slm.model.base_model, slm.model.config
    is_trained = any(parameter.requires_grad for parameter in body.parameters())
    size = sum(map(len, rows)) * config.hidden_size * torch.finfo(slm.model.dtype).bits // 8
    if is_trained or config.model_type not in ENCODERS or size > MAX_KEPT:
        yield
        return
    computed: dict[tuple[int, ...], Any] = {}

    def keep(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        row = tuple(input_ids[0].tolist())
        if row not in computed:
            computed[row] = type(body).forward(body, input_ids, attention_mask, **named)
        return computed[row]

    body.forward = keep
    try:
        yield
    finally:
        del body.forward
