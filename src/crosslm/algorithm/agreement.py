"""How well a classifier's opinion goes with known labels, and with that of others.

Ours: what the gate and the clients' acceptance decide by.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

MOST_COUNTED = 2**20
"""Combinations of how many changes of each size are gains, up to which all are counted."""
DRAWN = 2**16
"""Combinations that are drawn where there are more."""


def label_auc(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Area under the ROC curve of each label against the rest, averaged, with its standard error.

    The probability that a text of label y gets a higher ``S(y|x)`` than a text of another label; a
    tie counts half. 0.5 is chance, whatever the classifier's bias to one label and however the labels
    are mixed: a constant classifier has exactly 0.5. The standard error of each label's area A is
    that of Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982::

        SE^2 = (A (1-A) + (n-1) (A/(2-A) - A^2) + (m-1) (2A^2/(1+A) - A^2)) / (n m)

    with n texts of the label and m others; the mean of the labels' errors is given, which is exact
    where the areas go together (two labels) and too large otherwise.

    Args:
        probabilities: ``(texts, labels)``, ``S(.|x)``.
        labels: ``(texts,)``.

    Returns:
        Area and standard error.

    Raises:
        ValueError: all texts have one label.
    """
    areas, errors = [], []
    for label in range(probabilities.shape[1]):
        own = labels == label
        n, m = int(own.sum()), int((~own).sum())
        if n and m:
            area = (float(_ranks(probabilities[:, label].double())[own].sum()) - n * (n + 1) / 2) / (n * m)
            spread = (n - 1) * (area / (2 - area) - area**2) + (m - 1) * (2 * area**2 / (1 + area) - area**2)
            areas.append(area)
            errors.append(math.sqrt(max(area * (1 - area) + spread, 0) / (n * m)))
    if not areas:
        raise ValueError("all texts have one label")
    return sum(areas) / len(areas), sum(errors) / len(errors)


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two classifiers' probabilities over texts, all labels together.

    Args:
        one: ``(texts, labels)``.
        other: as ``one``.

    Returns:
        In [-1, 1]; 0 where one of the two is constant.
    """
    centred = [(values.double() - values.double().mean(dim=0)).flatten() for values in (one, other)]
    length = centred[0].norm() * centred[1].norm()
    return float((centred[0] @ centred[1]) / length) if float(length) > 1e-12 else 0.0


def upper_correlation(value: float, texts: int, confidence: float) -> float:
    """One-sided upper bound of a correlation over so many texts (Fisher's z): ``tanh(atanh r + z / sqrt(n - 3))``."""
    if texts <= 3:
        return 1.0
    bounded = min(max(value, -0.999999), 0.999999)
    return math.tanh(math.atanh(bounded) + normal_quantile(confidence) / math.sqrt(texts - 3))


def sign_test(changes: Tensor) -> float:
    """Probability that chance alone would lose so much or more, one-sided (Fisher's test with random signs, 1935).

    Of two classifiers of equal accuracy either is right as often, in the mean, where they differ: each change could as
    well have had the other sign. Changes of one size are alike, so that it matters only how many of each size are
    gains: where there are up to ``MOST_COUNTED`` combinations of such numbers all are counted, above that
    ``DRAWN`` are drawn (a standard error below 0.002). With one size it is the exact test of McNemar 1947.

    Args:
        changes: ``(rows,)``, what each row gains (above 0) or loses (below 0) by the second classifier; 0: nothing.

    Returns:
        In [0, 1]; 1 if nothing is lost.
    """
    changed = changes[changes != 0].double()
    sizes, counts = torch.unique(changed.abs(), return_counts=True)
    by_chance, likely = torch.zeros(1).double(), torch.ones(1).double()
    if math.prod(count + 1 for count in counts.tolist()) <= MOST_COUNTED:
        for size, count in zip(sizes, counts.tolist(), strict=True):
            gains = torch.arange(count + 1).double()
            by_chance = (by_chance[:, None] + size * (2 * gains - count)).flatten()
            likely = (likely[:, None] * _fair_binomial(count)).flatten()
    else:
        generator, halves = torch.Generator().manual_seed(0), torch.full((DRAWN,), 0.5).double()
        for size, count in zip(sizes, counts.tolist(), strict=True):
            gains = torch.binomial(torch.full_like(halves, count), halves, generator)
            by_chance = by_chance + size * (2 * gains - count)
        likely = torch.full_like(halves, 1 / DRAWN)
    return min(1.0, float(likely[by_chance <= changed.sum() + 1e-9].sum()))


def _fair_binomial(count: int) -> Tensor:
    """How likely 0, 1, ..., ``count`` heads of as many tosses are, ``(count + 1,)``."""
    heads = torch.arange(count + 1).double()
    ways = math.lgamma(count + 1) - torch.lgamma(heads + 1) - torch.lgamma(count - heads + 1)
    return (ways - count * math.log(2)).exp()


def balancing_weights(labels: Tensor) -> Tensor:
    """Weights of rows by which each label counts alike: ``rows / (labels there are * rows of the row's label)``.

    Args:
        labels: ``(rows,)``.

    Returns:
        ``(rows,)``, 1 in the mean; the weighted accuracy is the mean of the labels' accuracies.
    """
    counts = torch.bincount(labels)
    return len(labels) / (int((counts > 0).sum()) * counts[labels].double())


def normal_quantile(confidence: float) -> float:
    """The z with ``P(Z <= z) = confidence`` for a standard normal Z."""
    return NormalDist().inv_cdf(confidence)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value from 1; equal ones share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks
