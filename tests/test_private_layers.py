"""Which classifiers can be trained under DP, found out before a run and where it is not."""

import random

import pytest
import torch
from conftest import BAD, GOOD, sentences
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from crosslm.config import FitConfig, PrivacyConfig, SLMSpec
from crosslm.data.examples import Examples
from crosslm.errors import ModelError
from crosslm.models.slm import SLM
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.runs.preparation import check_slm

EXAMPLES = Examples(sentences(BAD, 10) + sentences(GOOD, 10), [0] * 10 + [1] * 10)
MODERN = {"eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 1}
KINDS = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "mpnet": {},
    "modernbert": MODERN,
    "albert": {"embedding_size": 16},
}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    made = {"bert": models / "bert"}
    torch.manual_seed(0)
    for name, more in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        config = AutoConfig.for_model(
            name,
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            **more,
        )
        AutoModelForSequenceClassification.from_config(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def check(folders, kind, layers):
    privacy = PrivacyConfig(epsilon=8, trained_layers=layers)
    check_slm(str(folders[kind]), SLMSpec(model=kind), privacy, False, "client north")


def train(folders, kind, layers):
    slm = SLM.load(str(folders[kind]), ("bad", "good"), 32, 0)
    training = PrivateTraining(PrivacyConfig(epsilon=8, trained_layers=layers), 1, random.Random(0))
    return training.fit(slm, EXAMPLES, FitConfig(epochs=1, batch_size=20), 0, lambda _: None)


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "mpnet"])
def test_some_train_their_head_alone(folders, kind):
    check(folders, kind, 0)
    assert train(folders, kind, 0)["dp/epsilon"] <= 8
    for layers in (None, 1):
        with pytest.raises(ModelError, match=rf"client north: .* {kind} can train its head alone"):
            check(folders, kind, layers)


@pytest.mark.parametrize("layers", [None, 0])
def test_what_cannot_be_trained_is_refused_before_a_run(folders, layers):
    with pytest.raises(ModelError, match="client north: a model of the type modernbert cannot be trained with privacy"):
        check(folders, "modernbert", layers)


def test_shared_layers_cannot_be_told_apart(folders):
    check(folders, "albert", None)
    with pytest.raises(ModelError, match=r"share their weights; leave privacy\.trained_layers out"):
        check(folders, "albert", 0)


@pytest.mark.parametrize(("kind", "layers"), [("deberta", None), ("mpnet", None), ("modernbert", 0)])
def test_what_fails_in_a_step_is_an_error_of_the_model(folders, kind, layers):
    """Each of these fails in its own way inside Opacus."""
    with pytest.raises(ModelError, match=r"cannot be trained with privacy\.epsilon"):
        train(folders, kind, layers)


def test_embeddings_that_are_scaled_must_be_frozen(models):
    """Gemma's: Opacus refuses a table that has a buffer beside its weights."""
    folder, spec = str(models / "gemma3"), SLMSpec(model="gemma3")
    with pytest.raises(ModelError, match=r"client north: the word embeddings of .* gemma3_text .*freeze_embeddings"):
        check_slm(folder, spec, PrivacyConfig(epsilon=8), False, "client north")
    check_slm(folder, spec, PrivacyConfig(epsilon=8), True, "client north")
    check_slm(folder, spec, PrivacyConfig(epsilon=8, trained_layers=1), False, "client north")
    check_slm(folder, spec, PrivacyConfig(), False, "client north")


def test_without_epsilon_all_are_let_through(folders):
    for kind in folders:
        check_slm(str(folders[kind]), SLMSpec(model=kind), PrivacyConfig(), False, "client north")
