"""The classifier on tiny models of several architectures."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import BAD, GOOD, TINY_SIZES, sentences
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    MPNetConfig,
    RobertaConfig,
)

from crosslm.client import Client
from crosslm.config import FitConfig
from crosslm.data.examples import Examples
from crosslm.errors import ModelError, UploadError
from crosslm.models.architecture import MODEL_TYPES, check_architecture, longest_text, on_meta, output_layer
from crosslm.models.batches import batches as row_batches
from crosslm.models.batches import hold_out
from crosslm.models.dtypes import fast_dtype
from crosslm.models.pretrained import _NothingDrawn
from crosslm.models.slm import SLM

LABELS = ("bad", "good")
EXAMPLES = Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40)
FIT = FitConfig(epochs=8, batch_size=8, learning_rate=3e-3)


@pytest.fixture(params=["bert", "distilbert", "gpt2"])
def slm(models, request):
    return SLM.load(str(models / request.param), LABELS, 32, seed=0)


def test_training_teaches_and_follows_the_seed(slm, models):
    before = slm.accuracy(EXAMPLES)
    rows = []
    metrics = slm.fit(EXAMPLES, FIT, 1, rows.append)
    assert slm.accuracy(EXAMPLES) > max(before, 0.9)
    assert metrics["epochs"] == 8
    assert sum(rows) == 8 * 80
    again = SLM.load(slm.model.config._name_or_path, LABELS, 32, seed=0)
    again.fit(EXAMPLES, FIT, 1)
    torch.testing.assert_close(again.predict_proba(EXAMPLES.texts), slm.predict_proba(EXAMPLES.texts))


def test_training_in_bfloat16_teaches_as_well_and_leaves_weights_in_float32(slm, models, monkeypatch):
    monkeypatch.setattr("crosslm.models.dtypes.fast_dtype", lambda device: torch.bfloat16)
    exact = SLM.load(slm.model.config._name_or_path, LABELS, 32, seed=0)
    exact.fit(EXAMPLES, FIT, 1)
    given = []
    hook = output_layer(slm.model).register_forward_hook(lambda _, inputs, output: given.append(output.dtype))
    slm.fit(EXAMPLES, FIT.model_copy(update={"dtype": "auto"}), 1)
    assert set(given) == {torch.bfloat16}
    assert {value.dtype for value in slm.model.parameters()} == {torch.float32}
    given.clear()
    assert slm.accuracy(EXAMPLES) > 0.9
    assert set(given) == {torch.float32}  # what it says of texts
    hook.remove()
    apart = (slm.predict_proba(EXAMPLES.texts) - exact.predict_proba(EXAMPLES.texts)).abs()
    assert apart.max() > 0
    assert apart.mean() < 0.1


def classifier(kind, tokenizer, folder, **more):
    """A tiny classifier's folder, of a type that the other tests have none of."""
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **TINY_SIZES, **more)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SLM.load(str(folder), LABELS, 32, seed=0)


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "mpnet", "modernbert", "llama"])
def test_other_types_can_be_trained_where_the_processor_has_bfloat16(kind, models, tmp_path, monkeypatch):
    monkeypatch.setattr("crosslm.models.dtypes.fast_dtype", lambda device: torch.bfloat16)
    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]} if kind.startswith("deberta") else {}
    more |= {"eos_token_id": 2, "bos_token_id": 1} if kind in ("modernbert", "llama") else {}
    more |= {"cls_token_id": 3, "sep_token_id": 4} if kind == "modernbert" else {}
    slm, given = classifier(kind, AutoTokenizer.from_pretrained(models / "bert"), tmp_path, **more), []
    output_layer(slm.model).register_forward_hook(lambda _, inputs, output: given.append(output.dtype))
    slm.fit(EXAMPLES.take(range(30, 50)), FIT.model_copy(update={"dtype": "auto", "epochs": 1}), 1)
    assert set(given) == {torch.float32 if kind == "deberta" else torch.bfloat16}


