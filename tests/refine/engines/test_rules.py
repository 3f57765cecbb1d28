import json

import pytest

from hqclip_jax.data.tags import normalise
from refine.engines.rules import (
    WORDS_FILE,
    Rules,
    WordList,
    changed,
    plural,
    refine,
    sentences,
    tags_of,
    texts_of,
)
from refine.inputs.pairs import Pair, Skip

UIDS = [f"{i:032x}" for i in range(40)]


@pytest.fixture(scope="module")
def words() -> WordList:
    return WordList.load()


@pytest.fixture
def few(tmp_path) -> WordList:
    """Groups of two, so that what comes out can be said beforehand."""
    stored = {
        "groups": {
            "colours": {"countable": False, "words": ["red", "orange"]},
            "fruits": {"countable": True, "words": ["apple", "cherry"]},
            "people": {"countable": True, "words": ["man", "baby"]},
            "places": {"countable": False, "words": ["new york", "york"]},
        },
        "plurals": {"man": "men"},
        "antonyms": [["big", "small"]],
        "stop_words": ["a", "an", "on", "the", "with"],
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps(stored))
    return WordList.load(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple", "an orange cherry"),
        ("an orange", "a red"),
        ("an apple, a cherry", "an apple, a cherry"),  # both there: nothing to swap with
        ("two apples", "two cherries"),
        ("big men", "small babies"),
        ("new york", "york"),
        ("yorkshire redder o'red red-hot", "yorkshire redder o'red red-hot"),
    ],
)
def test_words_are_changed_within_their_group(few, text, expected):
    present = frozenset(m["word"] for m in few.pattern.finditer(text))
    assert changed(text, UIDS[0], few, present) == expected


def test_a_record_is_changed_throughout_in_the_same_way(few):
    texts = texts_of("A red apple. The red apple with a big hat", UIDS[3], few)
    assert texts.desc == ("a red apple", "the red apple with a big hat")
    assert texts.neg_desc == ("an orange cherry", "the orange cherry with a small hat")
    assert texts.tags == ("red apple", "big hat")
    assert texts.neg_tags == ("orange cherry", "small hat")


@pytest.mark.parametrize("number", ["7", "10", "250", "2019"])
def test_numbers_become_others_of_as_many_digits(few, number):
    for uid in UIDS:
        new = changed(f"{number} hats", uid, few, frozenset()).removesuffix(" hats")
        assert new != number and len(new) == len(number) and int(new) >= 2


@pytest.mark.parametrize("text", ["1.5 l", "1,999 hats", "500g", "f-150", "img_0001"])
def test_parts_of_numbers_and_codes_stay(few, text):
    assert changed(text, UIDS[0], few, frozenset()) == text


def test_where_nothing_can_be_changed_there_is_no_negative(words):
    texts = texts_of("Golden Delicious", UIDS[0], words)
    assert (texts.desc, texts.tags) == (("golden delicious",), ("golden delicious",))
    assert (texts.neg_desc, texts.neg_tags) == ((), ())


def test_a_negative_is_never_a_positive(words):
    captions = [
        "Two red cats and a black dog on a beach in Paris",
        "Red, green, blue, yellow, orange, purple, pink, brown shoes",
        "big small big | small big small",
        "7 cats. 7 cats! cats 7",
    ]
    for caption in captions:
        for uid in UIDS:
            texts = texts_of(caption, uid, words)
            assert not set(texts.neg_desc) & set(texts.desc)
            assert not set(map(normalise, texts.neg_tags)) & set(map(normalise, texts.tags))
            assert texts == texts_of(caption, uid, words)
    drawn = {texts_of(captions[0], uid, words) for uid in UIDS}
    assert len(drawn) > 30  # the uid decides


def test_sentences():
    assert sentences("a cat. a dog! mr. x | shop - 123 ; ... 4.5 stars. a cat.") == (
        "a cat",
        "a dog",
        "mr",
        "x",
        "shop",
        "4.5 stars",
    )
    assert sentences("東京の桜") == ("東京の桜",)
    assert sentences("1 2 3") == ()
    assert len(sentences(". ".join(f"text {i}" for i in range(50)))) == 8


def test_tags_are_runs_between_stop_words():
    stop = frozenset({"a", "on", "the"})
    text = "a very big red apple on the table, fruit_bowl 12 on fruit & x (apple) table"
    assert tags_of(text, stop) == ("big red apple", "table", "fruit", "bowl", "apple")
    assert len(tags_of(" on ".join(f"tag{i}" for i in range(50)), stop)) == 10


def test_plurals():
    irregular = {"man": "men"}
    given = ["cat", "bus", "box", "cherry", "toy", "bench", "man"]
    assert [plural(w, irregular) for w in given] == [
        "cats", "buses", "boxes", "cherries", "toys", "benches", "men",
    ]  # fmt: skip


def test_no_word_is_in_two_groups(words):
    stored = json.loads(WORDS_FILE.read_text())
    forms = [word for pair in stored["antonyms"] for word in pair]
    for group in stored["groups"].values():
        made = [plural(w, stored["plurals"]) for w in group["words"]] if group["countable"] else []
        forms += sorted({*group["words"], *made})
    assert len(forms) == len(set(forms)) == len(words.swaps)
    assert all(form == form.lower() for form in forms)
    assert all(word not in others and others for word, others in words.swaps.items())


def test_pairs_without_a_caption_are_skipped(words):
    pairs = [Pair(UIDS[1], b"", "", "0.tar", "0"), Pair(UIDS[2], b"", "A cat", "0.tar", "1")]
    skip, refined = refine(words, pairs, 0)
    pair, texts = refined.pair, refined.texts
    assert skip == Skip("no_caption", "0.tar", "0", UIDS[1])
    assert (pair, texts.desc) == (pairs[1], ("a cat",))


def test_the_refiner_names_the_word_list_and_the_note_is_plain(words):
    assert Rules().refiner == f"rules:v1:{words.digest}"
    assert len(words.digest) == 12
    assert "never looks at the picture" in Rules.note
