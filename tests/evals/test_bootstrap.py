import numpy as np
import pytest

from hqclip_jax.evals.bootstrap import interval, percentiles, resampled, wilson
from hqclip_jax.evals.outcome import Items


def items(values, groups=None, clusters=None) -> Items:
    values = np.asarray(values, np.float32)
    return Items(np.arange(len(values)).astype(str), values, groups, clusters)


def test_spread_and_ends_are_those_of_the_normal_approximation():
    values = np.random.default_rng(0).random(2000) < 0.3
    drawn = resampled(items(values), seed=1)
    error = (values.mean() * (1 - values.mean()) / 2000) ** 0.5
    assert len(drawn) == 10_000
    assert drawn.mean() == pytest.approx(values.mean(), abs=3 * error / 100)
    assert drawn.std() == pytest.approx(error, rel=0.03)
    ends = percentiles(drawn)
    assert ends.low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert ends.high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)


def test_coverage_of_paired_differences_is_95_percent():
    """300 experiments of known truth; 95% ± three deviations of that share."""
    rng, inside, truth = np.random.default_rng(3), 0, 0.1
    for experiment in range(300):
        differences = rng.choice([-1, 0, 1], 400, p=[0.1, 0.7, 0.2])
        ends = percentiles(resampled(items(differences), experiment, 1000))
        inside += ends.low <= truth <= ends.high
    assert inside / 300 == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 300) ** 0.5)


def test_draws_equal_drawing_one_by_one_in_distribution():
    rng = np.random.default_rng(5)
    values = rng.normal(size=60)
    one_by_one = values[rng.integers(0, 60, (20_000, 60))].mean(axis=1)
    drawn = resampled(items(values), 0, 20_000)
    quantiles = [5, 25, 50, 75, 95]
    spread = one_by_one.std()
    found, expected = (np.percentile(x, quantiles) for x in (drawn, one_by_one))
    assert np.allclose(found, expected, atol=0.05 * spread)


def test_a_mean_over_classes_is_drawn_within_each_class():
    """The error of a stratified mean has a closed form; drawing from all would add the classes'
    differences, and would leave small classes empty."""
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 7], [400, 100, 100])
    values = rng.random(600) < np.array([0.9, 0.1, *[0.5] * 6])[groups]
    drawn = resampled(items(values, groups), 0)
    shares = [values[groups == g].mean() for g in (0, 1, 7)]
    variance = sum(s * (1 - s) / n for s, n in zip(shares, (400, 100, 100))) / 9
    assert drawn.std() == pytest.approx(variance**0.5, rel=0.03)
    assert drawn.mean() == pytest.approx(np.mean(shares), abs=0.001)
    one_each = resampled(items([1, 0, 1], np.array([0, 1, 2])), 0)
    assert np.allclose(one_each, 2 / 3)


def test_answers_about_one_picture_stay_together():
    """Five equal answers a picture are one answer: the error is five times a picture's share."""
    of_picture = np.random.default_rng(1).random(300) < 0.4
    values, clusters = np.repeat(of_picture, 5), np.repeat(np.arange(300), 5)
    expected = resampled(items(of_picture), 0).std()
    assert resampled(items(values, None, clusters), 0).std() == pytest.approx(expected, rel=0.03)
    assert resampled(items(values), 0).std() == pytest.approx(expected / 5**0.5, rel=0.03)


def test_clusters_across_groups_move_both_means():
    """A picture's captions and the picture itself, as in retrieval's mean of two directions."""
    found = np.random.default_rng(1).random(200) < 0.5
    values = np.concatenate([np.repeat(found, 2), found])
    groups = np.repeat([0, 1], [400, 200])
    clusters = np.concatenate([np.repeat(np.arange(200), 2), np.arange(200)])
    both = items(values, groups, clusters)
    drawn = resampled(both, 0)
    assert drawn.std() == pytest.approx(resampled(items(found), 0).std(), rel=0.03)
    assert drawn.mean() == pytest.approx(both.score(), abs=0.002)


def test_the_seed_decides_all():
    some = items(np.arange(30) % 3)
    assert np.array_equal(resampled(some, 4), resampled(some, 4))
    assert not np.array_equal(resampled(some, 4), resampled(some, 5))


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_wilson_has_width_and_holds_the_share(share):
    ends = wilson(share, 10)
    assert 0 <= ends.low <= share <= ends.high <= 1
    assert ends.high - ends.low > 0.2
    assert wilson(0.5, 100).low == pytest.approx(0.4038, abs=1e-4)  # of tables


def test_one_answer_and_equal_answers_are_not_certain():
    for some in (items([1]), items([1, 1, 1], np.array([0, 0, 1]))):
        ends = interval(some)
        assert ends.high - ends.low > 0.2
    assert interval(items([0] * 5, None, np.zeros(5, int))) == wilson(0, 1)


def test_a_score_by_itself_has_wilsons_interval_where_answers_are_independent():
    values = [1, 0, 0, 1, 1, 1]
    assert (
        interval(items(values)) == interval(items(values, None, np.arange(6))) == wilson(4 / 6, 6)
    )
    together = items(values, None, np.array([0, 0, 1, 1, 2, 2]))
    assert interval(together) == percentiles(resampled(together, 0, 2000))
