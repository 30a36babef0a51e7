"""How much memory a run will need: an estimate from the models' configurations, without their weights.

It is meant to be somewhat high: a test compares it with the peaks measured in ``benchmarks/results``.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from crosslm.config import Config
from crosslm.models.causal import weight_dtype
from crosslm.models.head import candidate_count

CONTAINER = Path("/sys/fs/cgroup")
PROCESS = int(0.75 * 2**30)
"""Python with torch, transformers and sentence-transformers imported, before any model."""
TEXT_TOKENS = 40
"""Of a prompt or a statement around a text."""
FREED = 0.08
"""Of the rest: what was freed and the allocator has not given back. Chosen to be above what was measured."""


@dataclass(frozen=True)
class Shape:
    """What the memory of a transformer depends on."""

    parameters: int
    embedding: int
    """Parameters of the token embedding."""
    vocabulary: int
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward layer."""
    heads: int
    key_value: int
    """Numbers that the cache keeps of a token in a layer, keys and values together."""
    positions: int | None = None
    """Tokens of a text that it reads at most, if it says so."""

    @classmethod
    def of(cls, folder: str, causal: bool = True) -> "Shape":
        """The shape of a model folder or hub id; its weights are not read.

        Raises:
            OSError, ValueError: it has no configuration, or one of an unknown kind.
        """
        config = AutoConfig.from_pretrained(folder)
        return cls.of_config(config, AutoModelForCausalLM if causal else AutoModel)

    @classmethod
    def of_config(cls, config: Any, kind: Any = AutoModelForCausalLM) -> "Shape":
        """The shape of what a transformers configuration describes."""
        with torch.device("meta"):
            model = kind.from_config(config)
        embedding = model.get_input_embeddings().weight.numel()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            sum(parameter.numel() for parameter in model.parameters()),
            embedding,
            config.vocab_size,
            config.num_hidden_layers,
            hidden,
            getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * hidden,
            heads,
            2 * head * (getattr(config, "num_key_value_heads", None) or heads),
            max(0, getattr(config, "max_position_embeddings", None) or 0) or None,
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def estimate(config: Config, llm: Shape, slms: Sequence[Shape], encoder: Shape) -> Estimate:
    """Peak memory of a run in one process.

    The largest of writing texts and updating the LLM counts, since they come one after the other;
    all models stay. Activations of a layer are some ``14 hidden + 4 inner`` numbers a token that are
    kept for the backward pass, and the attention's ``2 heads tokens``.

    Args:
        config: of the run.
        llm: shape of the LLM, its vocabulary untrimmed, which is what is loaded first.
        slms: shape of each client's classifier.
        encoder: shape of the sentence encoder.
    """
    size = weight_dtype(config.llm, config.device).itemsize
    tokens = TEXT_TOKENS + config.synthesis.max_new_tokens
    # full: weights, frozen copy, gradients, two moments, and weights as trained while it is interpolated in the end, or
    # judges as it was
    judges_as_it_was = config.reward.llm_judges or (config.gate.teaches and not config.asks_llm)
    full = 5 + (config.llm.interpolation < 1 or judges_as_it_was)
    # LoRA: weights, and merged ones while it writes
    copies = full * llm.parameters if config.llm.adapter == "full" else 2 * llm.parameters - llm.embedding
    writing = config.synthesis.batch_size * (
        tokens * llm.layers * llm.key_value * size
        + 2 * llm.vocabulary * 4
        + (candidates(llm, config.synthesis.top_k) if size == 2 else 0)
    )
    # [M(y), x], [x, M'(y)] and an anchor each by itself; an adapter keeps what it reads in float32, whatever the
    # model's dtype
    update = config.llm.micro_batch_size * activations(llm, tokens) * 4
    largest = max(slms, key=lambda shape: shape.parameters)
    judging = min(config.reward.teachers - 1, len(slms))  # beside the one that arrives
    # of each client: its own, the one that it uploaded; and one in training: gradients, two moments, an upload; a judge
    classifiers = 2 * sum(shape.parameters for shape in slms) + (6 + judging) * largest.parameters
    batch = max(config.slm.private.batch_size, config.slm.synthetic.batch_size)
    training = batch * activations(largest, min(config.slm.max_length, largest.positions or config.slm.max_length)) * 4
    parts = {
        "Python and its libraries": PROCESS,
        "LLM": copies * size,
        "writing texts" if writing > update else "updating the LLM": max(writing, update),
        "classifiers": classifiers * 4 + training,
        "encoder": encoder.parameters * 4,
    }
    return Estimate(parts | {"freed and kept by the allocator": int(FREED * sum(parts.values()))})


def candidates(shape: Shape, top_k: int) -> int:
    """Bytes of the head's rows for one draw of a model in bfloat16, as they are and in float32 (``models/head.py``)."""
    return candidate_count(top_k, shape.vocabulary) * shape.hidden * (2 + 4)


def activations(shape: Shape, tokens: int) -> int:
    """Numbers that the backward pass needs of one sequence."""
    return tokens * shape.layers * (14 * shape.hidden + 4 * shape.inner + 2 * shape.heads * tokens)


def available(device: str) -> int:
    """Free bytes on a device; on the CPU no more than the container allows."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # there may be no such limit
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(parts["inactive_file"]))  # files that were read, which make room
    return free


def in_gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB"
