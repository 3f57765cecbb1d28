import numpy as np
import pytest

from hqclip_jax.evals.comparison import (
    bare_keys,
    changed_sample,
    compare,
    compare_score,
    pair,
)
from hqclip_jax.evals.outcome import Failure, Items, Outcome
from hqclip_jax.evals.results import ResultsError, read_results, scores_of, write_results


def items(keys, values, groups=None, clusters=None) -> Items:
    return Items(np.array(keys), np.asarray(values, np.float32), groups, clusters)


def test_answers_are_joined_by_key_and_not_by_place():
    rng = np.random.default_rng(0)
    keys = np.array([f"0.tar:{i}" for i in range(50)])
    values = (rng.random(50) < 0.5).astype(np.float32)
    groups = np.arange(50) % 3
    order = rng.permutation(50)
    found = pair(items(keys, values, groups), items(keys[order], values[order], groups[order]))
    assert np.array_equal(found.a.keys, found.b.keys)
    assert not found.difference.values.any()
    assert (found.only_a, found.only_b, found.relative) == (0, 0, False)
    with pytest.raises(AssertionError):  # by place they differ
        assert not (values - values[order]).any()


def test_what_one_of_them_lacks_is_counted():
    found = pair(items(["a", "b", "c", "d"], [1, 1, 0, 0]), items(["e", "c", "b"], [1, 1, 1]))
    assert found.a.keys.tolist() == ["b", "c"]
    assert (found.only_a, found.only_b) == (2, 1)
    assert [side.tolist() for side in found.changed()] == [[1], []]


def test_a_set_that_lay_elsewhere_is_the_same_set():
    here, there = "/data/wds/cars/test/", "/mnt/x/cars/test/"
    names = ["0.tar:a", "0.tar:b", "1.tar:a"]
    found = pair(
        items([here + n for n in names], [1, 0, 1]),
        items([there + n for n in names[::-1]], [1, 1, 1]),
    )
    assert found.relative and found.a.keys.tolist() == [here + n for n in names]
    assert found.difference.values.tolist() == [0, 1, 0]
    assert bare_keys(np.array(["/d/0.tar:k/0", "/d/0.tar:k/1", "/d/1.tar:k/0"])).tolist() == [
        "0.tar:k/0", "0.tar:k/1", "1.tar:k/0",
    ]  # fmt: skip
    assert bare_keys(np.array(["a", "b"])).tolist() == ["a", "b"]


def test_a_class_that_one_of_the_two_lacks_shifts_the_others_numbers():
    found = pair(
        items([*"abc"], [1, 0, 1], np.array([0, 1, 2])), items([*"bc"], [1, 1], np.array([0, 1]))
    )
    assert found.a.keys.tolist() == ["b", "c"]


def test_other_sets_are_refused():
    with pytest.raises(ResultsError, match="no answer in common: x/a and x/b"):
        pair(items(["x/a"], [1]), items(["x/b"], [1]))
    with pytest.raises(ResultsError, match="other classes"):
        pair(items([*"ab"], [1, 1], np.array([0, 1])), items([*"ab"], [1, 1], np.array([1, 0])))
    with pytest.raises(ResultsError, match="other classes"):
        pair(items([*"ab"], [1, 1]), items([*"ab"], [1, 1], np.array([1, 0])))


def paired(won: int, lost: int, same: int):
    n = won + lost + same
    a = np.repeat([0, 1, 1], [won, lost, same])
    b = np.repeat([1, 0, 1], [won, lost, same])
    keys = [f"k{i}" for i in range(n)]
    return pair(items(keys, a), items(keys, b))


@pytest.mark.parametrize(
    "won, lost, same, verdict",
    [
        (40, 5, 200, "better"),
        (5, 40, 200, "worse"),
        (20, 21, 200, "unclear"),
        (0, 0, 20, "unclear"),
        (5, 0, 0, "unclear"),  # every resample is above 0, and yet five answers tell nothing
        (6, 0, 0, "better"),
        (1, 0, 0, "unclear"),
    ],
)
def test_verdicts(won, lost, same, verdict):
    found = compare_score("set", "top1", True, paired(won, lost, same), seed=0)
    n = won + lost + same
    assert found.difference.value == pytest.approx((won - lost) / n, abs=1e-6)
    assert (found.won, found.lost, found.both) == (won, lost, n)
    assert found.difference.verdict == verdict


