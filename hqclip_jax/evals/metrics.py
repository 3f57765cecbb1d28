"""Scores beyond top-1, as DataComp's 38 sets use them: pure functions of answers and labels."""

from collections.abc import Set

import numpy as np


def recall_by_class(right_n: np.ndarray, label_n: np.ndarray, classes: int) -> np.ndarray:
    """Share of each class's images that are right, f64 [classes]; NaN for a class without any.

    Args:
        right_n: bool or 0/1, one per image.
    """
    seen_C = np.bincount(label_n, minlength=classes)
    right_C = np.bincount(label_n, weights=right_n, minlength=classes)
    return np.divide(right_C, seen_C, out=np.full(classes, np.nan), where=seen_C > 0)


def f1_by_class(answer_n: np.ndarray, label_n: np.ndarray, classes: int) -> np.ndarray:
    """2·right / (answered + labelled) per class, f64 [classes]; NaN for a class without images.

    WILDS takes the mean over the classes that have images (iWildCam, Beery et al. 2021): an
    answer of any other class costs the right class its recall and nothing more.
    """
    right_C = np.bincount(label_n[answer_n == label_n], minlength=classes)
    seen_C = np.bincount(label_n, minlength=classes)
    total_C = np.bincount(answer_n, minlength=classes) + seen_C
    return np.divide(2 * right_C, total_C, out=np.full(classes, np.nan), where=seen_C > 0)


def mean_by_group(value_n: np.ndarray, group_n: np.ndarray) -> dict[int, tuple[float, int]]:
    """Mean and number of values of each group that has some, in the groups' order."""
    groups, index, counts = np.unique(group_n, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=value_n) / counts
    return {int(g): (float(m), int(c)) for g, m, c in zip(groups, means, counts)}


def average_precision(score_n: np.ndarray, positive_n: np.ndarray) -> float:
    """Area under the precision-recall steps of a ranking by falling score; NaN without a positive.

    Equal scores are one step, so that the order of the images does not matter: a model that
    scores all alike gets the share of positives. Without ties this is the mean, over the positives,
    of the precision at their rank, as CLIP_benchmark has it.
    """
    order = np.argsort(-score_n, kind="stable")
    hits_n = np.cumsum(positive_n[order])
    if not len(hits_n) or not hits_n[-1]:
        return float("nan")
    score_n = score_n[order]
    ends = np.flatnonzero(np.append(score_n[1:] != score_n[:-1], True))
    hits = hits_n[ends].astype(np.float64)
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1])


def jaccard(chosen: Set[int], right: Set[int]) -> float:
    """Size of the intersection over size of the union, which must not be empty."""
    return len(chosen & right) / len(chosen | right)
