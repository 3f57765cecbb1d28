"""Means with intervals, and how they differ between outputs on the same pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1_000
CHUNK = 1 << 22  # weights in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A measure of one output.

    Attributes:
        mean: over its records that have the measure.
        n: how many have.
        difference: to the first output's, over the pictures where both have it; None for the first.
    """

    mean: Interval
    n: int
    difference: Interval | None


def estimate(columns: Sequence[Mapping[str, np.ndarray]], seed: int) -> dict[str, list[Estimate]]:
    """Means with intervals, by resampling pictures.

    Args:
        columns: for each output its measures, f64 [n], NaN where a record has none; the k-th of all
            is the same picture.
        seed: of the resampling.

    Returns:
        for each measure one estimate an output.
    """
    keys = [key for key in columns[0] if all(key in each for each in columns)]
    values = [np.stack([each[key] for key in keys], axis=1) for each in columns]
    differences = [each - values[0] for each in values[1:]]
    stacked = np.concatenate([*values, *differences], axis=1)
    means, lows, highs = _bootstrap(stacked, seed)
    counts = (~np.isnan(stacked)).sum(axis=0)
    found: dict[str, list[Estimate]] = {}
    for i, key in enumerate(keys):
        found[key] = []
        for o in range(len(columns)):
            at, other = o * len(keys) + i, (len(columns) + o - 1) * len(keys) + i
            mean = Interval(means[at], lows[at], highs[at])
            difference = Interval(means[other], lows[other], highs[other]) if o else None
            found[key].append(Estimate(mean, int(counts[at]), difference))
    return found


def _bootstrap(x: np.ndarray, seed: int) -> tuple[list[float], list[float], list[float]]:
    """Means of the columns of f64 [n, k] without their NaN, and the ends of their intervals."""
    rng = np.random.default_rng(seed)
    n = len(x)
    there = (~np.isnan(x)).astype(float)
    filled = np.nan_to_num(x)
    drawn = []
    for start in range(0, RESAMPLES, max(1, CHUNK // n)):
        size = min(max(1, CHUNK // n), RESAMPLES - start)
        draws = (rng.integers(0, n, n) for _ in range(size))
        weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(float)
        drawn.append(_ratio(weights @ filled, weights @ there))
    means = _ratio(filled.sum(axis=0), there.sum(axis=0))
    drawn = np.concatenate(drawn)
    drawn[:, np.isnan(means)] = 0
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    low, high = (np.where(np.isnan(means), np.nan, end) for end in (low, high))
    return means.tolist(), low.tolist(), high.tolist()


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
