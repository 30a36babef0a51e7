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
    """Resample seeds with replacement and, in each seed drawn, rows with replacement.

    Args:
        seeds: for each seed its groups. Rows of a group are drawn together (the same test rows under two methods:
            a paired difference), those of different groups independently. Every seed has the same columns.
        seed: of the drawing.
        replicates: how many.

    Returns:
        Means of the columns of all groups, one after the other.
    """
    generator = np.random.default_rng(seed)
    point = np.mean([_means(groups) for groups in seeds], axis=0)
    draws = np.zeros((replicates, len(point)))
    for _ in seeds:
        drawn = generator.integers(len(seeds), size=replicates)
        for number, groups in enumerate(seeds):
            places = np.flatnonzero(drawn == number)
            draws[places] += np.concatenate([_resampled(group, len(places), generator) for group in groups], axis=1)
    return Means(point, draws / len(seeds), len(seeds))


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


def _means(groups: Sequence[Group]) -> Array:
    return np.concatenate([group.mean(axis=1) for group in groups])


def _resampled(group: Group, count: int, generator: np.random.Generator) -> Array:
    """Means of rows drawn with replacement, ``(count, columns)``."""
    rows = group.shape[1]
    parts = [np.zeros((0, len(group)))]
    for start in range(0, count, CHUNK):
        places = generator.integers(rows, size=(min(CHUNK, count - start), rows))
        parts.append(group[:, places].mean(axis=2).T)
    return np.concatenate(parts)
