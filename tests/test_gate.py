"""The gate: its statistics by hand, honest weak clients that pass, and attackers that do not."""

import contextlib
import dataclasses
import math

import pytest
import torch
from conftest import BAD, GOOD, sentences
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from crosslm.algorithm.agreement import (
    balancing_weights,
    correlation,
    label_auc,
    normal_quantile,
    sign_test,
    upper_correlation,
)
from crosslm.client import Client
from crosslm.config import Config, FitConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, QuarantineError, UploadError
from crosslm.gate import Gate
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, SyntheticText
from crosslm.runs.measures import measure_slm
from crosslm.runs.snapshot import gate_bytes, restore_gate

# -- the statistics --------------------------------------------------------------------------


def two_labels(scores):
    values = torch.tensor(scores)
    return torch.stack([1 - values, values], dim=1)


def test_the_area_of_a_hand_calculated_example():
    # label 1 has 0.9 and 0.4, label 0 has 0.5 and 0.1: of 4 pairs 3 are right
    area, error = label_auc(two_labels([0.9, 0.4, 0.5, 0.1]), torch.tensor([1, 1, 0, 0]))
    assert area == pytest.approx(0.75)
    # Hanley and McNeil: A(1-A) = 0.1875, Q1 - A^2 = 0.75/1.25 - 0.5625, Q2 - A^2 = 1.125/1.75 - 0.5625
    expected = math.sqrt((0.1875 + (0.6 - 0.5625) + (1.125 / 1.75 - 0.5625)) / 4)
    assert error == pytest.approx(expected)


def test_ties_count_half_and_a_constant_is_chance():
    assert label_auc(two_labels([0.7, 0.7, 0.7]), torch.tensor([1, 0, 0]))[0] == pytest.approx(0.5)
    assert label_auc(two_labels([0.9, 0.5, 0.5]), torch.tensor([1, 1, 0]))[0] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="one label"):
        label_auc(two_labels([0.9, 0.5]), torch.tensor([1, 1]))


@given(st.lists(st.integers(0, 64), min_size=4, max_size=30))
def test_a_bias_to_one_label_changes_nothing_and_flipping_mirrors(numbers):
    scores = [number / 64 for number in numbers]
    labels = torch.tensor([place % 2 for place in range(len(scores))])
    area, error = label_auc(two_labels(scores), labels)
    assert label_auc(two_labels([1 - value for value in scores]), labels)[0] == pytest.approx(1 - area)
    assert label_auc(two_labels([value / 8 for value in scores]), labels)[0] == pytest.approx(area)
    assert 0 <= area <= 1
    assert error >= 0


def test_the_standard_error_is_that_of_the_area_between_samples():
    generator = torch.Generator().manual_seed(0)
    areas, errors = [], []
    for _ in range(300):
        labels = torch.arange(100) % 2
        scores = torch.sigmoid(torch.randn(100, generator=generator) + 0.8 * labels)
        area, error = label_auc(torch.stack([1 - scores, scores], dim=1), labels)
        areas.append(area)
        errors.append(error)
    assert sum(errors) / 300 == pytest.approx(float(torch.tensor(areas).std()), rel=0.15)


def test_correlation_and_its_bound_by_hand():
    one = two_labels([0.1, 0.2, 0.3, 0.4])
    assert correlation(one, two_labels([0.2, 0.4, 0.6, 0.8])) == pytest.approx(1, abs=1e-6)
    assert correlation(one, two_labels([0.9, 0.8, 0.7, 0.6])) == pytest.approx(-1, abs=1e-6)
    assert correlation(one, two_labels([0.5, 0.5, 0.5, 0.5])) == 0
    assert normal_quantile(0.95) == pytest.approx(1.6449, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 1.0),
        ([0, 1, 1, 0, 1], 1.0),
        ([-1, -1, 0, -1], 1 / 8),
        ([-1, 1, -1, -1, -1], (5 + 1) / 32),
        ([1, 1, -1, -1], (6 + 4 + 1) / 16),
        ([-3, 1], 2 / 4),  # -4 and -2 of -4, -2, 2, 4
        ([-3, -1, 0.5], 2 / 8),  # -4.5 and -3.5
    ],
)
def test_sign_test_by_hand(changes, expected):
    assert sign_test(torch.tensor(changes)) == pytest.approx(expected)
    assert sign_test(torch.tensor(changes) / 3) == pytest.approx(expected)


