"""DP-SGD on tiny classifiers of several families, against the definition and against Opacus's own accountant."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BAD, GOOD, TINY_SIZES, sentences
from opacus.accountants import RDPAccountant
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from crosslm.client import Client
from crosslm.config import FitConfig, PrivacyConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, ModelError
from crosslm.models.architecture import ENCODERS, MODEL_TYPES
from crosslm.models.slm import SLM
from crosslm.privacy import accounting, private_layers, private_mean
from crosslm.privacy.accounting import Mechanism, plan
from crosslm.privacy.private_fit import PrivateTraining, discrete_laplace, dp_sgd
from crosslm.privacy.private_layers import frozen_below
from crosslm.privacy.private_mean import _read_by_head, centred, noisy_mean
from crosslm.privacy.private_noise import fresh_generator

LABELS = ("bad", "good")
FIT = FitConfig(epochs=2, batch_size=20, learning_rate=1e-3)
EXAMPLES = Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40)
CAUSAL = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MORE = {
    "albert": {"embedding_size": 16},  # its layers share their weights
    "camembert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "gemma3_text": {**CAUSAL, "head_dim": 8},
    "llama": CAUSAL,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 1},
    "mpnet": {},
    "qwen2": CAUSAL,
    "qwen3": {**CAUSAL, "head_dim": 8},
    "roberta": {},
    "xlm-roberta": {},
}
FAMILIES = ["bert", "distilbert", "gpt2", *MORE]


def test_every_type_of_model_is_tried():
    assert sorted(FAMILIES) == sorted(MODEL_TYPES)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    made = {name: models / name for name in ("bert", "distilbert", "gpt2")}
    torch.manual_seed(0)
    for name, more in MORE.items():
        made[name] = tmp_path_factory.mktemp(name)
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **TINY_SIZES, **more)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def load(folders, name, frozen=True):
    return SLM.load(str(folders[name]), LABELS, 32, seed=0, freeze_embeddings=frozen)


def weights(slm):
    return {name: parameter.detach().clone() for name, parameter in slm.model.named_parameters()}


def secret(seed=0):
    return random.Random(seed)


def plain_sgd(slm):
    """Steps of length 1 along the gradient, and no schedule."""
    slm.optimizer = lambda *_: (
        torch.optim.SGD([p for p in slm.model.parameters() if p.requires_grad], lr=1.0),
        SimpleNamespace(step=lambda: None),
    )


def without_dropout(slm):
    for module in slm.model.modules():
        for name in ("p", "dropout", "attention_dropout", "attn_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize(
    ("family", "frozen"),
    [(family, frozen) for family in FAMILIES for frozen in (True, False)],
)
def test_one_step_is_clipped_gradients_by_definition(folders, family, frozen):
    """Without noise and with plain SGD: the mean of each row's gradient, clipped to a norm of ``clip``."""
    slm, clip, rows = load(folders, family, frozen), 0.05, EXAMPLES.take(range(30, 50))
    without_dropout(slm)
    before, expected = weights(slm), {}
    encoded = slm.encode(rows.texts)
    for row, label in zip(encoded, rows.labels, strict=True):  # each alone, through plain autograd
        slm.model.zero_grad()
        slm.losses([row], [label]).sum().backward()
        gradient = {name: p.grad.clone() for name, p in slm.model.named_parameters() if p.grad is not None}
        norm = torch.cat([value.flatten() for value in gradient.values()]).norm()
        for name, value in gradient.items():
            expected[name] = expected.get(name, 0) + value * min(1.0, clip / float(norm)) / len(rows)
    assert ("embed" in " ".join(expected)) or frozen or family == "gpt2"
    plain_sgd(slm)
    slm.model.zero_grad()
    dp_sgd(slm, rows, FitConfig(), Mechanism(0.0, 1.0, 1), clip, secret(), lambda _: None)
    for name, value in weights(slm).items():
        torch.testing.assert_close(before[name] - value, expected.get(name, torch.zeros_like(value)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_trained_and_left_clean(folders, family):
    slm = load(folders, family)
    before, table = weights(slm), slm.model.get_input_embeddings().weight.clone()
    seen = []
    metrics = PrivateTraining(PrivacyConfig(epsilon=8), 1, secret()).fit(slm, EXAMPLES, FIT, 0, seen.append)
    changed = [name for name, value in weights(slm).items() if not torch.equal(value, before[name])]
    trained = [name for name, parameter in slm.model.named_parameters() if parameter.requires_grad]
    assert changed == trained
    assert torch.equal(slm.model.get_input_embeddings().weight, table)
    assert all(not hasattr(parameter, "grad_sample") for parameter in slm.model.parameters())
    assert metrics["dp/steps"] == len(seen) == 8
    assert len(set(seen)) > 1  # Poisson sampling: batches of different size
    again = SLM.from_state(slm.to_state(), slm.labels)
    torch.testing.assert_close(again.predict_proba(EXAMPLES.texts), slm.predict_proba(EXAMPLES.texts))


def test_a_centred_head_is_trained_by_the_definition(folders):
    """One step without noise: each row's gradient with the mean taken off what the last layer reads, clipped."""
    slm, clip, rows = load(folders, "bert"), 0.05, EXAMPLES.take(range(30, 50))
    without_dropout(slm)
    with torch.no_grad():
        read = torch.cat([slm.model.bert(torch.tensor([row])).pooler_output for row in slm.encode(rows.texts)])
        names = torch.cat([slm.model.bert(torch.tensor([row])).pooler_output for row in slm.encode(LABELS)])
        radius = names.norm(dim=1).max()
        clipped = torch.stack([vector * min(1.0, float(radius / vector.norm())) for vector in read])
        mean, linear = clipped.mean(dim=0), slm.model.classifier
        wrong = (read @ linear.weight.T + linear.bias).softmax(dim=1)
    wrong[range(20), rows.labels] -= 1.0  # the loss by the outputs
    gradients = torch.einsum("ro,rd->rod", wrong, read - mean)
    norms = (gradients.flatten(1).square().sum(dim=1) + wrong.square().sum(dim=1)).sqrt()
    share = (clip / norms).clamp(max=1)
    weight = linear.weight - torch.einsum("r,rod->od", share, gradients) / 20
    bias = linear.bias + linear.weight @ mean - (share @ wrong) / 20 - weight @ mean
    plain_sgd(slm)
    found = noisy_mean(slm, slm.encode(rows.texts), 0.0, np.random.default_rng(0))
    torch.testing.assert_close(found, mean, atol=1e-6, rtol=0)
    with frozen_below(slm, 0), centred(slm, found):
        dp_sgd(slm, rows, FitConfig(), Mechanism(0.0, 1.0, 1), clip, secret(), lambda _: None)
    torch.testing.assert_close(linear.weight, weight, atol=2e-6, rtol=0)
    torch.testing.assert_close(linear.bias, bias, atol=2e-6, rtol=0)
    assert not linear._forward_pre_hooks


def test_the_mean_is_of_clipped_vectors(folders, monkeypatch):
    read = iter([[[3.0, 4.0], [0.6, 0.8]], [[6.0, 8.0], [0.0, 1.0], [0.0, -10.0]]])
    monkeypatch.setattr(private_mean, "_read_by_head", lambda *_: torch.tensor(next(read)))
    found = noisy_mean(load(folders, "bert"), [[1]] * 3, 0.0, np.random.default_rng(0))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]))  # of (3, 4), (0, 1) and (0, -5): none is longer than 5