def test_a_text_of_which_nothing_would_be_left_is_refused(models):
    with pytest.raises(ModelError, match=r"adds 2 tokens to each text, which is cut at 2: raise slm\.max_length"):
        SLM.load(str(models / "bert"), LABELS, 2, seed=0)


def test_a_causal_classifier_needs_a_token_to_pad_with(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    tokenizer.pad_token = tokenizer.eos_token = None
    AutoModelForSequenceClassification.from_pretrained(models / "gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no token to pad with, and none that ends a text; set pad_token"):
        SLM.load(str(tmp_path), LABELS, 32, seed=0)


def test_a_text_without_a_token_can_be_classified_alone(models):
    slm = SLM.load(str(models / "gpt2"), LABELS, 32, seed=0)
    assert slm.encode([""]) == [[]]
    alone, beside = slm.predict_proba([""]), slm.predict_proba(["", "a good day"])
    assert alone.shape == (1, 2)
    assert bool(alone.isfinite().all())
    assert bool(beside.isfinite().all())


@pytest.mark.parametrize("name", ["float32", "auto"])
def test_training_is_in_float32_unless_told_and_where_the_processor_has_no_other(models, monkeypatch, name):
    fast = torch.bfloat16 if name == "float32" else torch.float32
    monkeypatch.setattr("crosslm.models.dtypes.fast_dtype", lambda device: fast)
    slm, given = SLM.load(str(models / "bert"), LABELS, 32, seed=0), []
    output_layer(slm.model).register_forward_hook(lambda _, inputs, output: given.append(output.dtype))
    slm.fit(EXAMPLES, FIT.model_copy(update={"dtype": name, "epochs": 1}), 1)
    assert set(given) == {torch.float32}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1), 512),
        (MPNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1), 510),
        (BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 512),
    ],
)
def test_a_text_has_at_most_as_many_tokens_as_the_model_has_positions(config, positions):
    """Those of RoBERTa and MPNet begin behind the one of the padding."""
    if config.model_type == "roberta":
        config.max_position_embeddings = 514
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert longest_text(model, 9) == positions
    model(torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, positions + 1), 5))


