"""Which words of a negative differ from its positive."""

import time
from itertools import pairwise

import pytest

from refine.judging.differences import TEXTS, Pairing, Span, pair_up


def shown(spans) -> str:
    return "".join(f"[{span.text}]" if span.differs else span.text for span in spans)


def rows(positives, negatives) -> list[tuple[str, str]]:
    return [(shown(p.positive), shown(p.negative)) for p in pair_up(positives, negatives)]


def test_the_best_match_wins_not_the_place():
    positives = ["a dog runs on grass", "the sky is blue", "two men talk"]
    negatives = ["the sky is grey", "a cat runs on grass"]
    assert rows(positives, negatives) == [
        ("a [dog ]runs on grass", "a [cat ]runs on grass"),
        ("the sky is [blue]", "the sky is [grey]"),
        ("two men talk", ""),
    ]


def test_a_positive_has_one_negative_the_most_alike():
    assert rows(["a red car"], ["a red bus is here", "a blue car", "a red van"]) == [
        ("a [red ]car", "a [blue ]car"),
        ("", "a red bus is here"),
        ("", "a red van"),
    ]


def test_case_and_punctuation_are_no_difference():
    (pairing,) = pair_up(["A red apple, cut."], ["a RED apple cut"])
    assert (shown(pairing.positive), shown(pairing.negative)) == (
        "A red apple, cut.", "a RED apple cut",
    )  # fmt: skip
    assert pairing.equal


def test_texts_that_only_begin_alike_are_not_equal():
    words = "word " * 80
    (pairing,) = pair_up([words + "end"], [words + "other end"])
    assert not pairing.equal


@pytest.mark.parametrize("text", ["  two  spaces \t in it ", "one", "", "–", "word " * 100])
def test_the_spans_are_the_whole_text(text):
    for pairing in pair_up([text], ["word two other"]):
        for spans, whole in ((pairing.positive, text), (pairing.negative, "word two other")):
            assert "".join(span.text for span in spans) in ("", whole)
            assert all(one.differs != other.differs for one, other in pairwise(spans))


def test_no_text_is_lost_or_repeated():
    positives, negatives = [f"p {i} x" for i in range(40)], [f"p {i} y" for i in range(0, 60, 2)]
    found = pair_up(positives, negatives)
    assert [shown(p.positive).replace("[", "").replace("]", "") for p in found if p.positive] == (
        positives
    )
    kept = [shown(p.negative).replace("[", "").replace("]", "") for p in found if p.negative]
    assert sorted(kept) == sorted(negatives)
    assert all(not p.negative for p in found[TEXTS:40])  # beyond those that are compared


def test_nothing_to_pair():
    assert pair_up([], []) == []
    assert pair_up([], ["x"]) == [Pairing(negative=(Span("x", False),))]


def test_hostile_texts_take_no_time():
    began = time.monotonic()
    pair_up(["a " * 50_000] * 50, ["!" * 100_000 + "a a b " * 100] * 50)
    assert time.monotonic() - began < 20
