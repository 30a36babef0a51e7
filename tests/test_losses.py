"""Eq. 5 to 9, each against numbers worked out by hand."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.algorithm.losses import (
    generation_loss,
    kl_loss,
    language_modeling_loss,
    objective,
    sequence_logps,
    token_kl,
)


def test_eq_6_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    torch.testing.assert_close(sequence_logps(logps, mask), torch.tensor([-7.0, -8.0]))
    torch.testing.assert_close(sequence_logps(logps, mask, "mean"), torch.tensor([-7 / 3, -4.0]))


def test_eq_5_by_hand():
    loss = generation_loss(torch.tensor([-10.0, -10.0]), torch.tensor([-12.0, -9.0]), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(loss, torch.tensor([-1.0, -1.0]))  # -0.5 * 2 and 1 * -1


def test_eq_5_gradient_is_minus_the_reward_whatever_the_reference():
    for reference in (-12.0, 3.0):
        logps = torch.tensor([-10.0, -10.0], requires_grad=True)
        rewards = torch.tensor([0.5, -1.0], requires_grad=True)
        generation_loss(logps, torch.tensor([reference] * 2), rewards).sum().backward()
        torch.testing.assert_close(logps.grad, torch.tensor([-0.5, 1.0]))
        assert rewards.grad is None


def test_eq_5_with_a_floor_by_hand():
    # log-ratios -5, -5 and -1; the first, with a negative reward, is beyond the floor of 3
    logps = torch.tensor([-15.0, -15.0, -11.0], requires_grad=True)
    loss = generation_loss(logps, torch.tensor([-10.0] * 3), torch.tensor([-0.5, 0.5, -0.5]), floor=3.0)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.5, 2.5, -0.5]))
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, -0.5, 0.5]))


def test_eq_7_by_hand():
    torch.testing.assert_close(language_modeling_loss(torch.tensor([-7.0])), torch.tensor([7.0]))


def test_eq_8_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2
    logits, reference = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(token_kl(logits, reference), torch.tensor([expected]))
    token_kls, is_x = torch.tensor([[5.0, 0.5, 0.25]]), torch.tensor([[False, True, True]])
    torch.testing.assert_close(kl_loss(token_kls, is_x), torch.tensor([0.75]))
    torch.testing.assert_close(kl_loss(token_kls, is_x, "mean"), torch.tensor([0.375]))


@given(st.integers(0, 2**32 - 1))
def test_eq_8_is_never_negative_and_zero_for_equal_models(seed):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed)) * 4
    other = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed + 1)) * 4
    assert (token_kl(logits, other) >= -1e-5).all()
    assert (token_kl(logits, logits) == 0).all()


def test_eq_9_by_hand_with_the_papers_gammas():
    total = objective(torch.tensor([-2.0]), torch.tensor([30.0]), torch.tensor([4.0]), 1.0, 0.1, 0.05)
    torch.testing.assert_close(total, torch.tensor([1 * -2.0 + 0.1 * 30.0 + 0.05 * 4.0]))
