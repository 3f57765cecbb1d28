"""Each metric against loops that say what it is."""

import numpy as np
import pytest

from hqclip_jax.evals.metrics import (
    average_precision,
    f1_by_class,
    jaccard,
    mean_by_group,
    recall_by_class,
)

CLASSES = 7  # of which the last has no image


@pytest.fixture(params=range(5))
def answers(request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.param)
    return rng.integers(0, CLASSES, 60), rng.integers(0, CLASSES - 1, 60)


def test_recall_by_class(answers):
    answer, label = answers
    found = recall_by_class(answer == label, label, CLASSES)
    for c in range(CLASSES - 1):
        of_class = [a for a, right in zip(answer, label) if right == c]
        assert found[c] == pytest.approx(of_class.count(c) / len(of_class))
    assert np.isnan(found[-1])


def test_f1_is_the_harmonic_mean_of_precision_and_recall(answers):
    answer, label = answers
    found = f1_by_class(answer, label, CLASSES)
    for c in range(CLASSES - 1):
        right = sum(a == c and right == c for a, right in zip(answer, label))
        answered, labelled = list(answer).count(c), list(label).count(c)
        if not right:
            assert found[c] == 0
            continue
        precision, recall = right / answered, right / labelled
        assert found[c] == pytest.approx(2 * precision * recall / (precision + recall))
    assert np.isnan(found[-1])  # answered, but without images: no part of the mean


def test_mean_by_group():
    found = mean_by_group(np.array([1, 0, 1, 1]), np.array([5, 5, 0, 9]))
    assert found == {0: (1.0, 1), 5: (0.5, 2), 9: (1.0, 1)}
    assert list(found) == [0, 5, 9]


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_without_ties(seed):
    """The mean, over the positives, of the precision at their rank."""
    rng = np.random.default_rng(seed)
    scores, positive = rng.permutation(40) / 40, rng.random(40) < 0.3
    ranked = [positive[i] for i in np.argsort(-scores)]
    precisions = [sum(ranked[: i + 1]) / (i + 1) for i, right in enumerate(ranked) if right]
    expected = sum(precisions) / len(precisions)
    assert average_precision(scores, positive) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_with_ties(seed):
    """A step per distinct score: what it adds to the recall, at the precision it reaches."""
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 4, 40) / 4, rng.random(40) < 0.3
    expected = before = 0.0
    for threshold in sorted({*scores}, reverse=True):
        taken = [p for s, p in zip(scores, positive) if s >= threshold]
        recall = sum(taken) / positive.sum()
        expected += (recall - before) * sum(taken) / len(taken)
        before = recall
    assert average_precision(scores, positive) == pytest.approx(expected)
    order = rng.permutation(40)
    assert average_precision(scores[order], positive[order]) == pytest.approx(expected)


def test_average_precision_of_a_collapsed_model_is_the_share_of_positives():
    positive = np.arange(10) < 3
    assert average_precision(np.ones(10, np.float32), positive) == pytest.approx(0.3)
    assert np.isnan(average_precision(np.ones(10), np.zeros(10, bool)))
    assert np.isnan(average_precision(np.ones(0), np.zeros(0, bool)))


def test_jaccard():
    assert jaccard({1, 2}, {2, 3}) == pytest.approx(1 / 3)
    assert jaccard({1}, {1}) == 1
    assert jaccard({1}, {2}) == 0
