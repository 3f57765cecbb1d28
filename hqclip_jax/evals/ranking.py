"""Ranks of right answers, and what chance would reach."""

import numpy as np


def first_match_ranks(sims_QxT: np.ndarray, own_QxT: np.ndarray) -> np.ndarray:
    """How many wrong targets come before a query's first right one, int [Q]; 0 is a hit at 1.

    Equal similarities keep the targets' order, as a stable sort does: a model that maps all to
    one point then scores as chance would. Counting every tie as wrong would lose answers that
    published figures count: ImageNet's names hold "missile" and "sunglasses" twice.

    Args:
        sims_QxT: similarities.
        own_QxT: which targets are right for a query, at least one each.
    """
    masked = np.where(own_QxT, sims_QxT, -np.inf)
    first_Q = masked.argmax(axis=1)[:, None]
    best_Q = np.take_along_axis(masked, first_Q, axis=1)
    earlier = np.arange(sims_QxT.shape[1]) < first_Q
    return (~own_QxT & ((sims_QxT > best_Q) | ((sims_QxT == best_Q) & earlier))).sum(axis=1)


def chance_at(k: int, targets: int, own_Q: np.ndarray | int = 1) -> float:
    """Mean probability that k of the targets, drawn at random, hold one of a query's `own_Q`."""
    if k >= targets:
        return 1.0
    drawn = np.arange(k)
    missed = (targets - np.reshape(own_Q, (-1, 1)) - drawn) / (targets - drawn)
    return float(1 - np.clip(missed, 0, 1).prod(axis=1).mean())
