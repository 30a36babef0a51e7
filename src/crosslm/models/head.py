"""The language-model head: log-probabilities and KL without a ``(tokens, vocabulary)`` tensor.

Not the plain version, which holds the logits of both models and all that autograd saves of them:
with Gemma 3's vocabulary of 262,144 one batch of 16 sequences of 44 tokens is 0.7 GB a tensor, and
reading and writing it costs more than the arithmetic. Here the vocabulary passes in blocks small
enough to stay in the processor's cache, with the running maximum and rescaled sums of online
softmax (Milakov and Gimelshein 2018; FlashAttention does the same over keys). A frozen head (LoRA)
needs no gradient of its own, so the gradients with respect to the hidden states, two
``(tokens, hidden)`` tensors, are summed in the same pass and nothing is computed twice. A trainable
head (full fine-tuning) takes the plain way in chunks of tokens that are recomputed in the backward
pass. ``tests/test_head.py`` holds both against the plain version.

In bf16 the logits of likely tokens are multiples of 1/16 or 1/8: too coarse for a divergence, and neighbouring tokens
would fall together. But a processor multiplies in bf16 more than twice as fast as in fp32, and sums in fp32 before it
rounds. So what is computed there is not a logit but its distance from an anchor, the largest logit so far, and again
from a new anchor for tokens that find a larger one. It is rounded to 1/256 of itself: next to nothing where the
probability is. The other model's logits are these less ``(h - h') W``, rounded in the same way. A target's own logit,
which is the first anchor, is a product in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from crosslm.algorithm.losses import token_kl

VOCABULARY_BLOCK = 2048  # of 1024 to 32768 the fastest or within 2 %: 600 x 2048 fp32 is 5 MB
GPU_BLOCK = 2**15  # a GPU has no such cache, and each block costs it a dozen launches
RISE = 0.25  # above its anchor a logit in bf16 is off by less than 0.001
TIES = 32  # candidates beyond those that are wanted, at least
CHUNK_ELEMENTS = 2**24  # logits that the plain way holds at a time: 64 MiB in fp32


def head_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, reference_hidden: Tensor, reference_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target token under both models, and the KL divergence between them.

    Args:
        hidden: ``(tokens, hidden)``, last hidden states of the LLM.
        weight: ``(vocabulary, hidden)``, its head.
        targets: ``(tokens,)``, the token that came next.
        reference_hidden: ``(tokens, hidden)``, of the original LLM, without gradient.
        reference_weight: its head; with LoRA the very same tensor, by which the fast way is known.

    Returns:
        ``logps``, ``reference_logps`` and ``kl`` (the summand of Eq. 8), each ``(tokens,)`` in
        fp32; only ``logps`` and ``kl`` carry a gradient.
    """
    if weight.requires_grad or weight is not reference_weight:
        return _plain_scores_in_chunks(hidden, weight, targets, reference_hidden, reference_weight)
    scores: tuple[Tensor, Tensor, Tensor] = _frozen_head_scores(hidden, weight, targets, reference_hidden)
    return scores


def head_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, ``(tokens,)`` in fp32; shapes as in :func:`head_scores`."""
    if weight.requires_grad:
        parts = _chunks(len(targets), len(weight))
        return torch.cat([_recomputed(_plain_logps, hidden[part], weight, targets[part]) for part in parts])
    logps: Tensor = _frozen_head_logps(hidden, weight, targets)
    return logps


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Next-token logits ``(batch, vocabulary)``, block by block, which for few rows is the faster way."""
    logits = hidden.new_empty(len(hidden), len(weight))
    for block in _blocks(weight):
        logits[:, block] = linear(hidden, weight[block])
    return logits


