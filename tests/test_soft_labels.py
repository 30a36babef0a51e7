"""The intended label and the LLM as further judges."""

import math

import pytest
import torch
from conftest import BAD, GOOD

from crosslm.algorithm.soft_labels import (
    LOUDEST,
    MOST,
    intended_label_accuracy,
    opinion_pool,
    sureness,
    weight_beside,
    with_intended_labels,
    without_preference,
)
from crosslm.config import SLMConfig
from crosslm.enhancement import PROBED, pool_rewards, probe_of, soft_labels, train_on_synthetic, weigh_judges
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, SyntheticText, Upload
from crosslm.support.progress import Progress


def test_the_posterior_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    # rho = 0.6, others 0.2: 0.5 x 0.2, 0.3 x 0.6, 0.2 x 0.2 = 0.1, 0.18, 0.04; and 0.06, 0.16, 0.02
    found = with_intended_labels(probabilities, torch.tensor([1, 0]), 0.6)
    expected = torch.tensor([[0.1, 0.18, 0.04], [0.06, 0.16, 0.02]])
    torch.testing.assert_close(found, expected / expected.sum(dim=1, keepdim=True))


def test_labels_that_say_nothing_change_nothing():
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    torch.testing.assert_close(with_intended_labels(probabilities, torch.tensor([2]), 1 / 3), probabilities)


def test_the_accuracy_by_hand():
    # sure judges: three of four agree, and the likelihood 3 log rho + log(1 - rho) is largest at 3/4
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert intended_label_accuracy(sure, torch.tensor([0, 0, 1, 0])) == pytest.approx(0.75)
    # p = 0.9 and 0.4 of two classes: the derivative 0.8 / (0.1 + 0.8 rho) - 0.2 / (0.6 - 0.2 rho) is 0 at
    # 0.8 (0.6 - 0.2 rho) = 0.2 (0.1 + 0.8 rho), rho = 0.46 / 0.32, above what is allowed
    assert intended_label_accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0])) == MOST
    # p = 0.9 and 0.2: 0.8 (0.8 - 0.6 rho) = 0.6 (0.1 + 0.8 rho), rho = 0.58 / 0.96
    found = intended_label_accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    assert found == pytest.approx(0.58 / 0.96, abs=1e-4)


@pytest.mark.parametrize(("rho", "classes"), [(0.6, 2), (0.8, 2), (0.7, 10), (0.25, 10)])
def test_the_accuracy_is_found_with_judges_who_are_often_wrong_and_know_it(rho, classes):
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(4000, classes, generator=generator)).softmax(dim=1)
    truth = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    wrong = (truth + torch.randint(1, classes, (4000,), generator=generator)) % classes
    labels = torch.where(torch.rand(4000, generator=generator) < rho, truth, wrong)
    assert intended_label_accuracy(probabilities, labels) == pytest.approx(rho, abs=0.04)
    agreed = with_intended_labels(probabilities, labels, rho)
    right = [(found.argmax(dim=1) == truth).float().mean() for found in (agreed, probabilities)]
    assert right[0] > right[1]
    assert (agreed.argmax(dim=1) == truth).float().mean() >= (labels == truth).float().mean()


def test_judges_who_are_less_sure_than_right_make_the_accuracy_too_large():
    sure = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)
    labels = torch.zeros(10, dtype=torch.long)  # fit eight of ten texts
    assert intended_label_accuracy(sure, labels) == pytest.approx(0.8)
    # p = 0.8 and 0.2: 8 x 0.6 / (0.2 + 0.6 rho) = 2 x 0.6 / (0.8 - 0.6 rho), rho = 1
    assert intended_label_accuracy(0.2 + 0.6 * sure, labels) == MOST


def test_no_less_than_chance_and_nothing_of_nothing():
    against = torch.tensor([[0.1, 0.9]] * 3)
    assert intended_label_accuracy(against, torch.zeros(3, dtype=torch.long)) == 0.5
    empty = torch.zeros(0, 4)
    assert intended_label_accuracy(empty, torch.zeros(0, dtype=torch.long)) == 0.25
    assert with_intended_labels(empty, torch.zeros(0, dtype=torch.long), 0.25).shape == (0, 4)


