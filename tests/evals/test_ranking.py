from itertools import combinations

import numpy as np
import pytest

from hqclip_jax.evals.ranking import chance_at, first_match_ranks


def by_sorting(sims, own):
    """The place of the first right target in a stable descending sort, wrong ones counted."""
    ranks = []
    for row, right in zip(sims, own):
        order = np.argsort(-row, kind="stable")
        ranks.append(int(np.argmax(right[order])))
    return ranks


@pytest.mark.parametrize("levels", [3, 1000])  # 3: ties everywhere
def test_ranks_equal_a_stable_sort(levels):
    rng = np.random.default_rng(levels)
    sims = rng.integers(0, levels, (40, 17)).astype(np.float32)
    own = rng.random((40, 17)) < 0.2
    own[np.arange(40), rng.integers(0, 17, 40)] = True
    assert first_match_ranks(sims, own).tolist() == by_sorting(sims, own)


def test_hand_worked_ranks():
    sims = np.array([[0.9, 0.5, 0.7], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2]])
    own = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]], bool)
    assert first_match_ranks(sims, own).tolist() == [1, 0, 2]


def test_one_point_scores_as_chance():
    """A collapsed model must not look good: 10 queries, 10 equal targets."""
    ranks = first_match_ranks(np.zeros((10, 10)), np.eye(10, dtype=bool))
    for k in (1, 5, 10):
        assert (ranks < k).mean() == pytest.approx(chance_at(k, 10))


@pytest.mark.parametrize("k", [1, 2, 4, 5, 6])
def test_chance_equals_counting_all_draws(k):
    targets, own = 5, (1, 2, 4)
    hits = []
    for m in own:
        draws = list(combinations(range(targets), min(k, targets)))
        hits.append(np.mean([any(t < m for t in draw) for draw in draws]))
    assert chance_at(k, targets, np.array(own)) == pytest.approx(np.mean(hits))