def test_the_learning_rate_rises_and_falls_as_told(models):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    fit = FitConfig(epochs=2, batch_size=4, warmup_fraction=0.5, learning_rate=1.0, weight_decay=0.3)
    optimizer, schedule = slm.optimizer(fit, 7)  # two batches an epoch, the second of three rows
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_training_follows_the_schedule_and_clips_the_gradient(models, monkeypatch):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    stepped, norms = [], []
    made = slm.optimizer

    def before(optimizer, *_):
        gradients = [parameter.grad for parameter in slm.model.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        stepped.append(optimizer.param_groups[0]["lr"])

    def watched(config, rows):
        optimizer, schedule = made(config, rows)
        optimizer.register_step_pre_hook(before)
        return optimizer, schedule

    monkeypatch.setattr(slm, "optimizer", watched)
    with torch.no_grad():  # so that the gradient is larger than is let through
        slm.model.classifier.weight.mul_(100)
    slm.fit(
        EXAMPLES.take(range(0, 80, 10)), FitConfig(epochs=2, batch_size=4, warmup_fraction=0.5, learning_rate=1e-3), 0
    )
    assert stepped == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    assert norms[0] == pytest.approx(1.0, abs=1e-3)


def test_every_row_comes_once_among_rows_of_like_length():
    rows = [[0] * (1 + (7 * place) % 29) for place in range(203)]
    batches = row_batches(rows, 8, torch.Generator().manual_seed(0))
    assert sorted(row for batch in batches for row in batch) == list(range(203))
    assert max(map(len, batches)) == 8
    padding = sum(max(len(rows[row]) for row in batch) * len(batch) for batch in batches) / sum(map(len, rows))
    assert padding < 1.3  # 1.8 in random order
    assert batches != row_batches(rows, 8, torch.Generator().manual_seed(1))


def test_weights_can_be_moved_back_by_hand(slm):
    before = slm.to_state().weights
    slm.fit(EXAMPLES, FitConfig(epochs=1, learning_rate=1e-2), seed=0)
    after = slm.to_state().weights
    slm.interpolate(before, 0.25)
    for name, weight in slm.to_state().weights.items():
        expected = 0.25 * after[name] + 0.75 * before[name] if weight.is_floating_point() else after[name]
        torch.testing.assert_close(weight, expected)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_probabilities_do_not_depend_on_the_batch(slm):
    texts = ["a good film.", "a bad day and a cold room and a poor book.", "x"]
    together = slm.predict_proba(texts)
    torch.testing.assert_close(together.sum(1), torch.ones(3))
    alone = torch.cat([slm.predict_proba([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def pads_otherwise(slm):
    """Whether probabilities depend on the batch."""
    texts = ["a good film.", "a bad day and a cold room and a poor book.", "x"]
    alone = torch.cat([slm.predict_proba([text]) for text in texts])
    return not torch.allclose(slm.predict_proba(texts), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize(("pad_id", "expected"), [(5, 5), (-1, 1), (None, 1)], ids=["known", "unknown", "none"])
def test_a_causal_classifier_and_its_tokenizer_pad_alike(models, tmp_path, family, pad_id, expected):
    """The tokenizer has no padding token, and the configuration has one, or an id that no token has."""
    folder = tmp_path / "other"
    shutil.copytree(models / family, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"pad_token_id": pad_id}))
    slm = SLM.load(str(folder), LABELS, 32, 0)
    slm.save(str(tmp_path / "saved"))
    state = slm.to_state()
    for each in (slm, SLM.from_state(state, state.labels), SLM.load_trained(str(tmp_path / "saved"))):
        assert (each.model.config.pad_token_id, each.tokenizer.pad_token_id) == (expected, expected)
        assert not pads_otherwise(each)
    # and one that was sent away, or kept, with two of them
    torn = dataclasses.replace(state, architecture=state.architecture | {"pad_token_id": 7})
    described = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps(described | {"pad_token_id": 7}))
    for again in (SLM.from_state(torn, torn.labels), SLM.load_trained(str(tmp_path / "saved"))):
        assert not pads_otherwise(again)
        again.model.config.pad_token_id = 7
        assert pads_otherwise(again)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_causal_classifiers_are_known_by_their_head(model_type):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, num_hidden_layers=1))
    assert hasattr(model, "score") == (model_type in {"gemma3_text", "gpt2", "llama", "qwen2", "qwen3"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_has_an_output_layer_that_can_be_made_new(model_type):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, num_labels=7, vocab_size=20, pad_token_id=0)
    slm = SLM(AutoModelForSequenceClassification.from_config(config), None, [f"label {n}" for n in range(7)], 8)
    before = {name: value.clone() for name, value in slm.model.state_dict().items()}
    slm.new_head(0)
    changed = [name for name, value in slm.model.state_dict().items() if not value.equal(before[name])]
    assert changed[0].endswith(("classifier.weight", "out_proj.weight", "score.weight"))
    assert {before[name].shape[0] for name in changed} == {7}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "gemma3"])
def test_a_new_head_tells_nothing_and_leaves_the_rest_as_it_is(models, kind):
    slm = SLM.load(str(models / kind), LABELS, 32, 0)
    slm.fit(EXAMPLES.take(range(40)), FitConfig(epochs=3, batch_size=8, learning_rate=3e-3), 0)  # all of one label
    assert slm.predict_proba(EXAMPLES.texts)[:, 0].min() > 0.6
    before = {name: value.clone() for name, value in slm.model.state_dict().items()}
    slm.new_head(3)
    changed = [name for name, value in slm.model.state_dict().items() if not value.equal(before[name])]
    assert all(value.shape[0] == len(LABELS) for name, value in before.items() if name in changed)
    assert 1 <= len(changed) <= 2  # weight and, where there is one, bias
    assert (slm.predict_proba(EXAMPLES.texts) - 0.5).abs().max() < 0.1
    again = SLM.load(str(models / kind), LABELS, 32, 9)
    again.new_head(3)
    assert again.model.state_dict()[changed[0]].equal(slm.model.state_dict()[changed[0]])


