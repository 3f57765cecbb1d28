"""Bootstrap intervals of a score from the answers behind it.

What is drawn again, with replacement, is the cluster: an answer, or a picture with all its answers
(`Items.clusters`). Where the score is a mean over groups and each cluster lies in one group, as a
picture lies in its class, clusters are drawn within each group, so that no class is ever empty;
where clusters reach over groups, as a picture's captions and the picture itself do in retrieval's
mean of two directions, they are drawn from all.

A resample is drawn as the number of times that each *distinct* cluster occurs, a multinomial: the
same distribution as drawing one by one, and right answers that are 0 or 1 are few distinct ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hqclip_jax.evals.outcome import Items

RESAMPLES = 10_000
CHUNK = 1 << 22  # counts in memory at a time
QUANTILES = 2.5, 97.5


@dataclass(frozen=True)
class Interval:
    """The ends of a 95% interval."""

    low: float
    high: float


def resampled(items: Items, seed: int | list[int], resamples: int = RESAMPLES) -> np.ndarray:
    """The score of each resample, f64 [resamples]; `items.score()` is the score itself."""
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    groups = 0
    for rows_CxGx2 in _strata(items):
        total += _resampled_sum(rows_CxGx2, rng, resamples)
        groups += rows_CxGx2.shape[1]
    return total / groups


def percentiles(scores: np.ndarray) -> Interval:
    low, high = np.percentile(scores, QUANTILES)
    return Interval(float(low), float(high))


def wilson(share: float, n: int) -> Interval:
    """Of a share of n independent answers (Wilson 1927): never of no width, not even at 0 or 1."""
    z2 = 1.96**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n**2)) ** 0.5
    # At 0 and 1 rounding would leave the share itself just outside.
    return Interval(min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def interval(items: Items, seed: int = 0, resamples: int = 2000) -> Interval:
    """Of a score by itself: Wilson's for a share of independent answers, else the bootstrap's.

    Where all answers are equal no resample differs from another; Wilson's then stands in, over
    as many answers as there are clusters.
    """
    values, n = items.values, len(items.values)
    independent = n if items.clusters is None else len(np.unique(items.clusters))
    if np.isin(values, (0, 1)).all():
        if items.groups is None and independent == n:
            return wilson(items.score(), n)
        if (values == values[0]).all():
            return wilson(float(values[0]), independent)
    return percentiles(resampled(items, seed, resamples))


def _strata(items: Items) -> Iterator[np.ndarray]:
    """Yields f64 [C, G, 2]: of each cluster its sum and its number of answers in each group.

    The strata's clusters are drawn apart.
    """
    n = len(items.values)
    groups = np.zeros(n, int) if items.groups is None else _numbered(items.groups)
    clusters = np.arange(n) if items.clusters is None else _numbered(items.clusters)
    lowest, highest = (np.full(clusters.max() + 1, fill) for fill in (groups.max(), 0))
    np.minimum.at(lowest, clusters, groups)
    np.maximum.at(highest, clusters, groups)
    if (lowest == highest).all():
        sums = np.bincount(clusters, weights=items.values)
        rows_Cx1x2 = np.stack([sums, np.bincount(clusters)], axis=1)[:, None]
        order = np.argsort(lowest, kind="stable")
        yield from np.split(rows_Cx1x2[order], np.cumsum(np.bincount(lowest))[:-1])
        return
    shape = clusters.max() + 1, groups.max() + 1
    cell = clusters * shape[1] + groups
    sums = np.bincount(cell, weights=items.values, minlength=shape[0] * shape[1])
    counts = np.bincount(cell, minlength=shape[0] * shape[1])
    yield np.stack([sums.reshape(shape), counts.reshape(shape)], axis=2)


def _numbered(ids: np.ndarray) -> np.ndarray:
    return np.unique(ids, return_inverse=True)[1].reshape(-1)


def _resampled_sum(rows_CxGx2: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """The sum over the groups of their means, f64 [resamples]."""
    clusters, groups, _ = rows_CxGx2.shape
    distinct, counts = np.unique(rows_CxGx2.reshape(clusters, -1), axis=0, return_counts=True)
    if len(distinct) == 1:
        rows = distinct.reshape(groups, 2)
        return np.full(resamples, (rows[:, 0] / rows[:, 1]).sum())
    parts, size = [], max(1, CHUNK // len(distinct))
    for start in range(0, resamples, size):
        shape = min(size, resamples - start)
        drawn = rng.multinomial(clusters, counts / clusters, shape) @ distinct
        sums, answers = np.moveaxis(drawn.reshape(shape, groups, 2), 2, 0)
        # A group that a resample missed leaves the mean to the others.
        means = np.divide(sums, answers, out=np.full(sums.shape, np.nan), where=answers > 0)
        parts.append(groups * np.nanmean(means, axis=1))
    return np.concatenate(parts)
