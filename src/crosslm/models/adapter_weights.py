"""Weights of an LLM that are others for a while: its adapter merged in, or between the original and the trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

ADAPTER = "default"  # peft's name for the only adapter


@contextmanager
def interpolated(model: Any, original: Any, share: float) -> Iterator[None]:
    """Within it the trained weights are ``theta_old + share * (theta - theta_old)``; afterwards they are theta again.

    With LoRA that is the adapter's product B A times the share.
    Wortsman et al., "Robust fine-tuning of zero-shot models", 2022.

    Args:
        model: with an adapter, or fully fine-tuned.
        original: theta_old of full fine-tuning; None with an adapter.
        share: of the weights as trained, in [0, 1].
    """
    frozen = {} if original is None else dict(original.named_parameters())
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    moved = {name: value for name, value in trained if share < 1 and (name in frozen or "lora_B" in name)}
    before = {name: weight.detach().clone() for name, weight in moved.items()}
    try:
        with torch.no_grad():
            for name, weight in moved.items():
                weight.lerp_(frozen[name] if frozen else torch.zeros_like(weight), 1 - share)
        yield
    finally:
        with torch.no_grad():
            for name, weight in moved.items():
                weight.copy_(before[name])


@contextmanager
def merged(model: Any, device: torch.device) -> Iterator[Any]:
    """The adapter added into the weights for a while: fewer products, which pays at few tokens a pass.

    The weights themselves are kept and put back, since subtracting the adapter again would leave
    rounding errors in them. Not where there is no memory for this second copy and as much again for the cache.

    Args:
        model: with an adapter, or without one.
        device: where its weights are.

    Yields:
        The causal model within.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not layers or not _has_room(device, 2 * sum(weight.nbytes for weight in weights)):
        yield causal
        return
    originals = [weight.data for weight in weights]
    try:
        with torch.no_grad(), model.disable_adapter():
            for layer, weight in zip(layers, weights, strict=True):
                whole = weight.data.float() + layer.get_delta_weight(ADAPTER).float()
                weight.data = whole.to(weight.dtype)
            yield causal
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original


def _has_room(device: torch.device, size: int) -> bool:
    """Whether so many more bytes are sure to fit; on the CPU they were counted before the run began.

    What PyTorch keeps for itself counts as free, or what was done before would decide how texts are rounded.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept >= size
