"""Eq. 4, and the correction by the training prior."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.algorithm.rewards import correct_prior, label_rewards, leave_one_out_advantages


def test_eq_4_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]])
    rewards = label_rewards(probabilities, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(rewards, torch.tensor([0.8, -0.5, 0.0]))


def test_eq_4_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="must be"):
        label_rewards(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long))


def test_prior_correction_by_hand():
    # 98 and 0 rows: smoothed shares 99/100 and 1/100
    corrected = correct_prior(torch.tensor([[0.99, 0.01], [0.5, 0.5]]), torch.tensor([98, 0]))
    torch.testing.assert_close(corrected, torch.tensor([[0.5, 0.5], [0.01, 0.99]]))


def test_leave_one_out_advantages_by_hand():
    # label 0 has 0.9, 0.3 and 0.6; label 1 has -0.5 alone
    advantages = leave_one_out_advantages(torch.tensor([0.9, 0.3, -0.5, 0.6]), torch.tensor([0, 0, 1, 0]))
    torch.testing.assert_close(advantages, torch.tensor([0.45, -0.45, 0.0, 0.0]))


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_advantages_sum_to_zero_and_do_not_see_a_constant(classes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, labels = torch.rand(count, generator=generator), torch.randint(classes, (count,), generator=generator)
    advantages = leave_one_out_advantages(rewards, labels)
    for label in labels.unique():
        assert advantages[labels == label].sum().abs() < 1e-4
    torch.testing.assert_close(leave_one_out_advantages(rewards + 1, labels), advantages, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_prior_correction_gives_probabilities_and_does_nothing_when_balanced(counts, seed):
    probabilities = torch.rand(4, len(counts), generator=torch.Generator().manual_seed(seed)).softmax(1)
    corrected = correct_prior(probabilities, torch.tensor(counts))
    torch.testing.assert_close(corrected.sum(1), torch.ones(4))
    balanced = correct_prior(probabilities, torch.full((len(counts),), 7))
    torch.testing.assert_close(balanced, probabilities)