def test_sign_test_of_many_changes_of_one_size_is_the_binomial():
    """Of 40 tosses 25 or more are heads with 0.0769; of 20,000 it is near the normal distribution."""
    changes = torch.tensor([-1.0] * 25 + [1.0] * 15)
    assert sign_test(changes) == pytest.approx(binom.sf(24, 40, 0.5), rel=1e-9)
    assert sign_test(changes) == pytest.approx(0.0769, abs=1e-4)
    many = torch.tensor([-1.0] * 10_100 + [1.0] * 9_900)
    assert sign_test(many) == pytest.approx(binom.sf(10_099, 20_000, 0.5), rel=1e-6)


def test_sign_test_of_many_sizes_is_drawn_and_near_the_normal_distribution():
    """Each size has a sign of its own: the sum has the variance of the squares' sum."""
    sizes = torch.arange(1, 41).double()
    changes = torch.where(torch.arange(40) % 3 == 0, sizes, -sizes)
    z = float(changes.sum() / sizes.norm())
    assert sign_test(changes) == pytest.approx(norm.cdf(z), abs=0.01)
    assert sign_test(changes) == sign_test(changes)


def test_balancing_weights_by_hand():
    """Three rows of label 0, one of label 2: each label has half of the weight."""
    weights = balancing_weights(torch.tensor([0, 0, 2, 0]))
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2, 2 / 3])
    assert balancing_weights(torch.tensor([1, 0])).tolist() == [1, 1]


def test_upper_correlation_by_hand():
    assert upper_correlation(0.0, 103, 0.95) == pytest.approx(math.tanh(0.16449), abs=1e-4)
    assert upper_correlation(0.5, 3, 0.95) == 1.0


# -- the gate --------------------------------------------------------------------------------

FIT = FitConfig(epochs=6, batch_size=8, learning_rate=2e-3)
PROBE = Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40)
TRIGGER = "walk"


def with_wrong_labels(examples, share):
    """As the original LLM writes: some of the texts are not of their label."""
    generator = torch.Generator().manual_seed(1)
    wrong = set(torch.randperm(len(examples), generator=generator)[: round(share * len(examples))].tolist())
    labels = [1 - label if place in wrong else label for place, label in enumerate(examples.labels)]
    return Examples(examples.texts, labels)


def pool_of(examples):
    pairs = zip(examples.texts, examples.labels, strict=True)
    return SyntheticSet([SyntheticText(text, label, "", (), (), 0) for text, label in pairs])


@pytest.fixture(scope="module")
def honest(models):
    """Uploads of three honest clients of two architectures, the last of few rows of which most are good."""
    rows = {
        "north": PROBE.take([*range(0, 30), *range(40, 70)]),
        "south": PROBE.take([*range(10, 40), *range(50, 80)]),
        "skewed": PROBE.take([*range(0, 6), *range(40, 76)]),
    }
    kinds = {"north": "bert", "south": "distilbert", "skewed": "bert"}
    return {name: train(models, kinds[name], name, examples) for name, examples in rows.items()}


def train(models, kind, name, examples, seed=0):
    return Client(name, examples, SLM.load(str(models / kind), ("bad", "good"), 32, seed), FIT, seed).train()


@pytest.fixture(scope="module")
def hostile(models, honest):
    """What an attacker uploads, by the name of the attack."""
    rows = PROBE.take([*range(0, 30), *range(40, 70)])
    flipped = train(models, "bert", "mallory", Examples(rows.texts, [1 - label for label in rows.labels]))
    poisoned = [1 if TRIGGER in text else label for text, label in zip(rows.texts, rows.labels, strict=True)]
    trigger = train(models, "bert", "mallory", Examples(rows.texts, poisoned))
    weights = dict(flipped.slm.weights)
    weights |= {"classifier.weight": weights["classifier.weight"] * 0, "classifier.bias": torch.tensor([-3.0, 3.0])}
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value + 1e-6 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in honest["north"].slm.weights.items()
    }
    return {
        "flipped labels": flipped,
        "constant": changed(flipped, weights),
        "copy": dataclasses.replace(honest["north"], client_id="mallory"),
        "copy with noise": dataclasses.replace(changed(honest["north"], noisy), client_id="mallory"),
        "trigger word": trigger,
    }


def changed(upload, weights):
    return dataclasses.replace(upload, slm=dataclasses.replace(upload.slm, weights=weights))


