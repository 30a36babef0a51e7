"""The intended label as one more judge."""

import pytest
import torch
from conftest import BAD, GOOD

from crosslm import enhancement
from crosslm.algorithm.soft_labels import MOST, intended_label_accuracy, with_intended_labels
from crosslm.config import SLMConfig
from crosslm.enhancement import soft_labels
from crosslm.models.slm import SLM
from crosslm.progress import Progress
from crosslm.records import SyntheticSet, SyntheticText, Upload


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


def test_what_step_5_learns():
    pool = SyntheticSet([SyntheticText(str(label), label, "", (), (), 0) for label in (0, 1, 1)])
    judged = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.1, 0.9]])
    slm = SLMConfig(models=({"model": "any"},))
    assert soft_labels(pool, judged, slm) is None
    assert soft_labels(pool, judged, slm.model_copy(update={"intended_labels": True})) is None
    slm = slm.model_copy(update={"soft_labels": True})
    assert soft_labels(pool, judged, slm) is judged
    both = soft_labels(pool, judged, slm.model_copy(update={"intended_labels": True}))
    rho = intended_label_accuracy(judged, pool.labels)
    assert 0.5 < rho < MOST
    torch.testing.assert_close(both, with_intended_labels(judged, pool.labels, rho))


def test_the_accuracy_is_that_of_the_whole_pool_not_of_what_is_selected(models, config, task, monkeypatch):
    """Selected by their rewards, the texts would all seem to fit."""
    asked = []
    monkeypatch.setattr(enhancement, "soft_labels", lambda pool, judged, _: asked.append((len(pool.samples), judged)))
    pool = SyntheticSet([SyntheticText(text, place % 2, "", (), (), 0) for place, text in enumerate(GOOD + BAD)])
    judged = torch.full((len(pool.samples), 2), 0.5)
    slm = SLM.load(str(models / "bert"), task.labels, 32, 0)
    upload = Upload("north", 0, (1, 1), {}, slm.to_state())
    enhancement.train_on_synthetic(slm, pool, [0, 1], judged, upload, config, Progress(), "north")
    assert [(texts, len(each)) for texts, each in asked] == [(len(pool.samples), len(pool.samples))]
