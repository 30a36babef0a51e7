"""Temperature, top-k and nucleus sampling."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslm.config import SynthesisConfig
from crosslm.models.decoding import sample_tokens

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


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.01, 1))
def test_only_the_top_k_are_ever_drawn(seed, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(5, 50, generator=generator), torch.rand(5, generator=generator)
    how = SynthesisConfig(top_k=top_k, top_p=top_p)
    tokens = sample_tokens(*torch.topk(logits, min(top_k, 50)), uniforms, how)
    ranks = (logits > logits.gather(1, tokens.unsqueeze(1))).sum(dim=1)
    assert (ranks < top_k).all()