def test_the_mean_has_noise_of_the_size_that_is_accounted(folders):
    slm = load(folders, "bert")
    rows = slm.encode(EXAMPLES.texts[35:45])
    exact = noisy_mean(slm, rows, 0.0, np.random.default_rng(0))
    noisy = torch.stack([noisy_mean(slm, rows, 3.0, np.random.default_rng(n)) for n in range(64)])
    radius = _read_by_head(slm, slm.encode(LABELS)).norm(dim=1).max()
    assert float((noisy - exact).std()) == pytest.approx(3.0 * float(radius) / 10, rel=0.05)


def test_centring_alone_changes_no_answer(folders):
    for family in ("bert", "distilbert", "roberta"):
        slm = load(folders, family)
        before = slm.predict_proba(EXAMPLES.texts)
        mean = noisy_mean(slm, slm.encode(EXAMPLES.texts), 1.0, np.random.default_rng(0))
        with centred(slm, mean):
            torch.testing.assert_close(slm.predict_proba(EXAMPLES.texts), before, atol=1e-5, rtol=0)
        torch.testing.assert_close(slm.predict_proba(EXAMPLES.texts), before, atol=1e-5, rtol=0)


def test_the_mean_is_within_the_budget(folders):
    privacy, fit = PrivacyConfig(epsilon=3, center=True, trained_layers=0), FitConfig(epochs=3, batch_size=16)
    training, slm = PrivateTraining(privacy, 2, secret()), load(folders, "bert")
    before = weights(slm)
    for upload in (1, 2):
        told = training.fit(slm, EXAMPLES, fit, upload, lambda _: None)
        accountant = RDPAccountant()
        for _ in range(15 * upload):
            accountant.step(noise_multiplier=told["dp/noise_multiplier"], sample_rate=told["dp/sample_rate"])
        for _ in range(upload):  # of all rows
            accountant.step(noise_multiplier=told["dp/noise_multiplier"], sample_rate=1.0)
        assert told["dp/epsilon"] == pytest.approx(accountant.get_epsilon(1e-5))
    assert 2.98 < told["dp/epsilon"] <= 3
    plain = plan(80, fit, privacy.model_copy(update={"center": False}), 2)
    assert told["dp/noise_multiplier"] > plain.noise_multiplier
    changed = {name for name, value in weights(slm).items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_without_bias_cannot_be_centred(folders, family):
    privacy = PrivacyConfig(epsilon=8, center=True)
    with pytest.raises(ModelError, match=r"privacy\.center needs a head with a bias"):
        PrivateTraining(privacy, 1, secret()).fit(load(folders, family), EXAMPLES, FIT, 0, lambda _: None)


def test_epsilon_is_that_of_opacuss_own_accountant(folders):
    privacy, fit = PrivacyConfig(epsilon=3), FitConfig(epochs=3, batch_size=16)
    training = PrivateTraining(privacy, 2, secret())
    slm = load(folders, "bert")
    for upload in (1, 2):
        told = training.fit(slm, EXAMPLES, fit, upload, lambda _: None)
        accountant = RDPAccountant()
        for _ in range(int(told["dp/steps"]) * upload):  # as Opacus counts, one step after the other
            accountant.step(noise_multiplier=told["dp/noise_multiplier"], sample_rate=told["dp/sample_rate"])
        assert told["dp/epsilon"] == pytest.approx(accountant.get_epsilon(1e-5))
        assert told["dp/steps"] == 15
    assert 2.98 < told["dp/epsilon"] <= 3  # both uploads together use the budget, and no more
    with pytest.raises(ConfigError, match=r"set for 2 upload\(s\) and is spent"):
        training.fit(slm, EXAMPLES, fit, 3, lambda _: None)


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(80, 16, 3), (50, 64, 5)])
def test_the_noise_is_enough_and_not_much_more(rows, batch, epochs):
    for epsilon in (0.3, 3.0):
        privacy = PrivacyConfig(epsilon=epsilon)
        mechanism = plan(rows, FitConfig(epochs=epochs, batch_size=batch), privacy, 1)
        assert epsilon - 0.011 <= mechanism.epsilon(privacy.delta) <= epsilon
    with pytest.raises(ConfigError, match=r"cannot be kept: .* no noise brings that below 0\.1"):
        plan(50, FitConfig(epochs=5, batch_size=64), PrivacyConfig(epsilon=1e-9), 1)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "albert"])