def test_interval_and_share_are_those_of_a_normal_difference():
    found = compare_score("set", "top1", True, paired(60, 40, 900), seed=0).difference
    error = (100 / 1000 - 0.02**2) ** 0.5 / 1000**0.5
    assert found.low == pytest.approx(0.02 - 1.96 * error, abs=0.08 * error)
    assert found.high == pytest.approx(0.02 + 1.96 * error, abs=0.08 * error)
    assert found.below == pytest.approx(0.0228, abs=0.006)  # of two deviations
    assert compare_score("set", "top1", True, paired(0, 0, 9), seed=0).difference.below == 0.5


def test_sets_and_scores_draw_apart():
    """Else a mean over sets would rise and fall with all of them at once."""
    some = paired(20, 10, 70)
    drawn = [compare_score(*at, True, some, 0).resamples for at in ("ax", "bx", "ay", "ax")]
    assert np.array_equal(drawn[0], drawn[3])
    for one in drawn[1:3]:
        assert abs(np.corrcoef(drawn[0], one)[0, 1]) < 0.05


def test_two_captions_of_one_picture_are_one_change():
    clusters = np.repeat(np.arange(3), 2)
    keys = [f"k{i}" for i in range(6)]
    found = pair(items(keys, np.zeros(6), None, clusters), items(keys, np.ones(6), None, clusters))
    assert compare_score("s", "a", True, found, 0).difference.verdict == "unclear"


def test_samples_of_changes_are_drawn_by_a_fixed_seed():
    some = paired(30, 2, 50)
    won, lost = changed_sample(some, 6)
    assert len(won) == 6 and sorted(lost) == [30, 31] and max(won) < 30
    assert (won, lost) == changed_sample(some, 6)
    assert won != sorted(won)


def outcome(seed: int, n: int, right: float, prefix: str = "/d/") -> Outcome:
    values = (np.random.default_rng(seed).random(n) < right).astype(np.float32)
    keys = np.array([f"{prefix}0.tar:{i}" for i in range(n)])
    found = {"top1": Items(keys, values)}
    return Outcome({"top1": found["top1"].score(), "n": n}, "top1", found)


def store(folder, results):
    scores = {n: scores_of(r) for n, r in results.items() if isinstance(r, Outcome)}
    write_results(folder, {}, results, scores)
    return read_results(folder)


def test_whole_comparison(tmp_path):
    a = store(tmp_path / "a", {
        "imagenetv2": outcome(0, 400, 0.3), "imagenet-a": outcome(1, 100, 0.3),
        "x": outcome(2, 50, 0.5),
        "alone": outcome(3, 9, 0.5), "failed": Failure("e"), "other main": outcome(4, 9, 0.5),
        "elsewhere": outcome(5, 9, 0.5), "no items": Outcome({"top1": 0.5, "n": 2}, "top1"),
    })  # fmt: skip
    other = Outcome({"top5": 0.5, "n": 9}, "top5")
    b = store(tmp_path / "b", {
        "imagenetv2": outcome(10, 400, 0.5), "imagenet-a": outcome(11, 90, 0.5),
        "x": outcome(2, 50, 0.5),
        "failed": outcome(3, 9, 0.5), "other main": other,
        "elsewhere": outcome(5, 9, 0.5, "q"), "no items": Outcome({"top1": 0.5, "n": 2}, "top1"),
    })  # fmt: skip
    found = compare(a, b)
    scores = {each.set: each for each in found.scores}
    assert [*scores] == ["imagenetv2", "imagenet-a", "x"]
    assert scores["imagenetv2"].difference.verdict == "better"
    assert (scores["imagenet-a"].both, scores["imagenet-a"].only_a) == (90, 10)
    assert scores["x"].difference.value == 0
    told = found.problems
    assert told["alone"] == "the second was not evaluated on it"
    assert told["failed"] == "it failed in the first"
    assert "main score is top1 in the first, top5 in the second" in told["other main"]
    assert "no answer in common" in told["elsewhere, top1"]
    assert "no%20items.npz is missing" in told["no items"]

    shifts = next(column for column in found.columns if column.column == "shifts")
    parts = [scores["imagenetv2"], scores["imagenet-a"]]
    assert (shifts.have, shifts.of) == (2, 6)
    assert shifts.difference.value == pytest.approx(np.mean([p.difference.value for p in parts]))
    spread = np.std(np.mean([p.resamples for p in parts], axis=0))
    # the sets' draws are independent of each other
    assert spread == pytest.approx(np.hypot(*(p.resamples.std() for p in parts)) / 2, rel=0.05)

    again, other_seed = compare(a, b), compare(a, b, seed=1)
    assert np.array_equal(again.scores[0].resamples, found.scores[0].resamples)
    assert not np.array_equal(other_seed.scores[0].resamples, found.scores[0].resamples)
