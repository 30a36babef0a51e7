"""Intervals: a bootstrap over seeds and, within a seed, over test rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Group = Array
"""``(columns, rows)``: figures of the same rows, which are drawn together."""

REPLICATES = 2000
LEVEL = 0.95
CHUNK = 200


@dataclass(frozen=True)
class Means:
    """Mean of each column over rows and seeds, and the same in each replicate."""

    point: Array
    """``(columns,)``."""
    draws: Array
    """``(replicates, columns)``."""
    seeds: int

    def statistic(self, function: Callable[[Array], Array]) -> "Means":
        """A function of the columns, given as ``(..., columns)``, as the only column."""
        return Means(function(self.point)[..., None], function(self.draws)[..., None], self.seeds)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of seeds behind it."""

    value: float
    low: float
    high: float
    seeds: int


def bootstrap(seeds: Sequence[Sequence[Group]], seed: int = 0, replicates: int = REPLICATES) -> Means:
    """Resample seeds with replacement, and rows with replacement.

    Args:
        seeds: for each seed its groups. Rows of a group are drawn together (the same test rows under two methods:
            a paired difference), those of different groups independently. Every seed has the same groups; since test
            rows are the same for every seed, the same places are drawn in each, and more seeds make no more rows.
        seed: of the drawing.
        replicates: how many.

    Returns:
        Means of the columns of all groups, one after the other.
    """
    generator = np.random.default_rng(seed)
    count = len(seeds)
    shares = generator.multinomial(count, [1 / count] * count, size=replicates) / count
    point = np.mean([np.concatenate([group.mean(axis=1) for group in groups]) for groups in seeds], axis=0)
    draws = [_resampled(same, shares, generator) for same in zip(*seeds, strict=True)]
    return Means(point, np.concatenate(draws, axis=1), count)


def average(parts: Sequence[Means]) -> Means:
    """The mean of several figures, tasks say, which are not themselves resampled."""
    return Means(
        np.mean([part.point for part in parts], axis=0),
        np.mean([part.draws for part in parts], axis=0),
        min(part.seeds for part in parts),
    )


def worst(parts: Sequence[Means], of: Callable[..., Array]) -> Means:
    """The least (``np.min``) or largest (``np.max``) of several figures, in each replicate anew."""
    return Means(
        of([part.point for part in parts], axis=0),
        of([part.draws for part in parts], axis=0),
        min(part.seeds for part in parts),
    )


def estimate(means: Means, column: int = 0) -> Estimate:
    """A column's mean and the 2.5 and 97.5 % points of its replicates."""
    draws = means.draws[:, column]
    there = draws[np.isfinite(draws)]  # a ratio of few rows may have nothing below the line
    low, high = np.quantile(there, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(there) else (np.nan, np.nan)
    return Estimate(float(means.point[column]), float(low), float(high), means.seeds)


def _resampled(groups: Sequence[Group], shares: Array, generator: np.random.Generator) -> Array:
    """Means of rows drawn with replacement, ``(replicates, columns)``.

    Args:
        groups: the same group of each seed.
        shares: ``(replicates, seeds)``, how much each seed counts.
        generator: draws the rows.
    """
    result = np.zeros((len(shares), len(groups[0])))
    for start in range(0, len(shares), CHUNK):
        part = shares[start : start + CHUNK]
        places = np.zeros((0, 0), dtype=int)
        for number, group in enumerate(groups):
            if places.shape[1] != group.shape[1]:  # the first, or texts of which another seed has fewer
                places = generator.integers(group.shape[1], size=(len(part), group.shape[1]))
            result[start : start + CHUNK] += part[:, [number]] * group[:, places].mean(axis=2).T
    return result
