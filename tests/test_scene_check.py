from collections import Counter
from dataclasses import replace

import pytest

from hqclip_jax import scene_teacher, scenes
from hqclip_jax.scene_check import SEVERAL, Claim, Mention, judge, read, shares
from hqclip_jax.shapes import Group, Scene, alterations, sample

PAIR = Scene(
    (0, 0, 0),
    (Group("red", "star", "large", "striped"), Group("blue", "square", "small", "plain", 2)),
    "left of",
    "gray",
)
MOONS = Mention(shape="moon", count=SEVERAL)


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("a red star", Claim((Mention("red", "star", count=1),))),
        ("Two small blue squares.", Claim((Mention("blue", "square", "small", count=2),))),
        ("striped squares", Claim((Mention(None, "square", None, "striped", SEVERAL),))),
        ("blue square", Claim((Mention("blue", "square"),))),
        ("blue", Claim((Mention("blue"),))),
        ("three crosses", Claim((Mention(shape="cross", count=3),))),
        ("gray background", Claim(background="gray")),
        ("one shape on black", Claim(total=1, background="black")),
        ("three shapes", Claim(total=3)),
        ("a star on gray", Claim((Mention(shape="star", count=1),), background="gray")),
        (
            "a red star left of two squares",
            Claim((Mention("red", "star", count=1), Mention(shape="square", count=2)), "left of"),
        ),
        ("a star and moons", Claim((Mention(shape="star", count=1), MOONS))),
    ],
)  # fmt: skip
def test_reads_what_scenes_say(text, claim):
    assert read(text) == claim


@pytest.mark.parametrize(
    "text",
    ["", "a", "a red", "two star", "a stars", "red blue star", "a star and", "a star left a moon",
     "a star above a moon above a moon", "gray", "on gray", "a red dog", "two shapes on red"],
)  # fmt: skip
def test_reads_nothing_else(text):
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    ["a red star left of two blue squares", "two blue squares right of a red star", "red",
     "striped star", "a star and squares", "squares and a striped star", "three shapes on gray"],
)  # fmt: skip
def test_true_in_any_order(text):
    assert read(text).fits(PAIR)


@pytest.mark.parametrize(
    "text",
    ["a red star right of two blue squares", "a red star above two blue squares", "green",
     "two blue squares left of a red star", "a blue star", "a star and a square", "stars",
     "dotted star", "two shapes on gray", "three shapes on white", "three squares",
     "a large star and large squares", "a star and a moon"],
)  # fmt: skip
def test_false_by_one_fact(text):
    assert not read(text).fits(PAIR)


@pytest.mark.parametrize("annotate", [scenes.annotation, scene_teacher.annotation])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_generators_own_texts_are_right_throughout(annotate, split):
    found = Counter()
    for index in range(200):
        scene = sample(5, index, split)
        found.update(judge(annotate(scene), scene))
    measures = {
        "color", "shape", "size", "texture", "count", "pair", "relation", "background", "desc",
        "neg_desc", "tags", "neg_tags",
    }  # fmt: skip
    measures |= {"held_out_pair"} if split == "test" else set()
    assert shares(found) == dict.fromkeys(measures, 1.0)


@pytest.mark.parametrize("fact", ["color", "shape", "size", "texture", "background", "relation"])
def test_one_wrong_fact_is_found_and_no_other(fact):
    told = scenes.annotation(alterations(PAIR, fact)[0])
    judged = judge(told, PAIR)
    wrong = {name for (name, right), count in judged.items() if count and not right}
    expected = {fact} | ({"pair"} if fact in ("color", "shape") else set())
    assert wrong - {"desc", "tags", "neg_desc", "neg_tags"} == expected
    assert judged["desc", False] >= 1


def test_swapped_colours_are_a_matter_of_pairs():
    (swapped,) = alterations(PAIR, "swap")
    judged = judge(scenes.annotation(swapped), PAIR)
    assert judged["pair", True] == 0 and judged["shape", True] == 2 and judged["color", True] == 0


def test_what_is_not_told_or_not_readable_is_wrong():
    texts = {
        "desc": ["a red star", "purple haze"],
        "tags": ["?"],
        "neg_desc": ["?"],
        "neg_tags": [],
    }
    judged = judge(texts, PAIR)
    assert (judged["color", True], judged["color", False]) == (1, 1)
    assert (judged["desc", True], judged["desc", False]) == (1, 1)
    assert judged["relation", False] == judged["background", False] == 1
    assert judged["tags", False] == judged["neg_desc", False] == 1
    assert not any(name == "neg_tags" for name, _ in judged)


def test_of_two_backgrounds_the_first_counts():
    texts = {"desc": ["three shapes on white", "three shapes on gray"]}
    judged = judge(texts | {"tags": [], "neg_desc": [], "neg_tags": []}, PAIR)
    assert judged["background", False] == 1 and judged["background", True] == 0


def test_more_groups_than_there_are_make_the_description_false():
    alone = replace(PAIR, groups=PAIR.groups[:1], relation="")
    judged = judge(scenes.annotation(PAIR), alone)
    assert judged["color", True] == 1 and judged["color", False] == 0
    assert judged["desc", False] == 4


def test_a_negative_that_is_true_is_found():
    texts = {"desc": [], "tags": [], "neg_desc": ["a red star", "a blue star"], "neg_tags": ["red"]}
    judged = judge(texts, PAIR)
    assert (judged["neg_desc", True], judged["neg_desc", False]) == (1, 1)
    assert judged["neg_tags", False] == 1


def test_the_teacher_names_the_left_or_upper_group_first():
    told = [scene_teacher.annotation(sample(5, index))["desc"][0] for index in range(100)]
    assert not [text for text in told if "right of" in text or "below" in text]
    assert [text for text in told if "left of" in text] and [t for t in told if "above" in t]


def test_the_teacher_falsifies_the_first_group_and_the_background():
    changed = Counter()
    for index in range(200):
        scene = scene_teacher.in_order(sample(5, index))
        false = scene_teacher.contradict(scene)
        assert false.groups[1:] == scene.groups[1:] and false.background != scene.background
        facts = {f for f, v in vars(scene.groups[0]).items() if v != getattr(false.groups[0], f)}
        assert facts - {"color", "shape"} == {"texture", "size"}
        changed[scene.groups[0].count > 1, *(facts & {"color", "shape"})] += 1
    assert set(changed) == {(True, "shape"), (False, "color")}
