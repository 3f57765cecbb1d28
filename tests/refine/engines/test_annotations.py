import json

import pytest

from refine.engines import Refined, Texts, unique
from refine.engines.annotations import AnnotationError, Annotations, join, parse
from refine.inputs.pairs import Pair, Skip

GOOD = {"tags": ["a"], "neg_tags": [], "desc": ["b"], "neg_desc": []}


def test_texts_are_cleaned_and_empty_and_repeated_ones_dropped():
    texts = parse(
        json.dumps(
            {
                "desc": ["  A &amp;amp; B\n ", "", "A & B", "\u00a0"],
                "neg_desc": ["cafÃ©", "\ud800 x"],
                "tags": ["Red apple", "red  Apple", "&nbsp;", "apple"],
                "neg_tags": [],
                "more": 1,
            }
        ).encode()
    )
    assert texts == Texts(
        desc=("A & B", "A & B"),
        neg_desc=("café", "\ufffd x"),
        tags=("Red apple", "apple"),
        neg_tags=(),
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "a list, no object"),
        (json.dumps(GOOD | {"desc": "a cat"}).encode(), "'desc' is no list"),
        (json.dumps(GOOD | {"tags": ["a", 3]}).encode(), "'tags' is no list"),
        (json.dumps(GOOD | {"neg_tags": None}).encode(), "'neg_tags' is no list"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "neg_desc"}).encode(), "'neg_desc'"),
    ],
)
def test_what_is_not_of_the_published_form_names_the_field(data, message):
    with pytest.raises(AnnotationError, match=message):
        parse(data)


def test_join_by_uid_with_reasons():
    stored = {"a": json.dumps(GOOD).encode(), "b": b"{}"}
    pairs = [Pair(uid, b"", "caption", "0.tar", uid) for uid in ("b", "a", "c")]
    assert list(join(stored.get, pairs, 0)) == [
        Skip("malformed_annotation", "0.tar", "b", "b", "field 'desc' is no list of strings"),
        Refined(pairs[1], Texts(desc=("b",), tags=("a",))),
        Skip("missing_annotation", "0.tar", "c", "c"),
    ]


def test_unique_keeps_the_first_spelling_in_order():
    assert unique(["B", "a", "b", "A", "c"]) == ("B", "a", "c")


def test_the_refiner_names_the_annotator(tmp_path):
    assert Annotations((), tmp_path).refiner == "annotations:-:-"
    assert Annotations((), tmp_path, "vlm-150m").refiner == "annotations:vlm-150m:-"