def test_a_preference_is_taken_off_by_hand():
    # the logs' means are (log 0.8 + log 0.2) / 2 = log 0.4 for both labels
    even = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    torch.testing.assert_close(without_preference(even), even)
    # 0.9 and 0.6 to sqrt(0.54), 0.1 and 0.4 to sqrt(0.04): odds 9 and 1.5 become 9 / 3.674 and 1.5 / 3.674
    leaning = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    odds = torch.tensor([9.0, 1.5]) / (0.54 / 0.04) ** 0.5
    torch.testing.assert_close(without_preference(leaning)[:, 0], odds / (1 + odds))
    assert without_preference(leaning).argmax(dim=1).tolist() == [0, 1]
    certain = without_preference(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(certain, torch.full((2, 2), 0.5))
    # 1e-7 and 1e-9 to their geometric mean of 1e-8: odds of 10 and 1/10
    rare = without_preference(torch.tensor([[1e-7, 1 - 1e-7], [1e-9, 1 - 1e-9]]))
    torch.testing.assert_close(rare, torch.tensor([[10 / 11, 1 / 11], [1 / 11, 10 / 11]]))


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-9, 1e-25])
def test_how_likely_a_labels_words_are_whatever_the_text_says_changes_nothing(factor):
    odds = torch.tensor([[4.0, 1.0, 1.0], [1.0, 2.0, 1.0], [0.5, 1.0, 3.0]])
    leaning = odds * torch.tensor([1.0, factor, 1.0])
    found = without_preference(leaning / leaning.sum(dim=1, keepdim=True))
    torch.testing.assert_close(found, without_preference(odds / odds.sum(dim=1, keepdim=True)))


def test_two_judges_together_by_hand():
    one, other = (
        torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]]),
        torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.2, 0.7]]),
    )
    expected = torch.tensor([[0.10, 0.18, 0.04], [0.1, 0.2, 0.7]])  # who is undecided leaves it to the other
    torch.testing.assert_close(opinion_pool(one, other), expected / expected.sum(dim=1, keepdim=True))
    opposed = opinion_pool(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(opposed, torch.tensor([[0.5, 0.5]]))


def test_a_judge_that_counts_less_by_hand():
    # 0.8^0.5 and 0.2^0.5 have the odds 2, times 1 / 3: 2 to 3; the other's 1 to 1 leaves 2 to 1
    one, other = torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(opinion_pool(one, other, 0.5), torch.tensor([[0.4, 0.6], [2 / 3, 1 / 3]]))
    torch.testing.assert_close(opinion_pool(one, other, 0.0), other)


def test_how_sure_a_judge_should_be_by_hand():
    # two texts of three with the label: 2 log s + log(1 - s) is largest at s = 2/3, odds of 2; the judge's odds are 4,
    # and 4^0.5 = 2. Beside 3,000 texts the prior is nothing
    labels = torch.tensor([0, 0, 1]).repeat(1000)
    surer, as_right = (torch.tensor([[share, 1 - share]]).expand(3000, 2) for share in (0.8, 2 / 3))
    assert sureness(surer, labels) == pytest.approx(0.5, abs=1e-3)
    assert sureness(as_right, labels) == pytest.approx(1.0)
    assert weight_beside(surer, as_right, labels) == pytest.approx(0.5, abs=1e-3)
    assert weight_beside(as_right, surer, labels) == pytest.approx(2.0, abs=1e-2)
    against = as_right.flip(1)
    assert sureness(against, labels) == pytest.approx(0.0)
    assert weight_beside(against, as_right, labels) == pytest.approx(0.0)
    assert weight_beside(as_right, against, labels) == LOUDEST
    assert weight_beside(against, against, labels) == 1.0  # neither knows anything
    # one text, right, with the odds 4 = e^L: L (1 - s) = b - 1, with s = 1 / (1 + e^(-b L))
    found = sureness(surer[:1], labels[:1])
    odds = math.log(4)
    assert found - 1 == pytest.approx(odds * (1 - 1 / (1 + math.exp(-found * odds))), rel=1e-5)
    assert found > 1


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_a_judge_that_is_undecided_leaves_the_other_as_sure_as_it_was(classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (768,), generator=generator)
    uniform = torch.full((768, classes), 1 / classes)
    assert sureness(uniform, labels) == pytest.approx(1.0)
    assert sureness(uniform[:0], labels[:0]) == pytest.approx(1.0)
    hardly = (0.02 * torch.randn(768, classes, generator=generator)).softmax(dim=1)
    other = (torch.nn.functional.one_hot(labels, classes) + torch.randn(768, classes, generator=generator)).softmax(1)
    for judge in (uniform, hardly):
        both = opinion_pool(judge, other, weight_beside(judge, other, labels))
        torch.testing.assert_close(both, other, atol=0.05, rtol=0)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("times_too_sure", [1, 2, 4])
def test_a_judge_that_is_too_sure_is_found_out(classes, times_too_sure):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, classes, generator=generator)
    truth = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    found = sureness((times_too_sure * logits).softmax(dim=1), truth)
    assert found == pytest.approx(1 / times_too_sure, rel=0.15)


