"""Adapters in the upper layers alone: what is shared below them changes nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llm
from peft import PeftModel
from pydantic import ValidationError
from test_llm import FAMILIES, TEXTS, disturb, plain_logps
from transformers import AutoModelForCausalLM

from crosslm.config import LLMConfig
from crosslm.models.causal import decoder_layers, lora_config
from crosslm.models.llm import LLM
from crosslm.models.lower_layers import UpperLayers


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def upper(models, family):
    llm = tiny_llm(models, family, adapted_layers=0.5)
    disturb(llm)
    return llm


def calls_of(llm, place):
    """A list that grows with each call of a layer."""
    calls = []
    decoder_layers(llm.model.get_base_model())[1][place].register_forward_hook(lambda *_: calls.append(place))
    return calls


@pytest.mark.parametrize(("share", "adapted"), [(1.0, {0, 1}), (0.51, {0, 1}), (0.5, {1}), (0.01, {1})])
def test_the_adapter_is_in_as_many_of_the_upper_layers_as_are_wanted(models, family, share, adapted):
    llm = tiny_llm(models, family, adapted_layers=share)
    names = [name for name, value in llm.model.named_parameters() if value.requires_grad]
    path, _ = decoder_layers(llm.model.get_base_model())
    assert {int(name.split(f"{path}.")[1].split(".")[0]) for name in names} == adapted
    assert UpperLayers(llm.model.get_base_model()).below == 2 - len(adapted)


def test_scores_are_those_of_the_plain_models(models, family, upper):
    original = AutoModelForCausalLM.from_pretrained(models / family).eval()
    sequences = [upper.encode(text) for text in TEXTS]
    scores = upper.score(sequences)
    for row, ids in enumerate(sequences):
        with torch.no_grad():
            now, before = plain_logps(upper.model, ids), plain_logps(original, ids)
        width = len(ids) - 1
        torch.testing.assert_close(scores.logps[row, :width], now, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores.reference_logps[row, :width], before, atol=1e-4, rtol=1e-4)
        assert scores.kl[row, :width].min() > 0


def test_the_layers_below_are_run_once_and_the_adapted_ones_twice(upper):
    lower, higher = calls_of(upper, 0), calls_of(upper, 1)
    upper.score([upper.encode(text) for text in TEXTS])
    assert (len(lower), len(higher)) == (1, 2)


def test_gradients_are_those_of_a_reference_that_is_read_whole(upper, monkeypatch):
    def gradients():
        scores = upper.score([upper.encode(text) for text in TEXTS])
        (scores.logps.sum() + scores.kl.sum()).backward()
        found = [parameter.grad.clone() for parameter in upper.trainable_parameters()]
        upper.model.zero_grad()
        return found

    shared = gradients()
    read_whole = calls_of(upper, 0)
    begin = UpperLayers.__init__

    def shares_nothing(layers, causal):
        begin(layers, causal)
        layers.below = 0

    monkeypatch.setattr(UpperLayers, "__init__", shares_nothing)
    torch.testing.assert_close(shared, gradients(), atol=1e-6, rtol=1e-5)
    assert len(read_whole) == 2


def test_before_the_first_update_it_is_the_original(models, family):
    llm = tiny_llm(models, family, adapted_layers=0.5)
    scores = llm.score([llm.encode(text) for text in TEXTS])
    assert (scores.logps - scores.reference_logps).abs().max() < 1e-6
    assert scores.kl.abs().max() < 1e-6


def test_a_saved_adapter_of_the_upper_layers_loads_with_peft_and_here(models, family, upper, tmp_path):
    upper.save(str(tmp_path))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / family), tmp_path).eval()
    ids = upper.encode(TEXTS[0])
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(loaded, ids), plain_logps(upper.model, ids))
    again = LLM.load_trained(str(models / family), str(tmp_path), upper.config)
    assert again.fingerprint() == upper.fingerprint()


def test_full_fine_tuning_has_no_lower_layers():
    with pytest.raises(
        ValidationError, match=r'llm\.adapter = "full" trains all layers; found llm\.adapted_layers = 0\.5'
    ):
        LLMConfig(model="gemma3", adapter="full", adapted_layers=0.5)


def test_a_share_that_floats_make_a_little_larger_is_no_layer_more():
    layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(25))
    model = torch.nn.ModuleDict({"layers": layers})
    model.config = SimpleNamespace(num_hidden_layers=25, model_type="mine")
    assert 0.28 * 25 > 7
    excluded = lora_config(model, LLMConfig(model="mine", adapted_layers=0.28)).exclude_modules
    assert [place for place in range(25) if not re.fullmatch(excluded, f"layers.{place}.0")] == list(range(18, 25))