def _blocks(weight: Tensor) -> list[slice]:
    """Parts of the vocabulary that are computed at a time."""
    size = VOCABULARY_BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def top_logits(hidden: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest next-token logits in fp32, and their tokens, both ``(batch, count)``, largest first.

    In bf16 logits are too coarse to choose by, but good enough to find more candidates than are
    wanted (:func:`candidate_count`), whose logits are then computed again.

    Args:
        hidden: ``(batch, hidden)``.
        weight: ``(vocabulary, hidden)``.
        count: how many, or the whole vocabulary if that has fewer.
    """
    count = min(count, len(weight))
    if weight.dtype == torch.float32:
        top, tokens = torch.topk(head_logits(hidden, weight), count, dim=-1)
        return top, tokens
    candidates = torch.topk(linear(hidden, weight), candidate_count(count, len(weight)), dim=-1, sorted=False).indices
    rows = weight.index_select(0, candidates.flatten()).view(*candidates.shape, -1).float()
    logits = torch.bmm(rows, hidden.float().unsqueeze(2)).squeeze(2)
    top, places = torch.topk(logits, count, dim=-1)
    return top, candidates.gather(1, places)


def candidate_count(count: int, vocabulary: int) -> int:
    """Of how many tokens :func:`top_logits` computes the logits again: dozens may have the same one in bf16."""
    return min(max(2 * count, count + TIES), vocabulary)


class _OnlineSoftmax:
    """Sums over the vocabulary of ``exp(z)``-weighted things, a block at a time."""

    def __init__(self, known: Tensor) -> None:
        """Begin with a logit of the vocabulary for each token, ``(tokens, 1)``."""
        self.maximum = known
        self.total = torch.zeros_like(known)

    def distances(self, hidden: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a block less an anchor near the largest so far, in fp32, and the anchor, ``(tokens, 1)``."""
        anchor = self.maximum.to(block.dtype)
        distances = torch.addmm(-anchor, hidden, block.T).float()
        if block.dtype != torch.float32:
            rise = distances.amax(dim=1, keepdim=True)
            higher = (rise.squeeze(1) > RISE).nonzero().squeeze(1)
            if len(higher):
                raised = (anchor[higher].float() + rise[higher]).to(block.dtype)
                anchor = anchor.index_copy(0, higher, raised)
                distances[higher] = torch.addmm(-raised, hidden[higher], block.T).float()
        return distances, anchor.float()

    def add(self, distances: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a block of :meth:`distances` into unnormalised probabilities, in place.

        Returns:
            These, and the factor by which sums of earlier blocks must be scaled.
        """
        maximum = torch.maximum(self.maximum, distances.amax(dim=1, keepdim=True) + anchor)
        scale = (self.maximum - maximum).exp_()
        weights = distances.sub_(maximum - anchor).exp_()
        self.total.mul_(scale).add_(weights.sum(dim=1, keepdim=True))
        self.maximum = maximum
        return weights, scale

    def normaliser(self) -> Tensor:
        """``log sum_v exp(z_v)``, ``(tokens, 1)``."""
        return self.maximum + self.total.log()


def _target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = torch.linalg.vecdot(hidden.float(), weight[targets].float()).unsqueeze(1)
    return logits


class _FrozenHeadLogps(torch.autograd.Function):
    """``d log p(t) / d h = W_t - sum_v p_v W_v``, kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        target = _target_logits(hidden, weight, targets)
        softmax = _OnlineSoftmax(target)
        mean = torch.zeros_like(hidden, dtype=torch.float32)  # sum_v p_v W_v
        for part in _blocks(weight):
            block = weight[part]
            weights, scale = softmax.add(*softmax.distances(hidden, block))
            if ctx.needs_input_grad[0]:
                mean.mul_(scale).add_(weights.to(block.dtype) @ block)
        ctx.save_for_backward(weight[targets] - mean.div_(softmax.total))
        return (target - softmax.normaliser()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_logps.unsqueeze(1), None, None


class _FrozenHeadScores(torch.autograd.Function):
    """As above, and ``d KL / d h = sum_v p_v (log p_v - log q_v - KL) W_v``.

    With z and z' the logits of the two models, ``log p_v - log q_v`` is ``z_v - z'_v`` less a
    constant of the token, and a constant drops out of the gradient, since ``sum_v p_v (c - c) = 0``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, reference_hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        target, reference_target = (_target_logits(part, weight, targets) for part in (hidden, reference_hidden))
        softmax, reference = _OnlineSoftmax(target), _OnlineSoftmax(reference_target)
        drift = (hidden.float() - reference_hidden.float()).to(weight.dtype)
        difference = torch.zeros_like(softmax.total)  # sum_v p_v (z_v - z'_v)
        mean = torch.zeros_like(hidden, dtype=torch.float32)  # sum_v p_v W_v
        weighted = torch.zeros_like(mean)  # sum_v p_v (z_v - z'_v) W_v
        for part in _blocks(weight):
            block = weight[part]
            change = linear(drift, block).float()
            distances, anchor = softmax.distances(hidden, block)
            reference.add(distances - change, anchor)
            weights, scale = softmax.add(distances, anchor)
            change.mul_(weights)
            difference.mul_(scale).add_(change.sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                mean.mul_(scale).add_(weights.to(block.dtype) @ block)
                weighted.mul_(scale).add_(change.to(block.dtype) @ block)
        difference.div_(softmax.total)
        mean.div_(softmax.total)
        weighted.div_(softmax.total)
        ctx.save_for_backward(weight[targets] - mean, weighted.sub_(difference * mean))
        normaliser, reference_normaliser = softmax.normaliser(), reference.normaliser()
        logps = (target - normaliser).squeeze(1)
        reference_logps = (reference_target - reference_normaliser).squeeze(1)
        kl = (difference - (normaliser - reference_normaliser)).squeeze(1)
        ctx.mark_non_differentiable(reference_logps)
        return logps, reference_logps, kl

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor, grad_kl: Tensor) -> tuple[Tensor, None, None, None]:
        logps_gradient, kl_gradient = ctx.saved_tensors
        gradient = logps_gradient * grad_logps.unsqueeze(1) + kl_gradient * grad_kl.unsqueeze(1)
        return gradient, None, None, None


# torch leaves the type of apply open
_frozen_head_logps: Callable[..., Tensor] = _FrozenHeadLogps.apply
_frozen_head_scores: Callable[..., tuple[Tensor, Tensor, Tensor]] = _FrozenHeadScores.apply


def _plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _target_logps(linear(hidden.float(), weight.float()), targets)


def _plain_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, reference_hidden: Tensor, reference_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = linear(hidden.float(), weight.float())
    with torch.no_grad():
        reference_logits = linear(reference_hidden.float(), reference_weight.float())
    return (
        _target_logps(logits, targets),
        _target_logps(reference_logits, targets),
        token_kl(logits, reference_logits),
    )


def _plain_scores_in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, reference_hidden: Tensor, reference_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = [
        _recomputed(_plain_scores, hidden[part], weight, targets[part], reference_hidden[part], reference_weight)
        for part in _chunks(len(targets), len(weight))
    ]
    logps, reference_logps, kl = (torch.cat(column) for column in zip(*chunks, strict=True))
    return logps, reference_logps, kl


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def _recomputed(function: Any, *tensors: Tensor) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(function, *tensors, use_reentrant=False)
    return function(*tensors)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]