def test_there_is_no_dropout_under_dp(folders, family):
    """Without noise nothing is left to chance, whatever PyTorch's generator would draw."""
    found = []
    for seed in (1, 2):
        slm = load(folders, family)
        torch.manual_seed(seed)
        dp_sgd(slm, EXAMPLES.take(range(30, 50)), FIT, Mechanism(0.0, 1.0, 2), 1.0, secret(), lambda _: None)
        assert not slm.model.training
        found.append(weights(slm))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_noise_is_of_the_right_size_even_for_an_empty_batch(folders):
    slm = load(folders, "bert")
    plain_sgd(slm)
    before = weights(slm)
    seen = []
    dp_sgd(slm, EXAMPLES, FitConfig(), Mechanism(2.0, 1e-9, 1), 0.5, secret(), seen.append)
    assert seen == [0]
    moved = [before[name] - value for name, value in weights(slm).items() if not torch.equal(before[name], value)]
    noise = torch.cat([value.flatten() for value in moved]) * (1e-9 * len(EXAMPLES))  # over the expected batch's size
    assert float(noise.std()) == pytest.approx(2.0 * 0.5, rel=0.02)


def test_the_noise_does_not_come_from_the_runs_seed(folders):
    """Two clients that are alike in all that the server knows end with different weights."""
    results = []
    for _ in range(2):
        training = PrivateTraining(PrivacyConfig(epsilon=8), 1)
        client = Client("a", EXAMPLES, load(folders, "bert"), FIT, seed=7, privacy=training)
        results.append(client.train().slm.weights)
    assert not torch.equal(results[0]["classifier.weight"], results[1]["classifier.weight"])