@pytest.mark.parametrize("told", [1.0, 0.7])
def test_of_two_who_know_as_much_the_weight_hardly_depends_on_how_many_texts_fit_their_label(told):
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20000, 2, generator=generator)
    truth = torch.multinomial((one + other).softmax(dim=1), 1, generator=generator).squeeze(1)
    labels = torch.where(torch.rand(20000, generator=generator) < told, truth, 1 - truth)
    found = weight_beside((5 * one).softmax(dim=1), other.softmax(dim=1), labels)
    assert found == pytest.approx(0.2, rel=0.15)


def test_what_step_5_learns():
    pool = SyntheticSet([SyntheticText(str(label), label, "", (), (), 0) for label in (0, 1, 1)])
    judged = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.1, 0.9]])
    said = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    fields = SLMConfig(models=({"model": "any"},))

    def learned(judged, said, **values):
        return soft_labels(pool, judged, said, fields.model_copy(update=values))

    assert learned(judged, said) is None
    assert learned(judged, said, intended_labels=True, llm_judges=True) is None
    assert learned(judged, said, soft_labels=True) is judged
    rho = intended_label_accuracy(judged, pool.labels)
    assert 0.5 < rho < MOST
    both = learned(judged, said, soft_labels=True, intended_labels=True)
    torch.testing.assert_close(both, with_intended_labels(judged, pool.labels, rho))
    own = without_preference(said)
    with_llm = learned(judged, said, soft_labels=True, llm_judges=True)
    torch.testing.assert_close(with_llm, opinion_pool(judged, own))
    with_both = fields.model_copy(update={"soft_labels": True, "llm_judges": True})
    weighed = soft_labels(pool, judged, said, with_both, 0.5)
    torch.testing.assert_close(weighed, opinion_pool(judged, own, 0.5))
    three = learned(judged, said, soft_labels=True, llm_judges=True, intended_labels=True)
    rho = intended_label_accuracy(with_llm, pool.labels)
    torch.testing.assert_close(three, with_intended_labels(with_llm, pool.labels, rho))


def test_judges_are_weighed_where_that_is_asked_for(config):
    fields = {"soft_labels": True, "llm_judges": True, "weigh_judges": True}
    texts = [SyntheticText(str(place), place % 2, "", (), (), 0) for place in range(PROBED + 2)]
    pool = SyntheticSet(texts)
    judged = torch.rand(len(texts), 2, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    said = judged.flip(0)

    def probe(**values):
        return probe_of(pool, config.model_copy(update={"slm": config.slm.model_copy(update=fields | values)}))

    assert [probe(**{name: False}).samples for name in fields] == [[], [], []]
    assert probe().samples == texts[:PROBED]
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"llm_judges": True})})
    assert [probe(**{name: False}).samples for name in fields] == [texts[:PROBED], texts[:PROBED], []]
    expected = weight_beside(judged[:PROBED], without_preference(said[:PROBED]), pool.labels[:PROBED])
    assert weigh_judges(probe(), judged, said) == expected != 1.0
    for given in ((probe(weigh_judges=False), judged, said), (probe(), None, said), (probe(), judged, None)):
        assert weigh_judges(*given) == 1.0


def test_where_no_slm_may_judge_the_llm_does_or_else_the_intended_label_is_learned():
    pool = SyntheticSet([SyntheticText(str(label), label, "", (), (), 0) for label in (0, 1)])
    said = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    fields = SLMConfig(models=({"model": "any"},), soft_labels=True)
    assert soft_labels(pool, None, said, fields) is None
    with_llm = fields.model_copy(update={"llm_judges": True})
    torch.testing.assert_close(soft_labels(pool, None, said, with_llm), without_preference(said))
    torch.testing.assert_close(pool_rewards(pool, None, said), 2 * without_preference(said).diagonal() - 1)
    torch.testing.assert_close(pool_rewards(pool, said, None), torch.tensor([0.8, -0.2]))
    with pytest.raises(ValueError, match="neither an SLM nor the LLM"):
        pool_rewards(pool, None, None)


def test_the_selected_texts_are_learned_with_their_own_targets(models, config, task, monkeypatch):
    fitted = []
    monkeypatch.setattr(SLM, "fit", lambda slm, texts, fit, seed, on, targets: fitted.append((texts, targets)) or {})
    pool = SyntheticSet([SyntheticText(text, place % 2, "", (), (), 0) for place, text in enumerate(GOOD + BAD)])
    targets = torch.rand(len(pool.samples), 2)
    slm = SLM.load(str(models / "bert"), task.labels, 32, 0)
    upload = Upload("north", 0, (1, 1), {}, slm.to_state())
    train_on_synthetic(slm, pool, [3, 1], targets, upload, config, Progress(), "north")
    train_on_synthetic(slm, pool, [3, 1], None, upload, config, Progress(), "north")
    (texts, learned), (same, none) = fitted
    assert texts == same == pool.examples([3, 1])
    assert torch.equal(learned, targets[[3, 1]])
    assert none is None
