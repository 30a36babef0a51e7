"""Eq. 1 by hand."""

import torch

from crosslm.algorithm.verbalizer import label_probabilities


def test_eq_1_by_hand():
    # P(V(y)|M(x)) of 0.03 and 0.01: 3/4 and 1/4; of 0.2, 0.2, the same with any constant
    logps = torch.tensor([[0.03, 0.01], [0.2, 0.2]]).log()
    expected = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    torch.testing.assert_close(label_probabilities(logps), expected)
    torch.testing.assert_close(label_probabilities(logps + 7), expected)