class Fixed(random.Random):
    """A secret that is known: no row is drawn, and keys are those given, cut to the bits that are asked for."""

    def __init__(self, *keys):
        super().__init__(0)
        self.keys, self.asked = list(keys), []

    def random(self):
        return 1.0

    def getrandbits(self, bits):
        self.asked.append(bits)
        return self.keys.pop(0) % 2**bits


def moved_by(folders, given, steps=1):
    """How far the noise alone moves the weights."""
    slm = load(folders, "bert")
    plain_sgd(slm)
    before = torch.cat([value.flatten() for value in weights(slm).values()])
    dp_sgd(slm, EXAMPLES, FitConfig(), Mechanism(2.0, 0.5, steps), 0.5, given, lambda _: None)
    return torch.cat([value.flatten() for value in weights(slm).values()]) - before


@pytest.mark.parametrize("other", [2**32, 2**62, 2**64, 2**127])
def test_every_bit_of_a_key_of_128_counts(folders, other):
    """PyTorch's own generator heeds the lowest 32 on the CPU, few enough to try them all."""
    key = 0x1234567
    assert torch.equal(moved_by(folders, Fixed(key)), moved_by(folders, Fixed(key)))
    assert not torch.equal(moved_by(folders, Fixed(key)), moved_by(folders, Fixed(key + other)))
    slm = load(folders, "bert")
    means = [
        noisy_mean(slm, slm.encode(EXAMPLES.texts), 1.0, fresh_generator(Fixed(given)))
        for given in (key, key, key + other)
    ]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_each_step_and_each_mean_has_a_key_of_its_own(folders):
    keys = Fixed(1, 2, 3)
    three = moved_by(folders, keys, steps=3)
    assert keys.asked == [128] * 3
    assert not keys.keys
    one_by_one = sum(moved_by(folders, Fixed(key)) for key in (1, 2, 3))
    torch.testing.assert_close(three, one_by_one)
    centring = Fixed(*range(100))
    privacy = PrivacyConfig(epsilon=8, center=True, trained_layers=0)
    PrivateTraining(privacy, 1, centring).fit(load(folders, "bert"), EXAMPLES, FIT, 0, lambda _: None)
    assert centring.asked == [128] * (1 + 8)  # the mean, and eight steps


def test_the_secret_is_the_operating_systems():
    """Coins too: each of them is drawn from its entropy, by no generator with a seed."""
    assert isinstance(PrivateTraining(PrivacyConfig(epsilon=8), 1)._secret, random.SystemRandom)


def test_a_private_upload_tells_no_loss_and_no_count(folders):
    fit = FIT.model_copy(update={"patience": 2})
    for how, check in (("hidden", lambda counts: counts == (0, 0)), ("exact", lambda counts: counts == (40, 40))):
        training = PrivateTraining(PrivacyConfig(epsilon=8, class_counts=how), 1)
        upload = Client("a", EXAMPLES, load(folders, "bert"), fit, seed=0, privacy=training).train()
        assert check(upload.class_counts)
        assert set(upload.metrics) == {
            "epochs",
            "dp/clip",
            "dp/count_epsilon",
            "dp/delta",
            "dp/epsilon",
            "dp/means",
            "dp/noise_multiplier",
            "dp/sample_rate",
            "dp/steps",
        }


