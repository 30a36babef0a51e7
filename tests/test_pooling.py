"""A classification head that reads the mean of the tokens, and travels as an ordinary BERT."""

import json

import pytest
import torch
from conftest import BAD, GOOD, sentences
from torch.nn.functional import layer_norm
from transformers import AutoModelForSequenceClassification

from crosslm.config import Config, FitConfig, SLMSpec
from crosslm.data.examples import Examples
from crosslm.errors import ModelError
from crosslm.federation.intake import Intake
from crosslm.federation.messages import encode
from crosslm.models.pretrained import check_spec
from crosslm.models.slm import SLM
from crosslm.records import Upload
from crosslm.runs.finished import run
from crosslm.runs.preparation import client_specs, describe_spec

LABELS = ("bad", "good")
TEXTS = ["a good film.", "bad", "the day was good and the film was bad and that was all of it."]


def load(models, pooling="mean", **options):
    return SLM.load(str(models / "bert"), LABELS, 32, 0, pooling=pooling, **options)


def test_the_head_reads_the_mean_of_each_texts_own_tokens(models):
    plain, pooled = load(models, None), load(models)
    eps = plain.model.config.layer_norm_eps
    for text, row in zip(TEXTS, pooled.encode(TEXTS), strict=True):
        with torch.no_grad():
            (tokens,) = plain.model.bert(torch.tensor([row])).last_hidden_state
        expected = 10 * tokens.mean(dim=0) + tokens[0]
        for _ in range(2):
            expected = layer_norm(expected, expected.shape, eps=eps)
        with torch.no_grad():  # in one batch: what pads a short text must not count
            found = pooled.model.bert(**pooled._pad(pooled.encode(TEXTS))).pooler_output[TEXTS.index(text)]
        torch.testing.assert_close(found, torch.tanh(0.1 * expected), atol=1e-5, rtol=0)


def test_it_travels_and_is_kept_as_an_ordinary_bert(models, task, config, tmp_path):
    slm = load(models, num_hidden_layers=1)
    assert slm.model.config.num_hidden_layers == 2
    slm.fit(Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40), FitConfig(epochs=1), 0)
    expected = slm.predict_proba(TEXTS)
    received = Intake(task.labels, config.intake).upload(
        encode(Upload("north", 0, (40, 40), {}, slm.to_state())), "north"
    )
    torch.testing.assert_close(SLM.from_state(received.slm, received.slm.labels).predict_proba(TEXTS), expected)
    slm.save(str(tmp_path))
    torch.testing.assert_close(SLM.load_trained(str(tmp_path)).predict_proba(TEXTS), expected)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_all_of_it_is_trained_by_the_same_seed_in_the_same_way(models):
    examples = Examples(sentences(BAD) + sentences(GOOD), [0] * 40 + [1] * 40)
    first, second = load(models), load(models)
    before = {name: value.clone() for name, value in first.model.named_parameters()}
    for slm in (first, second):
        slm.fit(examples, FitConfig(epochs=4, learning_rate=1e-3), 0)
    assert first.accuracy(examples) > 0.9
    after = dict(first.model.named_parameters())
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert not {name for name in still if "layer.2" in name}
    for name, value in second.model.named_parameters():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_other_families_are_refused(models, family):
    folder = str(models / family)
    with pytest.raises(ModelError, match=rf"client a: pooling = 'mean' needs a model of the type bert, not {family}"):
        check_spec(folder, SLMSpec(model=folder, pooling="mean"), "client a")
    with pytest.raises(ModelError, match="pooling = 'mean' needs a BERT classifier, not "):
        SLM.load(folder, LABELS, 32, 0, pooling="mean")


def test_a_client_has_it_by_its_own_model_or_by_slm_models(settings):
    for spec in settings["slm"]["models"]:
        spec["pooling"] = "mean"
    del settings["data"]["train"]
    settings["clients"] = [
        {"id": "own", "train": "a.csv", "model": "BERT", "pooling": "mean"},
        {"id": "plain", "train": "b.csv", "model": "BERT"},
        {"id": "drawn", "train": "c.csv"},
    ]
    specs = client_specs(Config.model_validate(settings), ["own", "plain", "drawn"])
    assert {client: spec.pooling for client, spec in specs.items()} == {"own": "mean", "plain": None, "drawn": "mean"}
    assert describe_spec(specs["own"]) == "BERT, mean of its tokens"


def test_a_run_trains_such_classifiers_for_clients_and_judge(settings, models, tmp_path, monkeypatch):
    """Through the real commands, with the architecture that each upload says it has."""
    settings["slm"]["models"] = [{"model": str(models / "bert"), "num_hidden_layers": 1, "pooling": "mean"}]
    summary = run(Config.model_validate(settings), tmp_path / "run").summary
    assert {client["model"]["pooling"] for client in summary["clients"].values()} == {"mean"}
    for name in summary["clients"]:
        kept = json.loads((tmp_path / "run" / "slm" / name / "config.json").read_text())
        assert kept["num_hidden_layers"] == 2
