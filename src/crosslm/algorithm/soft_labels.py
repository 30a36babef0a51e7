"""What step 5 learns where others judge beside the SLMs: the LLM itself, or the label a text was written for (ours).

For the intended label the model is that of Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates
Using the EM Algorithm", Applied Statistics 1979, with one error rate: the LLM writes what it was told to with
probability ``rho``, and else something that fits any of the other labels as likely as the next, whatever the SLMs make
of it.
"""

import torch
from torch import Tensor

ITERATIONS = 200
MOST = 0.99
"""No LLM is taken to be right always, however sure the SLMs are."""
LEAST = 1e-6
"""A probability that is as good as none."""
SUREST, HALVINGS = 16.0, 60
"""The largest power of a judge's probabilities, and how often its range is halved to find the right one."""
LOUDEST = 3.0
"""No judges count more than this beside another."""


def without_preference(probabilities: Tensor) -> Tensor:
    """Probabilities of texts that fit each label equally often, freed of a preference for some of the labels.

    ``p'(y|x_i) ~ p(y|x_i) / exp(mean_j log p(y|x_j))``. An LLM finds some words likely after a query whatever the text
    says; Zhao et al., "Calibrate Before Use", ICML 2021, divide by what it says of texts without content, here it is
    what it says of all of them, which it wrote for labels drawn uniformly (Eq. 2).

    Args:
        probabilities: ``(texts, classes)``.

    Returns:
        ``(texts, classes)``, rows sum to 1.
    """
    # a label of a rare word or of many tokens has next to none on every text, and still more on some than on others
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return (logs - logs.mean(dim=0)).softmax(dim=1)


def opinion_pool(one: Tensor, other: Tensor, weight: float = 1.0) -> Tensor:
    """What two judges who err on different texts make of them together: ``q(y|x) ~ p_1(y|x)^w p_2(y|x)``.

    The logarithmic opinion pool: where one of them is undecided, the other decides. Source: Genest and Zidek,
    "Combining Probability Distributions: A Critique and an Annotated Bibliography", Statistical Science 1986.

    Args:
        one: ``(texts, classes)``.
        other: as ``one``.
        weight: w, of the first beside the other.

    Returns:
        ``(texts, classes)``, rows sum to 1.
    """
    return (weight * one.clamp_min(LEAST).log() + other.clamp_min(LEAST).log()).softmax(dim=1)


def sureness(probabilities: Tensor, labels: Tensor) -> float:
    """The power b of a judge's probabilities that makes the intended labels likeliest: below 1 if surer than right.

    Maximises ``sum_i log(p(y_i|x_i)^b / sum_y p(y|x_i)^b) - (b - 1)^2 / 2``, which is concave in b. The sum is that of
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with 1 / b for the temperature; the last term is
    a prior, which leaves b at 1 where a judge is so undecided that its texts say nothing of it.

    Args:
        probabilities: ``(texts, classes)``.
        labels: ``(texts,)``, what they were written for.

    Returns:
        b, from 0 (the judge knows nothing of the labels) to :data:`SUREST`.
    """
    logs = probabilities.double().clamp_min(LEAST).log()
    intended = logs.gather(1, labels.unsqueeze(1)).sum()
    low, high = 0.0, SUREST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = intended - ((middle * logs).softmax(dim=1) * logs).sum() - (middle - 1)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return (low + high) / 2


def weight_beside(judges: Tensor, other: Tensor, labels: Tensor) -> float:
    """How much judges count beside another in :func:`opinion_pool`: ``w = min(b / b_other, 3)``, by :func:`sureness`.

    Not every text fits the label that it was written for, which makes every b too small; of judges who are right about
    as often the ratio hardly depends on it, and of others it favours who is right less often. An LLM that judges what
    it wrote itself knows better what it meant than what the text says, which favours the LLM.

    Args:
        judges: ``(texts, classes)``.
        other: as ``judges``.
        labels: ``(texts,)``, what the texts were written for.

    Returns:
        w, from 0 to :data:`LOUDEST`.
    """
    own, others = sureness(judges, labels), sureness(other, labels)
    return min(own, LOUDEST * others) / others


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
