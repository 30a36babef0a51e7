"""What step 5 learns where the label that a text was written for counts as one more judge (ours, not the paper's).

The model of Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm", Applied
Statistics 1979, with one error rate: the LLM writes what it was told to with probability ``rho``, and else something
that fits any of the other labels as likely as the next, whatever the SLMs make of it.
"""

import torch
from torch import Tensor

ITERATIONS = 200
MOST = 0.99
"""No LLM is taken to be right always, however sure the SLMs are."""


def intended_label_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share rho of the texts that fit the label they were written for, as the SLMs' judgement makes it most likely.

    Maximises ``sum_i log(rho p_i + (1 - rho) (1 - p_i) / (classes - 1))`` with ``p_i = S(y_i|x_i)``, which is concave
    in rho, by EM: rho becomes the mean of the posterior that the text fits its label. It is right as far as S is
    calibrated; SLMs that are less sure than they are right, as the mean of several is, make rho too large.

    Args:
        probabilities: ``(texts, classes)``, of the SLMs.
        labels: ``(texts,)``, the intended ones.

    Returns:
        rho, from 1 / classes (the labels say nothing) to 0.99.
    """
    classes = probabilities.shape[1]
    fits = probabilities.gather(1, labels.unsqueeze(1)).double().squeeze(1)
    if not len(fits):
        return 1 / classes
    rho = torch.tensor(0.8, dtype=torch.float64)
    for _ in range(ITERATIONS):
        right, wrong = rho * fits, (1 - rho) * (1 - fits) / (classes - 1)
        rho = (right / (right + wrong)).mean().clamp(1 / classes, MOST)
    return float(rho)


def with_intended_labels(probabilities: Tensor, labels: Tensor, accuracy: float) -> Tensor:
    """Probabilities of each label by the SLMs and by what the text was written for together.

    By Bayes' rule ``q(y|x) ~ S(y|x) P(intended|y)``, with ``P = rho`` for ``y`` the intended label and
    ``(1 - rho) / (classes - 1)`` for another.

    Args:
        probabilities: ``(texts, classes)``, of the SLMs.
        labels: ``(texts,)``, the intended ones.
        accuracy: rho, in (0, 1).

    Returns:
        ``(texts, classes)``, rows sum to 1.
    """
    others = (1 - accuracy) / (probabilities.shape[1] - 1)
    likelihoods = torch.full_like(probabilities, others).scatter(1, labels.unsqueeze(1), accuracy)
    joint = probabilities * likelihoods
    return joint / joint.sum(dim=1, keepdim=True)
