"""What is measured of texts and scores."""

import math

import numpy as np
import pytest

from hqclip_jax.data.record import Record
from refine.judging.estimates import estimate
from refine.judging.measures import (
    MEASURES,
    Vocabulary,
    diversity,
    of_clip,
    of_judge,
    of_texts,
    words,
)
from refine.judging.outputs import Output
from refine.judging.scores import CLIP_COLUMNS
from tests.refine.outputs import make_record, write_output


def record(**fields) -> Record:
    return Record("0" * 32, b"", **fields)


def test_words():
    assert words("A dog's well-worn BALL, 2 of them – no?") == [
        "a", "dog's", "well-worn", "ball", "2", "of", "them", "no",
    ]  # fmt: skip
    assert words("犬 и собака") == ["犬", "и", "собака"] and words(" – !") == []


def test_the_texts_of_a_record():
    found = of_texts(
        record(
            caption="A red dog",
            desc=("a red dog runs.", "the sky is blue."),
            neg_desc=("a black dog runs.", "The sky is blue"),
            tags=("Dog", "sky"),
        ),
        frozenset({"dog"}),
    )
    assert found == {
        "words_caption": 3, "words_desc": 8, "words_neg_desc": 8, "sentences": 2, "tags": 2,
        "has_negative": True, "kept_words": 7 / 8, "equal": True, "has_tags": True,
        "known_tags": True,
    }  # fmt: skip


def test_a_word_counts_as_shared_as_often_as_both_have_it():
    found = of_texts(record(desc=("dog dog cat",), neg_desc=("dog dog cat cat",)), frozenset())
    assert found["kept_words"] == 3 / 4 and found["equal"] is False


def test_what_is_absent_has_no_measure():
    found = of_texts(record(desc=("x",)), frozenset({"dog"}))
    absent = {key for key, value in found.items() if isinstance(value, float) and math.isnan(value)}
    assert absent == {"words_caption", "words_neg_desc", "tags", "kept_words", "equal"}
    assert (found["has_negative"], found["has_tags"], found["known_tags"]) == (False, False, False)


def test_clip():
    rows = np.zeros(3, [(column, "<f4") for column in CLIP_COLUMNS])
    rows["desc"], rows["neg_desc"] = [30, 20, 25], [20, 20, np.nan]
    rows["desc_tokens"] = [77, 78, np.nan]
    found = of_clip(rows, context=77)
    np.testing.assert_array_equal(found["clip_margin"], [10, 0, np.nan])
    np.testing.assert_array_equal(found["clip_right"], [1, 0, np.nan])
    np.testing.assert_array_equal(found["cut_desc"], [0, 1, np.nan])


def test_judge():
    rows = np.array(
        [(5, 9, 1, 0), (np.nan, 8, np.nan, 2)],
        [(name, "<f4") for name in ("caption", "desc", "neg_desc", "unread")],
    )
    found = of_judge(rows)
    np.testing.assert_array_equal(found["judge_margin"], [8, np.nan])
    np.testing.assert_array_equal(found["judge_unread"], [0, 2])


def test_every_measure_has_a_place_in_the_table():
    rows = np.zeros(1, [(column, "<f4") for column in (*CLIP_COLUMNS, "unread")])
    measured = of_clip(rows, 77) | of_judge(rows) | of_texts(record(), frozenset())
    assert {measure.key for measure in MEASURES} == set(measured)


def test_diversity():
    found = diversity([["a", "b", "a"], [], ["a", "b"]], first=4)
    assert found == {"distinct_1": 2 / 5, "distinct_2": 2 / 3, "type_token_ratio": 2 / 4}
    assert diversity([["a", "b"], ["c", "d"]], first=3)["type_token_ratio"] == 1
    assert all(math.isnan(value) for value in diversity([[]], first=0).values())


def test_the_vocabulary_is_the_most_frequent_tags(tmp_path, monkeypatch):
    monkeypatch.setattr("refine.judging.measures.VOCABULARY", 2)
    records = [make_record(n, tags=tags) for n, tags in enumerate([("A", "b"), ("a", "c"), ("b",)])]
    found = Vocabulary.of(Output.open(write_output(tmp_path / "out", [records])))
    assert found == Vocabulary(3, 4 / 5, frozenset({"a", "b"}))


def columns(seed, shift=0.0, n=400):
    x = np.random.default_rng(seed).normal(10, 2, n)
    return {"a": x + shift, "b": np.where(np.arange(n) % 4 == 0, np.nan, x)}


def test_means_skip_what_is_absent():
    x = {"a": np.array([1.0, 2, np.nan, 3])}
    (found,) = estimate([x], seed=0)["a"]
    assert (found.mean.value, found.n, found.difference) == (2, 3, None)
    assert found.mean.low < 2 < found.mean.high


def test_intervals_are_those_of_the_mean():
    one = columns(0)
    found = estimate([one], seed=0)
    for key, n in (("a", 400), ("b", 300)):
        mean = found[key][0].mean
        values = one[key][~np.isnan(one[key])]
        half = 1.96 * values.std() / np.sqrt(n)
        assert found[key][0].n == n
        assert mean.low == pytest.approx(mean.value - half, abs=0.04)
        assert mean.high == pytest.approx(mean.value + half, abs=0.04)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    inside = 0
    for seed in range(200):
        mean = estimate([columns(seed, n=60)], seed)["a"][0].mean
        inside += mean.low <= 10 <= mean.high
    assert 180 <= inside <= 198


def test_differences_are_of_the_same_pictures():
    one = columns(0)
    other = {"a": one["a"] + 0.1 + np.random.default_rng(1).normal(0, 0.1, 400), "b": one["b"]}
    found = estimate([one, other, one], seed=0)
    difference = found["a"][1].difference
    assert 0.08 < difference.low < difference.value < difference.high < 0.12  # the means': ±0.2
    for same in (found["a"][2].difference, found["b"][1].difference):
        assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_difference_is_over_the_pictures_where_both_have_the_measure():
    one = {"a": np.array([1.0, 2, np.nan, 100])}
    other = {"a": np.array([2.0, np.nan, 50, 101])}
    found = estimate([one, other], seed=0)["a"]
    assert found[1].difference.value == 1 and found[1].mean.value == 51


def test_a_measure_that_no_record_has():
    x = {"a": np.full(5, np.nan), "b": np.ones(5)}
    found = estimate([x, x], seed=0)
    assert found["a"][0].n == 0 and math.isnan(found["a"][0].mean.value)
    assert math.isnan(found["a"][1].difference.low)
    assert found["b"][0].mean.value == 1


def test_only_what_all_outputs_have():
    assert set(estimate([{"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)}], 0)) == {"a"}
