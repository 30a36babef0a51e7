"""The fast head against the plain one, values and gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosslm.algorithm.losses import token_kl
from crosslm.models import head

TOKENS, HIDDEN = 7, 6


@pytest.fixture(params=[50, 5000], ids=["one block", "several blocks"])
def tensors(request):
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    weight = torch.randn(request.param, HIDDEN, generator=generator)
    targets = torch.randint(request.param, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight, targets, reference, weight


def plain(hidden, weight, targets, reference, reference_weight):
    logits, reference_logits = hidden @ weight.T, reference @ reference_weight.T
    pick = targets.unsqueeze(1)
    return (
        logits.log_softmax(1).gather(1, pick).squeeze(1),
        reference_logits.log_softmax(1).gather(1, pick).squeeze(1),
        token_kl(logits, reference_logits),
    )


def loss(logps, kl):
    coefficients = torch.linspace(-1, 2, TOKENS)
    return (logps * coefficients).sum() + (kl * coefficients.flip(0)).sum()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_scores_and_gradients_are_the_plain_ones(tensors, trainable, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2 * len(tensors[1]))
    if trainable:  # then the original model has a head of its own
        tensors = (*tensors[:4], tensors[1] + torch.ones_like(tensors[1]))
        tensors[1].requires_grad_()
    expected = plain(*tensors)
    inputs = [tensors[0], tensors[1]] if trainable else [tensors[0]]
    expected_gradients = torch.autograd.grad(loss(expected[0], expected[2]), inputs)
    actual = head.head_scores(*tensors)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss(actual[0], actual[2]), inputs)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_logps_and_gradients_are_the_plain_ones(tensors, trainable):
    hidden, weight, targets, *_ = tensors
    weight.requires_grad_(trainable)
    expected = (hidden @ weight.T).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    actual = head.head_logps(hidden, weight, targets)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    (one,) = torch.autograd.grad((actual * targets).sum(), [hidden])
    (other,) = torch.autograd.grad((expected * targets).sum(), [hidden])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)


def test_large_logits_do_not_overflow(tensors):
    hidden, weight, targets, reference, _ = tensors
    large = weight * 10
    logps, reference_logps, kl = head.head_scores(hidden * 100, large, targets, reference * 100, large)
    for values in (logps, reference_logps, kl):
        assert values.isfinite().all()


def test_logits_in_blocks_are_the_plain_ones(tensors):
    hidden, weight, *_ = tensors
    torch.testing.assert_close(head.head_logits(hidden, weight), hidden @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_logits_are_those_of_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (7, 5000))
    expected, tokens = torch.topk(hidden.float() @ weight.float().T, 50)
    top, found = head.top_logits(hidden, weight, 50)
    torch.testing.assert_close(top, expected)
    assert torch.equal(found, tokens)
    # logits in bf16 alone would not do: neighbours fall together
    assert dtype == torch.float32 or len((hidden @ weight.T).topk(50).values[0].unique()) < 50


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tied", [3, 30])
def test_the_likeliest_of_tokens_that_are_alike_in_bfloat16_are_found(count, tied):
    generator = torch.Generator().manual_seed(0)
    weight = 0.01 * torch.randn(5000, 64, generator=generator)
    places = torch.randperm(5000, generator=generator)[:tied]
    weight[places] = 0.3125  # 64 of them are 20, where numbers in bfloat16 are 1/8 apart
    weight[places, 0] += torch.arange(tied) / 512
    hidden, weight = torch.ones(1, 64).bfloat16(), weight.bfloat16()
    assert (hidden @ weight[places].T).unique().tolist() == [20]
    top, tokens = head.top_logits(hidden, weight, count)
    assert tokens[0].tolist() == places.flip(0)[:count].tolist()
    assert top[0].tolist() == [20 + (tied - 1 - place) / 512 for place in range(count)]


def test_more_logits_than_the_vocabulary_has():
    top, tokens = head.top_logits(torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, 0], [2, 0]]).bfloat16(), 50)
    assert top.tolist() == [[2, 1]]
    assert tokens.tolist() == [[1, 0]]


@pytest.mark.parametrize("size", [50, 5000, 50000])
@pytest.mark.parametrize("peak", [0, 20], ids=["flat", "peaked"])
def test_a_bf16_model_is_scored_as_in_float32_but_for_two_thousandths(size, peak):
    """Distances from the largest logit are rounded, and logits themselves, of 20 and more, are not.

    Peaked: the likely token is in the last block, with a rival a tenth behind, as when an LLM is sure.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, 64, generator=generator)
    hidden, drift = (scale * torch.randn(TOKENS, 64, generator=generator) for scale in (0.5, 0.05))
    targets = torch.randint(size, (TOKENS,), generator=generator)
    for token in range(TOKENS if peak else 0):
        direction = hidden[token] / hidden[token].square().sum()
        for place, logit in ((size - 2 * TOKENS + token, peak), (size - TOKENS + token, peak - 0.1)):
            weight[place] += (logit - weight[place] @ hidden[token]) * direction
        if token % 2:  # of the others the next token is another one than the LLM is sure of
            targets[token] = size - 2 * TOKENS + token
    weight, reference = weight.bfloat16(), (hidden + drift).bfloat16()
    hidden = hidden.bfloat16().requires_grad_()
    hidden32 = hidden.detach().float().requires_grad_()
    expected = plain(hidden32, weight.float(), targets, reference.float(), weight.float())
    actual = head.head_scores(hidden, weight, targets, reference, weight)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    torch.testing.assert_close(actual[0] - actual[1], expected[0] - expected[1], atol=2e-3, rtol=0)
    torch.testing.assert_close(head.head_logps(hidden, weight, targets), expected[0], atol=2e-3, rtol=0)
    (gradient,) = torch.autograd.grad(loss(actual[0], actual[2]), [hidden])
    (wanted,) = torch.autograd.grad(loss(expected[0], expected[2]), [hidden32])
    assert torch.cosine_similarity(gradient.float().flatten(), wanted.flatten(), dim=0) > 0.999
    # logits in bf16 alone would not do
    rough = (hidden @ weight.T).float().log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert (rough - expected[0]).abs().max() > 0.005
    assert (head.head_scores(hidden, weight, targets, hidden.detach(), weight)[2] == 0).all()


