"""Eq. 10, the score, and the best alpha %."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.algorithm.selection import (
    agreed_rewards,
    approximate_diversity,
    diversity,
    quality_diversity_scores,
    select_top,
)
from crosslm.config import SelectionConfig
from crosslm.enhancement import select
from crosslm.records import SyntheticSet, SyntheticText


def test_eq_10_by_hand():
    # lengths must not matter; 60 degrees between the first two, 90 between first and third
    vectors = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(3) / 2], [0.0, 7.0]])
    expected = torch.tensor([1 - 0.5, 1 - math.sqrt(3) / 2, 1 - math.sqrt(3) / 2])
    torch.testing.assert_close(diversity(vectors), expected)


@given(st.integers(2, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_eq_10_in_blocks_is_the_plain_definition(count, block, seed):
    vectors = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    plain = 1 - similarity.amax(dim=1)
    actual = diversity(vectors, block)
    torch.testing.assert_close(actual, plain, atol=1e-5, rtol=0)
    assert (actual >= -1e-6).all()
    assert (actual <= 2 + 1e-6).all()


def test_the_approximation_that_searches_every_cell_is_exact():
    vectors = torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(approximate_diversity(vectors, probes=12), diversity(vectors))


def test_the_approximation_is_never_too_small_and_mostly_exact():
    generator = torch.Generator().manual_seed(2)
    topics = torch.randn(40, 16, generator=generator)
    vectors = topics[torch.randint(40, (2000,), generator=generator)] + 0.3 * torch.randn(2000, 16, generator=generator)
    exact, approximate = diversity(vectors), approximate_diversity(vectors, probes=8)
    assert (approximate >= exact - 1e-6).all()
    assert ((approximate - exact).abs() < 1e-6).float().mean() > 0.95
    assert (approximate_diversity(vectors, probes=1) > exact + 1e-6).any()  # fewer cells find less


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_approximation_of_few_texts(count):
    vectors = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(approximate_diversity(vectors), diversity(vectors))


def test_a_duplicate_has_no_diversity():
    assert diversity(torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 2.0]]))[[0, 2]].abs().max() < 1e-6


def test_score_by_hand():
    scores = quality_diversity_scores(torch.tensor([0.8, -0.5]), torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(scores, torch.tensor([0.4, -0.1]))


def test_rewards_that_the_llm_agrees_with_by_hand():
    rewards, posteriors = torch.tensor([0.8, 0.8, 0.0, -0.5]), torch.tensor([0.5, 1.0, 0.9, 0.1])
    assert agreed_rewards(rewards, posteriors).tolist() == pytest.approx([0.4, 0.8, 0.0, -0.5])


def test_among_negative_rewards_the_near_duplicate_wins_as_written_and_drop_prevents_it():
    rewards, diversities = torch.tensor([0.2, -0.9, -0.9, -0.9]), torch.tensor([0.5, 0.9, 0.01, 0.5])
    scores = quality_diversity_scores(rewards, diversities)
    assert select_top(scores, 0.5).tolist() == [0, 2]
    assert select_top(scores, 0.5, rewards, "drop").tolist() == [0]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=200), st.floats(0.01, 1))
def test_top_alpha_keeps_the_best_and_rounds_up(scores, fraction):
    kept = select_top(torch.tensor(scores), fraction).tolist()
    assert len(kept) == math.ceil(round(fraction * len(scores), 9))
    left = [score for place, score in enumerate(torch.tensor(scores).tolist()) if place not in kept]
    assert not left or min(torch.tensor(scores)[kept].tolist()) >= max(left)


@pytest.mark.parametrize(("count", "expected"), [(30, 3), (31, 4), (10, 1)])
def test_top_alpha_is_not_rounded_up_by_floating_point(count, expected):
    assert len(select_top(torch.arange(float(count)), 0.1)) == expected


def test_drop_needs_rewards():
    with pytest.raises(ValueError, match="needs the rewards"):
        select_top(torch.ones(4), 0.5, nonpositive_rewards="drop")


def test_class_balance_takes_as_many_of_each_label():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, -0.2, 0.05, 0.5])
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 1])
    assert select_top(scores, 0.5).tolist() == [0, 1, 2, 3]
    assert select_top(scores, 0.5, labels=labels).tolist() == [0, 1, 4, 6]
    # of label 0 only two have r > 0, and so two of each are taken
    assert select_top(scores, 0.9, scores, "drop", labels).tolist() == [0, 1, 4, 6]
    # a label without any usable text leaves nothing to balance with
    assert select_top(scores - 0.3, 0.5, scores - 0.3, "drop", labels).tolist() == []


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=100), st.floats(0.01, 1))
def test_class_balance_keeps_the_best_of_each_label(rows, fraction):
    scores, labels = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    kept = select_top(scores, fraction, labels=labels).tolist()
    counts = {int(label): sum(int(labels[place]) == label for place in kept) for label in labels.unique().tolist()}
    share = math.ceil(round(fraction * len(rows) / len(counts), 9))
    assert set(counts.values()) == {min(share, *(labels.tolist().count(label) for label in counts), len(rows))}
    for label in counts:
        chosen = [place for place in kept if labels[place] == label]
        left = [place for place in range(len(rows)) if labels[place] == label and place not in kept]
        assert not left or min(scores[chosen].tolist(), default=2) >= max(scores[left].tolist())


def test_texts_can_be_ranked_by_one_factor_alone():
    class Vectors:
        def encode(self, texts):
            # the first two are alike, the third is unlike both
            return torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    pool = SyntheticSet([SyntheticText(text, 0, "", (), (), 0) for text in "abc"])
    rewards = torch.tensor([0.9, 0.8, 0.1])
    kept = {
        score: select(pool, rewards, Vectors(), SelectionConfig(score=score, fraction=0.3))[1]
        for score in ("product", "reward", "diversity")
    }
    assert kept == {"product": [2], "reward": [0], "diversity": [2]}
    # the most diverse text has no reward above 0: it takes no place from one that has
    unfit, dropping = torch.tensor([0.2, 0.8, -0.1]), SelectionConfig(nonpositive_rewards="drop", fraction=0.3)
    assert select(pool, unfit, Vectors(), dropping.model_copy(update={"score": "diversity"}))[1] == [0]
    receipts, _ = select(pool, rewards, Vectors(), SelectionConfig(score="reward"))
    assert [receipt.score for receipt in receipts] == pytest.approx([0.9, 0.8, 0.1])
