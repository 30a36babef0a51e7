"""How well a classifier's opinion goes with known labels, and with that of others.

Ours: what the gate and the clients' acceptance decide by.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor


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


def sign_test(lost: int, gained: int) -> float:
    """Probability that chance alone would lose so many rows or more, one-sided (the exact test of McNemar 1947).

    Of the rows on which two classifiers of equal accuracy differ, either is right on as many, in the mean: the number
    that the second loses is binomial with 1/2.

    Args:
        lost: rows that only the first classifier is right on.
        gained: rows that only the second is right on.

    Returns:
        In (0, 1]; 1 if nothing is lost.
    """
    differ = lost + gained
    return float(sum(math.comb(differ, number) for number in range(lost, differ + 1)) / 2**differ)


def normal_quantile(confidence: float) -> float:
    """The z with ``P(Z <= z) = confidence`` for a standard normal Z."""
    return NormalDist().inv_cdf(confidence)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value from 1; equal ones share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks
