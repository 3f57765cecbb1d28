import pytest

from hqclip_jax.evals.groups import group_means

SCORES = {"a": 0.2, "b": 0.4}


def test_mean_of_the_main_scores():
    found = group_means({"both": ["a", "b"]}, SCORES)["both"]
    assert (found.mean, found.have, found.of, found.missing) == (pytest.approx(0.3), 2, 2, ())
    assert str(found) == "30.0"


def test_group_says_which_sets_it_lacks():
    found = group_means({"four": ["a", "b", "c", "d"], "none": ["c"], "empty": []}, SCORES)
    assert [*found] == ["four"]
    assert found["four"].mean == pytest.approx(0.3)
    assert (found["four"].missing, found["four"].of) == (("c", "d"), 4)
    assert str(found["four"]) == "30.0 (2 of 4: no c, d)"
    many = group_means({"all": [*"bwxyz"]}, SCORES)["all"]
    assert str(many) == "40.0 (1 of 5: no w, x, y, ...)"