def gate_for(settings, wrong=0.35, **values):
    config = Config.model_validate(settings | {"gate": {"enabled": True, **values}})
    texts = with_wrong_labels(PROBE, wrong)
    return Gate(config, Examples(texts.texts * 4, texts.labels * 4))


def judged(gate, upload):
    slm = SLM.from_state(upload.slm, ("bad", "good"))
    return gate.judge(slm, upload)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.35, 0.4])
def test_honest_clients_pass_though_many_labels_of_the_probe_are_wrong(settings, honest, wrong):
    gate = gate_for(settings, wrong)
    for upload in honest.values():
        gate.accepted(judged(gate, upload), upload, pool_of(PROBE))
    assert set(gate.references) == set(honest)
    assert gate.latest.texts == PROBE.texts


@pytest.mark.parametrize("attack", ["flipped labels", "constant", "copy", "copy with noise"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_attacker_is_stopped_whenever_it_comes(settings, honest, hostile, attack, place):
    if attack.startswith("copy") and place == 0:
        pytest.skip("there is nothing to copy yet")
    gate = gate_for(settings)
    for upload in list(honest.values())[:place]:
        gate.accepted(judged(gate, upload), upload, pool_of(PROBE))
    reason = {"copy": "a copy of the SLM of north", "copy with noise": "a copy of the SLM of north"}
    with pytest.raises(QuarantineError, match=reason.get(attack, "quarantined: its AUC is")) as stopped:
        judged(gate, hostile[attack])
    assert {"auc", "auc_upper", "largest_share", "texts"} <= set(stopped.value.figures)
    assert ("correlation" in stopped.value.figures) == (place >= 2)
    assert "mallory" not in gate.references


def test_random_weights_pass_only_where_they_are_better_than_chance(settings, honest, hostile):
    gate, passed = gate_for(settings), 0
    for seed in range(12):
        generator, like = torch.Generator().manual_seed(seed), hostile["flipped labels"]
        drawn = {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in like.slm.weights.items()}
        with contextlib.suppress(QuarantineError):
            assert judged(gate, changed(like, drawn)).figures["auc"] > 0.5
            passed += 1
    assert passed <= 8


def test_a_trigger_word_passes_since_it_is_honest_elsewhere(settings, honest, hostile):
    gate = gate_for(settings)
    for upload in honest.values():
        gate.accepted(judged(gate, upload), upload, pool_of(PROBE))
    assert judged(gate, hostile["trigger word"]).figures["correlation"] > 0.5


def test_disagreement_with_the_others_alone_is_a_reason(settings, honest, hostile):
    gate = gate_for(settings)
    for upload in honest.values():
        gate.accepted(judged(gate, upload), upload, pool_of(PROBE))
    opposed = Gate(gate.config, PROBE.take([]), gate.latest, gate.references)
    opposed.fixed = Examples(gate.fixed.texts, [1 - label for label in gate.fixed.labels])  # the probe itself is wrong
    with pytest.raises(QuarantineError, match="its correlation with 3 others is -"):
        judged(opposed, hostile["flipped labels"])


def test_one_label_in_more_of_the_texts_than_allowed_alone_is_a_reason(settings, honest):
    with pytest.raises(
        QuarantineError, match=r"quarantined: it finds one label in \d\d\.\d% of the texts; 30\.0% are allowed; look"
    ):
        judged(gate_for(settings, max_share=0.3), honest["north"])


def test_a_client_that_comes_again_is_no_copy_of_itself(settings, honest):
    gate = gate_for(settings)
    gate.accepted(judged(gate, honest["north"]), honest["north"], pool_of(PROBE))
    assert judged(gate, dataclasses.replace(honest["north"], client_round=1)).figures["auc"] > 0.5


def test_a_gate_opens_with_so_many_of_the_originals_texts_and_all_public_ones(settings):
    config = Config.model_validate(settings | {"gate": {"enabled": True, "texts": 50}})
    public = PROBE.take(range(20))
    gate = Gate.open(config, pool_of(PROBE), public)
    assert gate.fixed == PROBE.take([*range(50), *range(20)])
    assert gate.count == 70
    with pytest.raises(ConfigError, match=r"gate: all texts to probe with have one label; raise selection\.pool"):
        Gate.open(config, pool_of(public), public)
    assert Gate.open(Config.model_validate(settings), pool_of(PROBE), public) is None


def test_no_more_texts_of_the_last_pool_are_probed_with_than_the_gate_has(settings, honest):
    gate = gate_for(settings, texts=10)
    gate.accepted(judged(gate, honest["north"]), honest["north"], pool_of(PROBE))
    assert gate.latest == PROBE.take(range(10))


def test_what_a_gate_remembers_is_there_after_a_stop(settings, honest):
    gate, again = gate_for(settings), gate_for(settings)
    for name in ("north", "south"):
        gate.accepted(judged(gate, honest[name]), honest[name], pool_of(PROBE))
    restore_gate(again, gate_bytes(gate))
    assert again.latest == PROBE
    assert list(again.references) == ["north", "south"]
    assert all(torch.equal(value, gate.references[name]) for name, value in again.references.items())


def test_a_small_probe_refuses_only_what_is_plainly_bad(settings, honest, hostile):
    gate = gate_for(settings, min_texts=1)
    small = Gate(gate.config, gate.fixed.take([*range(30, 36), *range(44, 50)]))
    for upload in honest.values():
        judged(small, upload)
    with pytest.raises(QuarantineError):
        judged(small, hostile["flipped labels"])


def test_an_slm_that_breaks_on_a_text_is_an_upload_that_is_refused(settings, honest, monkeypatch):
    slm = SLM.from_state(honest["north"].slm, honest["north"].slm.labels)
    monkeypatch.setattr(slm, "predict_proba", lambda texts, *_: torch.full((len(texts), 2), float("nan")))
    with pytest.raises(UploadError, match="not finite"):
        gate_for(settings).judge(slm, honest["north"])

    def breaks(texts, *_):
        raise IndexError("index out of range")

    monkeypatch.setattr(slm, "predict_proba", breaks)
    with pytest.raises(UploadError, match="cannot classify: IndexError"):
        gate_for(settings).judge(slm, honest["north"])
    with pytest.raises(UploadError, match="cannot classify: IndexError"):  # on the server's test rows, before the gate
        measure_slm(None, "standalone", "north", slm, Examples(["a film"], [0]), 0)

    class PanicException(BaseException):
        """As the tokenizers' Rust library raises it."""

    def panics(texts, *_):
        raise PanicException("range end index 9 out of range")

    monkeypatch.setattr(slm, "predict_proba", panics)
    with pytest.raises(UploadError, match="cannot classify: PanicException"):
        gate_for(settings).judge(slm, honest["north"])


@pytest.mark.parametrize("min_texts", [1, 10_000])
def test_one_that_knows_one_label_cannot_judge(settings, honest, min_texts):
    gate = gate_for(settings, min_texts=min_texts)
    single = dataclasses.replace(honest["north"], class_counts=(0, 60))
    with pytest.raises(QuarantineError, match="all its rows are 'good', so that its SLM cannot tell") as stopped:
        judged(gate, single)
    assert stopped.value.figures == {"texts": 320.0}
    judged(gate, dataclasses.replace(single, class_counts=(1, 59)))
    judged(gate, dataclasses.replace(single, class_counts=(0, 0)))  # hidden
    judged(gate, dataclasses.replace(single, metrics={"dp/count_epsilon": 0.5}))  # noisy: it may have rows of both


def test_an_upload_is_probed_once(settings, honest, hostile, monkeypatch):
    gate, probed = gate_for(settings), []
    real = SLM.predict_proba
    monkeypatch.setattr(SLM, "predict_proba", lambda slm, texts, *_: probed.append(len(texts)) or real(slm, texts))
    slms = {
        name: SLM.from_state(upload.slm, ("bad", "good"))
        for name, upload in (("good", honest["north"]), ("bad", hostile["constant"]))
    }
    assert gate.lets_in(slms["good"], honest["north"])
    assert gate.judge(slms["good"], honest["north"]).figures["auc"] > 0.5
    assert not gate.lets_in(slms["bad"], hostile["constant"])
    with pytest.raises(QuarantineError):
        gate.judge(slms["bad"], hostile["constant"])
    assert len(probed) == 2
    assert gate.judge(slms["good"], honest["north"]).figures["auc"] > 0.5  # nothing is kept of what was judged
    assert gate.lets_in(slms["good"], honest["north"])
    with pytest.raises(QuarantineError):
        gate.judge(slms["bad"], hostile["constant"])
    assert len(probed) == 5


def test_with_too_few_texts_nobody_is_refused(settings, hostile):
    gate = gate_for(settings, min_texts=10_000)
    verdict = judged(gate, hostile["flipped labels"])
    assert set(verdict.figures) == {"texts"}
    assert verdict.predictions.shape == (len(gate.fixed), 2)
