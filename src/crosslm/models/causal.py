"""A causal language model as transformers loads it: its dtype, its adapter's places, its head."""

import re
from math import ceil
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from crosslm.config import LLMConfig
from crosslm.errors import ModelError
from crosslm.models.architecture import ENCODERS
from crosslm.models.dtypes import fast_dtype
from crosslm.models.loading import loading
from crosslm.models.tokens import load_tokenizer

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What models call that which they do to their logits beyond ``hidden @ weight.T``; 1 is nothing."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What models call the number of their experts, whose weights are in one tensor that no linear layer has."""

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers whose state is keys and values for each token, which a row can be taken out of."""


def load_causal(folder: str, config: LLMConfig, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model folder or hub id and its tokenizer, in the dtype of the configuration.

    Raises:
        ModelError: it cannot be loaded.
    """
    check_causal(folder, config.model)
    with loading(_not_loaded(folder, config.model)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weight_dtype(config, device))
    # for the whole process: the head needs sums in fp32 that are rounded once (models/head.py), and cuDNN's attention
    # plans anew for every shape, of which nearly every batch and step has its own
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model.to(device), load_tokenizer(folder, config.model)


def check_causal(folder: str, name: str) -> None:
    """Find out from its ``config.json`` that a model may be the LLM, as far as that says it.

    Args:
        folder: of the model, or its hub id.
        name: as in the configuration.

    Raises:
        ModelError: it may not, or the file cannot be read.
    """
    with loading(_not_loaded(folder, name)):
        about = AutoConfig.from_pretrained(folder)
    if about.model_type in ENCODERS:
        raise ModelError(
            f"llm.model {name!r} is an encoder ({about.model_type}), which writes no text; choose a GPT-2, Llama or "
            "Gemma 3 model"
        )
    if getattr(about, "vision_config", None) is not None:
        raise ModelError(
            f"llm.model {name!r} reads pictures too, which crosslm does not support; choose a model of text "
            "alone (of Gemma 3 those of 270M and 1B)"
        )
    if changed := [key for key in CHANGED_LOGITS if getattr(about, key, None) not in (None, 1)]:
        raise ModelError(
            f"llm.model {name!r}: its config.json has {changed[0]}, and crosslm supports no scale or soft cap of the "
            "logits; choose a GPT-2, Llama or Gemma 3 model"
        )
    if getattr(about, "max_position_embeddings", None) is None:
        raise ModelError(
            f"llm.model {name!r}: its config.json ({about.model_type}) does not say how many tokens it reads "
            "(max_position_embeddings); choose a GPT-2, Llama or Gemma 3 model"
        )
    if experts := [key for key in EXPERTS if getattr(about, key, None) not in (None, 0, 1)]:
        raise ModelError(
            f"llm.model {name!r}: its config.json ({about.model_type}) has {experts[0]}, and crosslm trains no "
            "mixture of experts; choose a GPT-2, Llama or Gemma 3 model"
        )
    if about.is_encoder_decoder:
        raise ModelError(
            f"llm.model {name!r} is an encoder with a decoder ({about.model_type}), which crosslm does not support; "
            "choose a GPT-2, Llama or Gemma 3 model"
        )
    others = [kind for kind in getattr(about, "layer_types", None) or () if kind not in ATTENTION]
    if others:
        raise ModelError(
            f"llm.model {name!r}: its config.json ({about.model_type}) has a layer of {others[0]}, and crosslm writes "
            "with layers of attention alone; choose a GPT-2, Llama or Gemma 3 model"
        )


def _not_loaded(folder: str, name: str) -> str:
    return f"llm.model {name!r}{'' if folder == name else f' ({folder})'} cannot be loaded"


def weight_dtype(config: LLMConfig, device: str = "cpu") -> torch.dtype:
    """The dtype that ``llm.dtype`` means on a device; weights that are themselves trained are in float32."""
    if config.dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.dtype))
    return torch.float32 if config.adapter == "full" else fast_dtype(device)


def lora_config(model: Any, config: LLMConfig) -> LoraConfig:
    """An adapter on every linear layer but the head, in as many of the upper layers as are wanted."""
    name, layers = decoder_layers(model)
    lower = "|".join(map(str, range(len(layers) - ceil(config.adapted_layers * len(layers) - 1e-9))))
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",  # of which peft's layers_to_transform knows nothing
        exclude_modules=rf"{re.escape(name)}\.({lower})\..*" if lower else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def decoder_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The layers of a causal model, from the lowest, and the name that they have in it.

    Raises:
        ModelError: it has none that can be told from other parts.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise ModelError(f"{model.config.model_type}: its layers cannot be found; choose a GPT-2, Llama or Gemma 3 model")


def head_weight(model: Any) -> Tensor:
    """The matrix that gives the logits, ``(vocabulary, hidden)``."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def check_head(model: Any) -> None:
    """The logits must be ``hidden @ weight.T`` and nothing more, since that is what is computed.

    Raises:
        ModelError: it is something else.
    """
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.inference_mode():
        expected = causal(input_ids=ids, use_cache=False).logits
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        actual = torch.nn.functional.linear(hidden, head_weight(causal))
    if not torch.allclose(expected.float(), actual.float(), rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{causal.config.model_type}: its head is not a plain matrix (a bias, a scale or a soft cap), "
            "which crosslm does not support; choose a GPT-2, Llama or Gemma 3 model"
        )
