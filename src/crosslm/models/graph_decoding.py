"""Sampling on a GPU: one step of :mod:`crosslm.models.decoding`, recorded once and replayed for every token.

Not the plain version, of which a step of a small model is hundreds of short kernels, each launched by itself, so that
the GPU waits for the next. A CUDA graph launches all of them at once (``docs/performance.md`` has what that brings). It
replays the same kernels on the same memory, so nothing may change its shape: the cache has room for the longest text
from the start, what is not yet written is masked, and rows that have ended stay in the batch. Each row draws from its
own random numbers, as in the plain version, and gets the same tokens up to rounding.
``tests/test_decoding.py`` holds both side by side.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from crosslm.config import SynthesisConfig
from crosslm.models.decoding import read_prompts, sample_tokens
from crosslm.models.head import top_logits

RECORDABLE = ("gemma3_text", "gpt2", "llama")
"""Families whose step never asks the GPU for a value, which a graph cannot do, but for some kinds of positions."""
ASKING_ROPE = {"dynamic", "longrope"}
READS_A_BIAS = {"eager", "sdpa"}  # kinds of attention that take a mask which is added
_recording = threading.Lock()
ALIGNMENT = 8  # of the rows of a mask; else the attention kernel copies it into such rows


def can_be_recorded(config: Any, device: torch.device, longest: int) -> bool:
    """Whether this model's step is one that a graph can replay up to so many tokens, prompt and text together."""
    window = getattr(config, "sliding_window", None)
    # a row that has ended goes on counting its positions
    fits = longest <= config.max_position_embeddings and (window is None or longest + ALIGNMENT <= window)
    known = config.model_type in RECORDABLE and config._attn_implementation in READS_A_BIAS
    return device.type == "cuda" and known and fits and ASKING_ROPE.isdisjoint(_rope_types(config))


def _rope_types(config: Any) -> set[str | None]:
    """Kinds of rotary positions; Gemma 3 has one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [parameters, *(table for table in parameters.values() if isinstance(table, dict))]
    return {table.get("rope_type") for table in tables}


@torch.inference_mode()
def decode_recorded(
    backbone: Callable[..., Any],
    head: Tensor,
    config: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    sampling: SynthesisConfig,
    has_ended: Callable[[list[int]], bool],
    on_step: Callable[[int], None],
) -> list[list[int]]:
    """Sample one continuation of each prompt; arguments and result as in :func:`crosslm.models.decoding.decode`."""
    read = read_prompts(backbone, config, prompts, seeds, sampling, head.device)
    logits, candidates = top_logits(read.hidden, head, sampling.top_k)
    tokens = sample_tokens(logits, candidates, read.uniforms[:, 0], sampling)
    step = Step(backbone, head, read.cache, read.mask, tokens, read.uniforms, sampling)
    del read  # its cache has been copied
    texts: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    advance: Callable[[], None] = step
    for position in range(sampling.max_new_tokens):
        sampled = step.tokens.flatten().tolist()
        for text in active:
            texts[text].append(sampled[text])
        on_step(len(active))
        active = [text for text in active if not has_ended(texts[text])]
        if not active or position + 1 == sampling.max_new_tokens:
            break
        if position == 1:  # the step has run once as it is, as what is recorded must have
            advance = recorded(step)
        advance()
    return texts


def recorded(step: "Step") -> Callable[[], None]:
    """A step as a graph, not yet run; on the CPU, which has none, the step itself."""
    if step.tokens.device.type != "cuda":
        return step
    device, graph = step.tokens.device, torch.cuda.CUDAGraph()
    # a process can record one graph at a time; other threads may use the GPU in other ways meanwhile
    with (
        _recording,
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"),
    ):
        step()
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: one for each GPU, since each stream has work space of its own."""
    return torch.cuda.Stream(device)


class Step:
    """Read the last tokens and sample the next ones, all in place: each call goes on where the last one ended."""

    def __init__(
        self,
        backbone: Callable[..., Any],
        head: Tensor,
        cache: Cache,
        mask: Tensor,
        tokens: Tensor,
        uniforms: Tensor,
        sampling: SynthesisConfig,
    ) -> None:
        """Lay out the memory.

        Args:
            backbone: the transformer without its head.
            head: ``(vocabulary, hidden)``.
            cache: of the prompts.
            mask: ``(batch, prompt)``, of the prompts' tokens.
            tokens: ``(batch,)``, the first ones sampled.
            uniforms: ``(batch, max_new_tokens)``, in [0, 1).
            sampling: how to sample.
        """
        self.backbone, self.head, self.uniforms, self.sampling = backbone, head, uniforms, sampling
        self.tokens = tokens.unsqueeze(1)
        batch, prompt = mask.shape
        room = -(-(prompt + sampling.max_new_tokens) // ALIGNMENT) * ALIGNMENT
        self.place = torch.full((1,), prompt, device=mask.device)  # of the next key in the cache
        self.column = torch.ones_like(self.place)  # of the next random number
        self.positions = mask.sum(dim=1, keepdim=True)
        unseen = torch.finfo(head.dtype).min
        self.bias = torch.full((batch, 1, 1, room), unseen, dtype=head.dtype, device=mask.device)
        self.bias[:, 0, 0, :prompt].masked_fill_(mask.bool(), 0.0)
        self.cache = Cache(layers=[FixedLayer(layer.keys, layer.values, self.place, room) for layer in cache.layers])

    def __call__(self) -> None:
        """One token more for every row."""
        self.bias.index_fill_(3, self.place, 0.0)
        output = self.backbone(
            input_ids=self.tokens,
            attention_mask=self.bias,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits, candidates = top_logits(output.last_hidden_state[:, -1], self.head, self.sampling.top_k)
        uniforms = self.uniforms.index_select(1, self.column).squeeze(1)
        self.tokens.copy_(sample_tokens(logits, candidates, uniforms, self.sampling).unsqueeze(1))
        for counter in (self.place, self.column, self.positions):
            counter.add_(1)


class FixedLayer(StaticLayer):  # type: ignore[misc]  # mypy knows no types of transformers
    """Keys and values of one layer, in memory that never moves; written at a place that is itself in memory."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, room: int) -> None:
        """Copy those of the prompts, ``(batch, heads, prompt, head_dim)``, into room for more tokens."""
        super().__init__(max_cache_len=room)
        self.keys, self.values = _with_room(keys, room), _with_room(values, room)
        self.place, self.is_initialized = place, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token's key and value; returns all of them, the unwritten ones too."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


def _with_room(states: Tensor, room: int) -> Tensor:
    batch, heads, written, size = states.shape
    roomy = states.new_zeros(batch, heads, room, size)
    roomy[:, :, :written] = states
    return roomy
