"""What is measured of texts and predictions, by hand."""

from types import SimpleNamespace

import pytest
import torch

from crosslm.evaluate import confusion_counts, distinct_ngrams
from crosslm.records import Receipt, SyntheticSet, SyntheticText
from crosslm.runs import arrivals
from crosslm.runs.measures import LLMMeter
from crosslm.server import StepRecord
from crosslm.support.progress import Progress


def written(*texts):
    """A set of texts; what begins with ``good`` was written for the label 1."""
    return SyntheticSet([SyntheticText(text, int(text.startswith("good")), "", (1,), (2,), 0) for text in texts])


def test_confusion_has_the_right_label_first():
    # of two rows of label 1 one was given 0; the row of label 0 was given 0
    assert confusion_counts(predicted=[1, 0, 0], labels=[1, 1, 0], num_classes=2) == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab, ba, ab
        (["a b", "a b", "b a"], 2, 2 / 3),  # no pair reaches over two texts
        (["a b a b"], 3, 1.0),
        (["a"], 2, 0.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_ngrams(texts, n) == pytest.approx(expected)


def receipts(*values):
    return [Receipt(reward, diversity, 0.0, 1, kept) for reward, diversity, kept in values]


def test_the_measures_of_a_steps_texts_by_hand(task):
    record = StepRecord(pool=written("good one here", "one two", "bad"))
    record.receipts = receipts((0.5, 0.2, True), (-0.5, 0.4, False), (0.3, 0.9, False))
    record.pool.removed.update(empty=2, echo=1)
    record.drafts = [
        (written("good", "bad"), torch.tensor([1.0, 0.0])),
        (written("good", "bad"), torch.tensor([-0.5, 0.1])),
    ]
    record.drafts[0][0].removed.update(echo=3)
    assert arrivals.text_measures(record, task) == pytest.approx(
        {
            "removed/empty": 2,
            "removed/echo": 4,
            "reward/drafts": (0.5 - 0.2) / 2,
            "texts/drafts": 4,
            "reward/pool": 0.1,
            "diversity/pool": 0.5,
            "self_similarity/pool": 0.5,
            "texts/pool": 3,
            "length/pool": 2,
            "echo/pool": 2 / 3,  # "good" and "bad" name their labels
            "distinct_1/pool": 5 / 6,  # good one here one two bad
            "distinct_2/pool": 1,
            "distinct_3/pool": 1,
        }
    )
    record.drafts = []  # an SLM without a say
    assert not [name for name in arrivals.text_measures(record, task) if name.endswith("/drafts")]


def test_the_judges_agreement_is_that_of_all_drafts_together():
    says_good = SimpleNamespace(predict_proba=lambda texts: torch.tensor([[0.0, 1.0]] * len(texts)))
    record = StepRecord(pool=written("good", "bad", "bad", "bad"))
    record.drafts = [(written("good"), torch.zeros(1)), (written("good", "bad", "bad"), torch.zeros(3))]
    # 1 of 1 and 1 of 3: 2 of 4, and not the mean of 1 and 1/3
    assert arrivals.judge_measures(says_good, record) == pytest.approx({"judge/drafts": 0.5, "judge/pool": 0.25})
    record.drafts = []
    assert arrivals.judge_measures(says_good, record) == {"judge/pool": 0.25}


def test_as_many_tokens_count_for_the_perplexity_as_are_set(config, task):
    few = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"perplexity_tokens": 3})})
    tokenizer = SimpleNamespace(encode=lambda text, **_: text.split())
    llm = SimpleNamespace(tokenizer=tokenizer, perplexity=lambda _, most, __: float(most))
    meter = LLMMeter(None, few, task, Progress(), None, "one two three four")
    assert meter.reading(llm, "before") == {"perplexity": 3.0}


def test_few_selected_texts_are_warned_of_below_half_of_those_wanted(config):
    half = config.model_copy(update={"selection": config.selection.model_copy(update={"fraction": 0.5})})
    record = StepRecord(receipts=receipts(*[(0, 0, place < 2) for place in range(8)]))
    assert arrivals.few_selected("north", record, half) is None  # 2 of 4
    record.receipts = receipts(*[(0, 0, place < 1) for place in range(8)])
    assert arrivals.few_selected("north", record, half) == (
        "client north: only 1 of 4 texts could be selected; its SLM learned little"
    )
