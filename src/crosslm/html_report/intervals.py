"""How far a measured share may be from the truth, from the test rows that it was measured on."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
BATCH = 50
"""Resamples that are in memory at a time: of IMDb's rows all would be a gigabyte."""

Interval = tuple[float, float]


def binomial_interval(share: float, rows: int) -> Interval:
    """Wilson's 95 % interval of a share of ``rows`` independent rows.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    interval = stats.binomtest(round(share * rows), rows).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def paired_gain_interval(
    before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]], test_sets: Sequence[int]
) -> Interval:
    """95 % percentile bootstrap interval of the mean, over clients, of the gain in accuracy.

    Rows are drawn again, each with what both classifiers made of it: a row that both get right says
    nothing about a gain. Clients that are tested on the same rows get the same draw.

    Args:
        before: for each client which of its test rows the first classifier got right.
        after: the same of the second one.
        test_sets: clients with the same number here have the same rows.

    Returns:
        The interval of ``mean over clients of (accuracy after - accuracy before)``.
    """
    clients = len(test_sets)
    change = [np.asarray(new, float) - np.asarray(old, float) for old, new in zip(before, after, strict=True)]
    groups = {
        number: np.sum([row for row, test_set in zip(change, test_sets, strict=True) if test_set == number], axis=0)
        for number in dict.fromkeys(test_sets)
    }

    def gain(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(sum(sample.mean(axis=axis) for sample in samples)) / clients

    found = stats.bootstrap(
        tuple(groups.values()),
        gain,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