def test_noisy_counts_cost_their_part_once_and_are_drawn_once(folders):
    privacy = PrivacyConfig(epsilon=4, class_counts="noisy", count_epsilon=1.0)
    training = PrivateTraining(privacy, 2)
    first = training.class_counts((500, 30))
    assert training.class_counts((500, 30)) == first
    assert min(first) >= 0
    told = training.fit(load(folders, "bert"), EXAMPLES, FitConfig(epochs=3), 0, lambda _: None)
    mechanism = plan(80, FitConfig(epochs=3), privacy, 2)
    assert told["dp/epsilon"] == pytest.approx(mechanism.epsilon(1e-5, 1) + 1.0)
    assert 2.98 < mechanism.epsilon(1e-5, 2) <= 3


def test_discrete_laplace_by_its_definition():
    drawn = torch.tensor(discrete_laplace(100_000, 0.7, secret()))
    ratio = torch.tensor(-0.7).exp()
    for k in (-2, -1, 0, 1, 2):  # P(k) = (1 - a) / (1 + a) a^|k|
        expected = (1 - ratio) / (1 + ratio) * ratio ** abs(k)
        assert float((drawn == k).double().mean()) == pytest.approx(float(expected), rel=0.03)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "roberta"])
def test_only_the_highest_layers_can_be_trained(folders, family):
    slm = load(folders, family)
    trained = {name for name, parameter in slm.model.named_parameters() if parameter.requires_grad}
    with frozen_below(slm, 1):
        inside = {name for name, parameter in slm.model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in slm.model.named_parameters() if parameter.requires_grad} == trained
    assert inside < trained
    assert any(private_layers.LAYER.search(name) and ".1." in name for name in inside)
    assert not any(".0." in name or "embed" in name or "wpe" in name for name in inside)
    with frozen_below(slm, 0):
        head = {name for name, parameter in slm.model.named_parameters() if parameter.requires_grad}
    body = slm.model.base_model_prefix
    assert head == {name for name in trained if not name.startswith(f"{body}.")}


def amplifying(slm):
    """Weights that make much of rounding: twice a feed-forward half takes away its own input, and a norm follows."""
    torch.manual_seed(1)
    width, inner = slm.model.config.hidden_size, slm.model.config.intermediate_size
    state = slm.model.state_dict()
    for layer in (0, 1):
        turn, into, out = (
            torch.linalg.qr(torch.randn(width, width))[0],
            torch.zeros(inner, width),
            torch.zeros(width, inner),
        )
        bias = torch.zeros(inner)
        into[:width], bias[:width], out[:, :width] = turn, 20.0, -turn.T
        name = f"bert.encoder.layer.{layer}."
        state |= {
            f"{name}intermediate.dense.weight": into,
            f"{name}intermediate.dense.bias": bias,
            f"{name}output.dense.weight": out,
            f"{name}output.dense.bias": turn.T @ torch.full((width,), 20.0),
        }
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        state[name] = torch.randn_like(state[name]) * 5
    slm.model.load_state_dict(state)


def neighbours():
    """Rows, and the same with a long one more."""
    rows = EXAMPLES.take(range(10, 70))
    return rows, Examples([*rows.texts, " ".join([GOOD[0]] * 30)], [*rows.labels, 0])


@pytest.mark.parametrize("family", sorted(ENCODERS - {"albert"}))
def test_a_body_that_is_not_trained_reads_each_row_once(folders, family, monkeypatch):
    def head_after(kept):
        monkeypatch.setattr(private_layers, "MAX_KEPT", kept)
        slm, read = load(folders, family), []
        slm.model.get_input_embeddings().register_forward_hook(lambda *_: read.append(1))
        with frozen_below(slm, 0):
            dp_sgd(slm, EXAMPLES, FIT, Mechanism(1.0, 0.5, 4), 1.0, secret(), lambda _: None)
        assert "forward" not in vars(slm.model.base_model)  # the model is as it was
        return weights(slm), len(read)

    (once, reads), (again_and_again, all_reads) = head_after(2**31), head_after(0)
    assert reads <= len(EXAMPLES) < all_reads
    for name, value in again_and_again.items():
        assert torch.equal(once[name], value), name


