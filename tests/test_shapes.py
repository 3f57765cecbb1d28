import hashlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from hqclip_jax import shapes
from hqclip_jax.shapes import Group, Scene, alterations, render, sample

PAIR = Scene(
    (0, 0, 0),
    (Group("red", "square", "large", "plain", 1), Group("blue", "star", "small", "dotted", 2)),
    "left of",
    "white",
)
SINGLE = Scene((0, 0, 0), (Group("red", "square"),), "", "white")


def test_scene_is_a_function_of_split_seed_and_index():
    assert sample(3, 5) == sample(3, 5)
    np.testing.assert_array_equal(render(sample(3, 5)), render(sample(3, 5)))
    scenes = [sample(3, 5), sample(3, 6), sample(4, 5), sample(3, 5, "test")]
    assert len({s.uid for s in scenes}) == 4
    assert scenes[0].uid == hashlib.sha256(b"0/3/5").hexdigest()[:32]


def test_train_scenes_hold_no_held_out_pair_and_test_scenes_hold_one():
    assert len(shapes.PAIRS) == 48 and len(shapes.HELD_OUT) == 8
    assert {color for color, _ in shapes.HELD_OUT} == set(shapes.COLORS)
    for index in range(300):
        train, test = sample(0, index), sample(0, index, "test")
        for group in train.groups:
            assert (group.color, group.shape) not in shapes.HELD_OUT
        assert any((g.color, g.shape) in shapes.HELD_OUT for g in test.groups)


def test_scenes_stay_in_bounds_and_groups_can_be_told_apart():
    seen = set()
    for index in range(500):
        scene = sample(1, index)
        assert 1 <= scene.count <= 3
        assert bool(scene.relation) == (len(scene.groups) == 2)
        for a, b in itertools.combinations(scene.groups, 2):
            assert a.color != b.color and a.shape != b.shape
        seen.add((scene.relation, scene.count, scene.background))
    assert len(seen) == (4 * 2 + 3) * 3  # two groups hold two or three shapes, one up to three


@pytest.mark.parametrize(
    ("fact", "ways"),
    [
        ("color", 9),  # six other colours for two groups, less orange and pink square, aqua star
        ("shape", 6),  # four other shapes for two groups, less red circle and blue moon
        ("size", 2),
        ("texture", 4),
        ("relation", 3),
        ("background", 2),
        ("swap", 1),
    ],
)
def test_alterations_are_all_the_ways_to_be_wrong_in_one_fact(fact, ways):
    found = alterations(PAIR, fact)
    assert len(found) == len(set(found)) == ways
    assert PAIR not in found


def test_alterations_keep_held_out_pairs_out_and_the_count_below_four():
    scene = Scene((0, 0, 0), (Group("red", "square"), Group("orange", "circle")), "above", "gray")
    assert alterations(scene, "swap") == []  # it would make a red circle
    assert {s.count for s in alterations(PAIR, "count")} == {2}
    assert {s.count for s in alterations(SINGLE, "count")} == {2, 3}
    assert alterations(SINGLE, "swap") == alterations(SINGLE, "relation") == []
    unseen = Scene((1, 0, 0), (Group("red", "circle"), Group("aqua", "square")), "above", "gray")
    assert any(s.held_out for s in alterations(unseen, "color"))


def test_an_unknown_fact_is_named():
    with pytest.raises(ValueError, match=r"fact 'smell' is none of color, .*swap"):
        alterations(PAIR, "smell")


def mass_center(image: np.ndarray, color: str) -> np.ndarray:
    near = np.abs(image.astype(int) - shapes.COLORS[color]).max(axis=-1) < 45
    assert near.sum() > 20, f"no {color} to see"
    return np.argwhere(near).mean(axis=0)[::-1]


@pytest.mark.parametrize(
    ("relation", "direction"),
    [("left of", (-1, 0)), ("right of", (1, 0)), ("above", (0, -1)), ("below", (0, 1))],
)
def test_relation_is_drawn_as_said(relation, direction):
    scene = Scene((0, 0, 7), (Group("red", "cross"), Group("blue", "circle")), relation, "white")
    offset = mass_center(render(scene), "red") - mass_center(render(scene), "blue")
    assert offset @ np.array(direction) > 25


def test_counts_sizes_and_colours_are_drawn_as_said():
    def area(group: Group) -> int:
        image = render(Scene((0, 0, 1), (group,), "", "white")).astype(int)
        return int((np.abs(image - shapes.COLORS["blue"]).max(axis=-1) < 40).sum())

    one = area(Group("blue", "circle", "small"))
    assert one == pytest.approx(np.pi * (0.95 * 8) ** 2, rel=0.2)
    assert area(Group("blue", "circle", "small", count=3)) == pytest.approx(3 * one, rel=0.2)
    assert area(Group("blue", "circle", "large")) == pytest.approx(one * (13 / 8) ** 2, rel=0.2)
    assert area(Group("blue", "circle", "large", "striped")) < 0.8 * one * (13 / 8) ** 2


def test_shapes_and_textures_differ_even_at_half_the_size():
    def half(group: Group) -> np.ndarray:
        image = render(Scene((0, 0, 1), (group,), "", "white")).astype(float)
        return image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))

    for size, texture in itertools.product(shapes.SIZES, shapes.TEXTURES):
        images = [half(Group("red", shape, size, texture)) for shape in shapes.SHAPES]
        for a, b in itertools.combinations(images, 2):
            assert (np.abs(a - b).max(axis=-1) > 50).sum() >= 8
    for size in shapes.SIZES:
        images = [half(Group("red", "cross", size, texture)) for texture in shapes.TEXTURES]
        for a, b in itertools.combinations(images, 2):
            assert (np.abs(a - b).max(axis=-1) > 30).sum() >= 8


def test_star_has_five_tips():
    angle = np.linspace(-np.pi, np.pi, 3600, endpoint=False)
    outside = shapes.SHAPES["star"](0.8 * np.sin(angle), -0.8 * np.cos(angle)) > 0
    assert (np.diff(outside.astype(int)) == 1).sum() == 5
    assert shapes.SHAPES["star"](np.array(0.0), np.array(-0.98)) < 0  # one tip points upward


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8")])
def test_encode_keeps_the_picture(form, magic):
    data = shapes.encode(sample(0, 0), form)
    assert data.startswith(magic)
    decoded = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    difference = np.abs(decoded - render(sample(0, 0)))
    assert difference.max() == 0 if form == "png" else difference.mean() < 5
