import pytest

from hqclip_jax.evals.groups import group_means
from hqclip_jax.evals.outcome import Failure, Outcome

RESULTS = {
    "a": Outcome({"top1": 0.5, "mean_per_class": 0.2}, "mean_per_class"),
    "b": Outcome({"top1": 0.4}, "top1"),
    "c": Failure("a.tar is missing"),
}


def test_mean_of_the_main_scores():
    found = group_means({"both": ["a", "b"]}, RESULTS)["both"]
    assert (found.mean, found.scored, found.complete) == (pytest.approx(0.3), 2, True)
    assert str(found) == "30.0"


def test_group_says_which_sets_it_lacks():
    found = group_means({"four": ["a", "b", "c", "d"], "none": ["c"], "empty": []}, RESULTS)
    assert found["four"].mean == pytest.approx(0.3)
    assert (found["four"].missing, found["four"].complete) == (("c", "d"), False)
    assert str(found["four"]) == "30.0 (2 of 4: no c, d)"
    assert found["none"].mean is None
    assert str(found["none"]) == "- (0 of 1: no c)"
    assert found["empty"].mean is None
    many = group_means({"all": [*"bwxyz"]}, RESULTS)["all"]
    assert str(many) == "40.0 (1 of 5: no w, x, y, ...)"