@pytest.mark.parametrize(("family", "layers"), [("bert", 1), ("bert", None), ("gpt2", 0)])
def test_a_body_that_is_trained_or_that_writes_reads_rows_in_each_step(folders, family, layers):
    slm, read = load(folders, family), []
    slm.model.get_input_embeddings().register_forward_hook(lambda *_: read.append(1))
    with frozen_below(slm, layers):
        dp_sgd(slm, EXAMPLES, FIT, Mechanism(1.0, 1.0, 2), 1.0, secret(), lambda _: None)
    assert len(read) == 2 * len(EXAMPLES)


def test_one_row_more_moves_the_sum_by_its_clipped_gradient_alone(folders):
    """Whatever the weights: those that come back may be such that rows beside others have other gradients."""
    moved = []
    for rows in neighbours():
        slm = load(folders, "bert")
        amplifying(slm)
        before = weights(slm)
        plain_sgd(slm)
        with frozen_below(slm, 0):
            dp_sgd(slm, rows, FitConfig(), Mechanism(0.0, 1.0, 1), 1.0, secret(), lambda _: None)
        after = weights(slm)
        moved.append(torch.cat([(after[name] - before[name]).flatten() for name in before]) * len(rows))
    assert float((moved[1] - moved[0]).norm()) <= 1.001
    assert float(moved[0].norm()) > 1


def test_one_row_more_moves_the_sum_for_the_mean_by_no_more_than_the_radius(folders):
    slm = load(folders, "bert")
    amplifying(slm)
    sums = [noisy_mean(slm, slm.encode(rows.texts), 0.0, np.random.default_rng(0)) * len(rows) for rows in neighbours()]
    assert float((sums[1] - sums[0]).norm()) <= 1.001 * float(_read_by_head(slm, slm.encode(LABELS)).norm(dim=1).max())


def test_without_opacus_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"pip install 'crosslm\[privacy\]'"):
        accounting.require_opacus()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_without_finite_gradients_counts_as_none(folders, bad):
    """As a server could have it by weights that come back: the row's token gives gradients that are not finite."""
    moved = []
    for rows in (EXAMPLES.take(range(31, 50)), EXAMPLES.take(range(30, 50))):
        slm = load(folders, "bert")
        before, odd = weights(slm), slm.encode([EXAMPLES.texts[30]])[0]
        losses = slm.losses
        slm.losses = lambda batch, labels, odd=odd, losses=losses: (
            losses(batch, labels) * torch.tensor([bad if row == odd else 1.0 for row in batch])
        )
        plain_sgd(slm)
        dp_sgd(slm, rows, FitConfig(), Mechanism(0.0, 1.0, 1), 0.05, secret(), lambda _: None)
        moved.append({name: (before[name] - value) * len(rows) for name, value in weights(slm).items()})
    assert EXAMPLES.texts.count(EXAMPLES.texts[30]) == 1
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, atol=2e-5, rtol=0)
    assert max(float(value.abs().max()) for value in moved[0].values()) > 0.01


def test_a_vector_that_is_not_finite_is_no_part_of_the_mean(folders, monkeypatch):
    rows = [[3.0, float("inf")], [float("nan"), 1.0], [3.0, 4.0], [1e30, 1e30]]
    read = iter([[[3.0, 4.0]], rows, [[float("inf"), 1.0]]])
    monkeypatch.setattr(private_mean, "_read_by_head", lambda *_: torch.tensor(next(read)))
    slm = load(folders, "bert")
    found = noisy_mean(slm, [[1]] * 4, 0.0, np.random.default_rng(0))
    torch.testing.assert_close(found, torch.tensor([3.0, 4.0]) / 4)  # too long for its norm counts as zero too
    with pytest.raises(ModelError, match="what the head reads of the label names is not finite"):
        noisy_mean(slm, [[1]] * 4, 0.0, np.random.default_rng(0))


def test_clipping_and_sampling_alone_do_not_keep_it_from_learning(folders):
    slm = load(folders, "bert", frozen=False)
    fit = FitConfig(epochs=8, batch_size=8, learning_rate=3e-3)
    dp_sgd(slm, EXAMPLES, fit, Mechanism(0.0, 0.1, 80), 1.0, secret(), lambda _: None)
    assert slm.accuracy(EXAMPLES) > 0.9
