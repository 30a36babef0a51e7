"""Temperature, top-k and nucleus sampling; the step that a GPU records against the plain one."""

import numpy as np
import pytest
import torch
from conftest import tiny_llm
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from crosslm.config import SynthesisConfig
from crosslm.models import decoding
from crosslm.models.decoding import BELOW_ONE, decode, sample_tokens
from crosslm.models.graph_decoding import can_be_recorded, decode_recorded

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def drawn(uniforms, **sampling):
    rows, how = torch.tensor(uniforms), SynthesisConfig(**{"top_p": 1.0} | sampling)
    logits, tokens = torch.topk(LOGITS.expand(len(rows), 4), min(how.top_k, 4))
    return sample_tokens(logits, tokens, rows, how).tolist()


def test_the_cumulative_distribution_is_inverted():
    assert drawn([0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 0.999]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_top_k_leaves_the_k_most_likely_and_renormalises():
    assert drawn([0.66, 0.68, 0.999], top_k=2) == [0, 1, 1]  # 2/3 and 1/3


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    assert set(drawn([i / 100 for i in range(100)], top_p=0.7)) == {0, 1}
    assert set(drawn([i / 100 for i in range(100)], top_p=0.01)) == {0}


def test_temperature_by_hand():
    # with T = 1/2 the probabilities are squared: .25 .0625 .0225 .01 of .345
    assert drawn([0.72, 0.73], temperature=0.5) == [0, 1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.floats(0.01, 1))
def test_nothing_outside_the_nucleus_is_ever_drawn(seed, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(5, 50, generator=generator), torch.rand(5, generator=generator)
    uniforms[0], uniforms[1] = 0.0, BELOW_ONE
    top, tokens = torch.topk(logits, top_k)
    drawn = sample_tokens(top, tokens, uniforms, SynthesisConfig(top_k=top_k, top_p=top_p))
    likelier = logits > logits.gather(1, drawn.unsqueeze(1))
    mass = (logits.exp() * likelier).sum(dim=1) / top.exp().sum(dim=1)  # of those of the top k that come before it
    assert (mass < top_p + 1e-5).all()


def test_a_random_number_that_float32_would_round_up_to_1_stays_below_it(models, monkeypatch):
    class Highest:
        def random(self, count):
            return np.full(count, np.nextafter(1.0, 0.0))

    llm, sampling = tiny_llm(models, "gpt2"), SynthesisConfig(max_new_tokens=3)
    monkeypatch.setattr(decoding.np.random, "default_rng", lambda seed: Highest())
    causal = llm.model.get_base_model()
    read = decoding.read_prompts(causal.base_model, causal.config, PROMPTS[:1], [0], sampling, torch.device("cpu"))
    assert (read.uniforms == BELOW_ONE).all()
    assert (read.uniforms < 1).all()


PROMPTS = [(3, 4, 5, 6, 7, 8, 9), (10, 11), (3, 4, 5, 6, 7, 8, 9), (12,), (10, 11), (13, 14, 15)] * 2


def written(how, llm, prompts, seeds, sampling, has_ended):
    """Tokens, and how many were counted at each step."""
    steps: list[int] = []
    causal = llm.model.get_base_model()
    parts = causal.base_model, causal.get_output_embeddings().weight, causal.config
    return how(*parts, prompts, seeds, sampling, has_ended, steps.append), steps


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_the_recorded_step_writes_what_the_plain_one_writes(models, family, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    llm, longest = tiny_llm(models, family), 9 if family == "gemma3" else 21  # its window is 16
    llm.model.to(device)
    seeds, sampling = range(100, 100 + len(PROMPTS)), SynthesisConfig(max_new_tokens=longest)
    plain = written(decode, llm, PROMPTS, seeds, sampling, lambda tokens: tokens[-1] % 8 == 0)
    assert len(set(map(len, plain[0]))) > 3  # rows end early, and not together
    assert written(decode_recorded, llm, PROMPTS, seeds, sampling, lambda tokens: tokens[-1] % 8 == 0) == plain
    # nothing ends: all of the room is used
    plain = written(decode, llm, PROMPTS[:3], seeds[:3], sampling, lambda _: False)
    assert written(decode_recorded, llm, PROMPTS[:3], seeds[:3], sampling, lambda _: False) == plain
    assert [len(text) for text in plain[0]] == [longest] * 3


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_texts_of_one_token_or_few_are_recorded_too(models, tokens):
    llm, sampling = tiny_llm(models, "gemma3"), SynthesisConfig(max_new_tokens=tokens)
    for ended in (lambda _: False, lambda _: True):
        plain = written(decode, llm, PROMPTS, range(len(PROMPTS)), sampling, ended)
        assert written(decode_recorded, llm, PROMPTS, range(len(PROMPTS)), sampling, ended) == plain


def test_which_models_a_graph_can_replay(models):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def config(family, **changes):
        found = AutoConfig.from_pretrained(models / family, attn_implementation="sdpa")
        for name, value in changes.items():
            setattr(found, name, value)
        return found

    gpt2, gemma, llama = config("gpt2"), config("gemma3"), config("llama")
    assert can_be_recorded(gpt2, gpu, gpt2.n_positions)
    assert can_be_recorded(llama, gpu, 100)
    assert can_be_recorded(gemma, gpu, gemma.sliding_window - 8)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    # a row that has ended would count beyond the last position
    assert not can_be_recorded(gpt2, gpu, gpt2.n_positions + 1)
    # beyond the window a layer would have to forget
    assert not can_be_recorded(gemma, gpu, gemma.sliding_window)
    assert not can_be_recorded(config("gpt2", model_type="mixtral"), gpu, 10)
    assert not can_be_recorded(config("llama", rope_parameters=rope), gpu, 10)
    assert not can_be_recorded(config("gpt2", _attn_implementation="flash_attention_2"), gpu, 10)
    nested = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    assert not can_be_recorded(config("gemma3", rope_parameters=nested), gpu, 8)
    assert not can_be_recorded(gpt2, cpu, 10)
