"""Sampling many texts from few prompts (Eq. 3).

Not ``model.generate``, because with a vocabulary of 262,144 its full-vocabulary sort and softmax
cost as much as the forward pass. Here each different prompt is read once and its cache repeated, the head is
applied to the last position only, the ``top_k`` logits are taken before anything else is computed,
and rows that have ended leave the batch. Each row draws from random numbers of its own, so that it
does not depend on the rows beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from crosslm.config import SynthesisConfig
from crosslm.models.head import top_logits

BELOW_ONE = 1 - 2.0**-24
"""The largest number below 1 in float32: one that was rounded up to 1 would draw from outside the nucleus."""


def sample_tokens(logits: Tensor, tokens: Tensor, uniforms: Tensor, sampling: SynthesisConfig) -> Tensor:
    """One token a row by temperature and nucleus sampling from the ``top_k`` most likely (Fan et al. 2018).

    Of these the smallest set whose probability reaches ``top_p`` is kept (Holtzman et al. 2019),
    and one is drawn by inverting the cumulative distribution.

    Args:
        logits: ``(batch, top_k)``, largest first.
        tokens: their ids.
        uniforms: ``(batch,)``, in [0, 1).
        sampling: temperature and top_p.

    Returns:
        ``(batch,)`` token ids.
    """
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    probabilities[:, 0] = probabilities[:, 0].clamp_min(torch.finfo(torch.float32).tiny)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniforms.to(cumulative) * cumulative[:, -1]).unsqueeze(1), right=True)
    return tokens.gather(1, drawn.clamp_max(tokens.shape[1] - 1)).squeeze(1)


@torch.inference_mode()
def decode(
    backbone: Callable[..., Any],
    head: Tensor,
    config: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    sampling: SynthesisConfig,
    has_ended: Callable[[list[int]], bool],
    on_step: Callable[[int], None],
) -> list[list[int]]:
    """Sample one continuation of each prompt.

    Args:
        backbone: the transformer without its head.
        head: ``(vocabulary, hidden)``.
        config: the model's configuration, which decides the kind of cache.
        prompts: tokens of the prompt of each text; most are the same.
        seeds: one for each text.
        sampling: how to sample, and at most how long.
        has_ended: whether a continuation is complete.
        on_step: told how many tokens were sampled.

    Returns:
        Sampled tokens of each text, in the order of ``prompts``.
    """
    read = read_prompts(backbone, config, prompts, seeds, sampling, head.device)
    hidden, mask, cache, device = read.hidden, read.mask, read.cache, head.device
    texts: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the texts that the rows of the batch belong to
    for position in range(sampling.max_new_tokens):
        logits, candidates = top_logits(hidden, head, sampling.top_k)
        tokens = sample_tokens(logits, candidates, read.uniforms[active, position], sampling)
        for text, token in zip(active, tokens.tolist(), strict=True):
            texts[text].append(token)
        on_step(len(active))
        going_on = [row for row, text in enumerate(active) if not has_ended(texts[text])]
        if not going_on or position + 1 == sampling.max_new_tokens:
            break
        if len(going_on) < len(active):
            rows = torch.tensor(going_on, device=device)
            cache.batch_select_indices(rows)
            tokens, mask = tokens[rows], mask[rows]
            active = [active[row] for row in going_on]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = backbone(
            input_ids=tokens.unsqueeze(1),
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
    return texts


@dataclass(frozen=True)
class ReadPrompts:
    """A batch whose prompts have been read, a row for each text."""

    hidden: Tensor
    """``(batch, hidden)``, after the last token."""
    mask: Tensor
    """``(batch, prompt)``, 0 where a shorter prompt is padded, on the left."""
    cache: DynamicCache
    uniforms: Tensor
    """``(batch, max_new_tokens)``, the random numbers that each row draws its tokens by."""


def read_prompts(
    backbone: Callable[..., Any],
    config: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    sampling: SynthesisConfig,
    device: torch.device,
) -> ReadPrompts:
    """Read each different prompt once and repeat what came of it; arguments as in :func:`decode`."""
    numbers = np.stack([np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds])
    uniforms = torch.from_numpy(numbers).to(device=device, dtype=torch.float32).clamp_max_(BELOW_ONE)
    different = list(dict.fromkeys(prompts))
    ids, mask = _pad_left(different, device)
    cache = DynamicCache(config=config)
    output = backbone(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache, use_cache=True
    )
    place = torch.tensor([different.index(prompt) for prompt in prompts], device=device)
    cache.batch_select_indices(place)
    return ReadPrompts(output.last_hidden_state[place, -1], mask[place], cache, uniforms)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both ``(prompts, tokens)``, so that all prompts end together."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp_min(0)
