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
    check_slm(str(folders[kind]), SLMSpec(model=kind), privacy, "client north")


def train(folders, kind, layers):
    slm = SLM.load(str(folders[kind]), ("bad", "good"), 32, 0)
    training = PrivateTraining(PrivacyConfig(epsilon=8, trained_layers=layers), 1, random.Random(0))
    return training.fit(slm, EXAMPLES, FitConfig(epochs=1, batch_size=20), 0, lambda _: None)


@pytest.mark.parametrize("kind", ["bert", "deberta", "deberta-v2", "mpnet", "modernbert"])
@pytest.mark.parametrize("layers", [None, 0, 1])
def test_all_train_as_many_layers_as_is_asked(folders, kind, layers):
    check(folders, kind, layers)
    assert train(folders, kind, layers)["dp/epsilon"] <= 8


def test_shared_layers_cannot_be_told_apart(folders):
    check(folders, "albert", None)
    with pytest.raises(ModelError, match=r"share their weights; leave privacy\.trained_layers out"):
        check(folders, "albert", 0)


def test_without_epsilon_all_are_let_through(folders):
    for kind in folders:
        check_slm(str(folders[kind]), SLMSpec(model=kind), PrivacyConfig(), "client north")