def test_patience_takes_the_best_epoch_back(slm):
    contradictory = Examples(EXAMPLES.texts, [0, 1] * 40)
    metrics = slm.fit(contradictory, FitConfig(epochs=30, learning_rate=1e-2, patience=1, holdout_fraction=0.25), 0)
    assert metrics["epochs"] < 30
    held = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:20].tolist()
    assert slm.accuracy(contradictory.take(held)) == pytest.approx(metrics["holdout_accuracy"])


def test_the_state_is_the_same_classifier(slm):
    slm.fit(EXAMPLES, FitConfig(epochs=1), 1)
    before = torch.get_rng_state()
    again = SLM.from_state(slm.to_state(), slm.labels)
    assert torch.equal(torch.get_rng_state(), before)  # no weights are drawn that are overwritten
    assert again.labels == LABELS
    assert again.max_length == slm.max_length
    torch.testing.assert_close(again.predict_proba(EXAMPLES.texts), slm.predict_proba(EXAMPLES.texts))
    # and can be trained on like the original
    torch.testing.assert_close(
        torch.tensor(list(again.fit(EXAMPLES, FIT, 2).values())), torch.tensor(list(slm.fit(EXAMPLES, FIT, 2).values()))
    )


def test_the_saved_folder_loads_with_transformers(slm, tmp_path):
    slm.fit(EXAMPLES, FitConfig(epochs=1), 1)
    slm.save(str(tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    tokens = AutoTokenizer.from_pretrained(tmp_path)(["a good film."], return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(**tokens).logits.softmax(1)
    torch.testing.assert_close(slm.predict_proba(["a good film."]), expected, atol=1e-5, rtol=1e-5)
    assert SLM.load_trained(str(tmp_path)).max_length == slm.max_length


def test_layers_can_be_left_out_and_embeddings_frozen(models):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0, num_hidden_layers=1, freeze_embeddings=True)
    table = slm.model.get_input_embeddings().weight.clone()
    slm.fit(EXAMPLES, FitConfig(epochs=1), 1)
    assert slm.model.config.num_hidden_layers == 1
    assert torch.equal(slm.model.get_input_embeddings().weight, table)
    with pytest.raises(ModelError, match="has 2 hidden layers; num_hidden_layers = 5"):
        SLM.load(str(models / "bert"), LABELS, 32, 0, num_hidden_layers=5)


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text"])
def test_what_has_fewer_layers_travels_where_a_configuration_names_each(models, tmp_path, model_type):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    more = {} if model_type == "modernbert" else {"num_key_value_heads": 1, "head_dim": 8}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes, **more, **ids)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    slm = SLM.load(str(tmp_path), LABELS, 32, seed=0, num_hidden_layers=2)
    state = slm.to_state()
    check_architecture(state.architecture)
    assert on_meta(state.architecture, 2).config.num_hidden_layers == 2
    again = SLM.from_state(state, slm.labels)
    torch.testing.assert_close(again.predict_proba(GOOD), slm.predict_proba(GOOD))
    slm.save(str(tmp_path / "saved"))


def test_training_does_not_disturb_the_random_state_of_others(models):
    slm = SLM.load(str(models / "bert"), LABELS, 32, 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    slm.fit(EXAMPLES, FitConfig(epochs=1), 1)
    assert torch.equal(torch.rand(3), expected)


def broken(state, **changes):
    return dataclasses.replace(state, **changes)


def test_a_state_that_cannot_be_is_refused(models):
    state = SLM.load(str(models / "bert"), LABELS, 32, 0).to_state()
    cases = {
        "cannot be rebuilt": broken(state, architecture={**state.architecture, "model_type": "no such"}),
        "auto_map": broken(state, architecture={**state.architecture, "auto_map": {"AutoModel": "evil.py"}}),
        "Missing key": broken(state, weights=dict(list(state.weights.items())[1:])),
        "size mismatch": broken(state, weights={name: value[:1] for name, value in state.weights.items()}),
        "one for each of": broken(state, labels=("a", "b", "c")),
        "cannot be rebuilt; use": broken(state, tokenizer={**state.tokenizer, "tokenizer.json": "{}"}),
    }
    for message, bad in cases.items():
        with pytest.raises(UploadError, match=message):
            SLM.from_state(bad, bad.labels)


def test_a_folder_that_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a sequence classifier"):
        SLM.load(str(tmp_path), LABELS, 32, 0)


def test_a_classifier_of_the_tasks_labels_keeps_what_each_output_means(models, tmp_path, caplog):
    one = SLM.load(str(models / "bert"), ("good", "Bad"), 32, 0)
    one.save(str(tmp_path))
    other = SLM.load(str(tmp_path), ("bad", "good"), 32, 1)
    assert other.labels == ("bad", "good")
    assert other.to_state().labels == ("good", "bad")
    assert other.by_output((10, 30)) == (30, 10)
    torch.testing.assert_close(other.predict_proba(["a good film"])[:, [1, 0]], one.predict_proba(["a good film"]))
    assert not caplog.records
    # and a silo's counts go by the same order
    three = Examples(["a bad film", "a good film", "a fine film"], [0, 1, 1])
    upload = Client("north", three, other, FitConfig(epochs=1), 0).train()
    assert dict(zip(upload.slm.labels, upload.class_counts, strict=True)) == {"bad": 1, "good": 2}
    SLM.load(str(tmp_path), ("cold", "warm"), 32, 1)
    assert "calls its labels ['good', 'Bad'], which are taken for ['cold', 'warm'], in this order" in caplog.text


def test_a_new_head_follows_the_seed_and_a_body_that_does_not_fit_is_refused(models, tmp_path):
    three = SLM.load(str(models / "bert"), ("a", "b", "c"), 32, 0)
    three.save(str(tmp_path))
    one, again, other = (SLM.load(str(tmp_path), LABELS, 32, seed).model for seed in (1, 1, 2))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(one.state_dict()[query], three.model.state_dict()[query])
    kept = SLM.load(str(tmp_path), ("a", "b", "c"), 32, 1).model
    assert torch.equal(kept.classifier.weight, three.model.classifier.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"bert\.\S+ is not as its config.json says"):
        SLM.load(str(tmp_path), LABELS, 32, 0)


def test_one_row_at_least_is_trained_on():
    trained, held = hold_out(4, 0.9, torch.Generator().manual_seed(0))
    assert (len(trained), len(held)) == (1, 3)


def test_the_loss_on_held_out_rows_is_of_what_is_learned_by_hand(models, monkeypatch):
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    monkeypatch.setattr(slm, "predict_proba", lambda texts: torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
    rows = Examples(["a", "b"], [0, 1])
    loss, accuracy = slm._holdout(rows, None)  # (ln 2 - ln .8) / 2
    assert (loss, accuracy) == (pytest.approx(0.458145), 1.0)
    loss, accuracy = slm._holdout(rows, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))  # (ln 2 - ln .2) / 2
    assert (loss, accuracy) == (pytest.approx(1.151293), 1.0)


def test_a_trained_classifier_keeps_no_gradients(models):
    """They are as large as it is, and a run or a server holds it for long."""
    slm = SLM.load(str(models / "bert"), ("bad", "good"), 32, 0)
    slm.fit(Examples(sentences(BAD, 4) + sentences(GOOD, 4), [0] * 4 + [1] * 4), FitConfig(epochs=1, batch_size=4), 0)
    assert all(parameter.grad is None for parameter in slm.model.parameters())


def test_a_gpu_that_only_imitates_bfloat16_does_not_multiply_in_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert fast_dtype("cuda") == torch.float32


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_travelled_classifier_draws_no_values_for_comes_with_its_weights(model_type):
    """Nothing is drawn, and all that is then there, non-persistent buffers too, is as in a model that was drawn."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, num_labels=2, vocab_size=20, pad_token_id=0)
    drawn = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    before = torch.get_rng_state()
    with _NothingDrawn():
        empty = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    empty.load_state_dict(drawn.state_dict(), strict=True)
    one, other = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (drawn, empty))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