def test_far_from_the_original_a_bf16_model_is_scored_more_roughly():
    """The difference of the two models' logits is rounded to 1/256 of itself, which is no longer small then."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator).bfloat16()
    hidden, drift = (scale * torch.randn(TOKENS, 64, generator=generator) for scale in (0.5, 0.4))
    targets = torch.randint(5000, (TOKENS,), generator=generator)
    hidden, reference = hidden.bfloat16(), (hidden + drift).bfloat16()
    expected = plain(hidden.float(), weight.float(), targets, reference.float(), weight.float())
    assert expected[2].mean() > 1
    logps, reference_logps, kl = head.head_scores(hidden, weight, targets, reference, weight)
    torch.testing.assert_close(logps, expected[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(reference_logps, expected[1], atol=0.05, rtol=0)
    torch.testing.assert_close(kl, expected[2], atol=0.01, rtol=0)


def test_a_frozen_head_beside_another_one_is_scored_in_the_plain_way(tensors):
    hidden, weight, targets, reference, _ = tensors
    others = (hidden, weight, targets, reference, weight + 1)
    for one, other in zip(head.head_scores(*others), plain(*others), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_no_gradient_is_computed_without_need(tensors, monkeypatch):
    """Its product with the head takes as long as the rest; counted by the blocks that are multiplied."""
    hidden, products, multiply = tensors[0].detach(), [], torch.Tensor.__matmul__

    def counted(one, other):
        products.append(one.shape)
        return multiply(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    for with_gradient in (False, True):
        products.clear()
        rest = tensors[1:]
        head.head_scores(hidden.clone().requires_grad_(with_gradient), *rest)
        assert bool(products) == with_gradient


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made within it."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("scored", [True, False])
def test_the_logits_of_all_tokens_are_never_held(monkeypatch, trainable, scored):
    """Nor are they in the backward pass: a batch's would be gigabytes."""
    tokens, size, vocabulary = 60, 4, 3 * head.VOCABULARY_BLOCK
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", tokens * vocabulary // 6)
    hidden = torch.randn(tokens, size, requires_grad=True)
    weight = torch.randn(vocabulary, size, requires_grad=trainable)
    targets = torch.randint(vocabulary, (tokens,))
    with Largest() as largest:
        if scored:
            reference = weight.detach().clone() if trainable else weight
            logps, _, kl = head.head_scores(hidden, weight, targets, torch.randn(tokens, size), reference)
            (logps.sum() + kl.sum()).backward()
        else:
            head.head_logps(hidden, weight, targets).sum().backward()
    assert tokens * head.VOCABULARY_BLOCK // 3 <= largest.numel < tokens * vocabulary // 2
