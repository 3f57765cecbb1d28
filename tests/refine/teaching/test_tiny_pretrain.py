import numpy as np
import pytest

from hqclip_jax.shapes import COLORS, SHAPES, Group, Scene
from refine.teaching.tiny_pretrain import GRID, QUESTIONS, answers

RED = Group("red", "star", "large", "striped")
BLUE = Group("blue", "moon", "small", "plain", 2)


def told(scene: Scene) -> dict[str, np.ndarray]:
    cells = answers(scene).reshape(GRID, GRID, len(QUESTIONS))
    return {name: cells[..., i] for i, name in enumerate(QUESTIONS)}


def test_cells_tell_what_is_in_them():
    found = told(Scene((0, 0, 0), (RED, BLUE), "left of", "black"))
    red, blue = (list(COLORS).index(c) + 1 for c in ("red", "blue"))
    # One star in the middle of the left half, two moons at a quarter and three of the right one.
    expected = [
        [0, 0, blue, blue],
        [red, red, blue, blue],
        [red, red, blue, blue],
        [0, 0, blue, blue],
    ]
    assert found["color"].tolist() == expected
    assert found["shape"][1, 0] == list(SHAPES).index("star") + 1
    assert found["count"][0, 3] == 2 and found["count"][1, 1] == 1
    assert (found["background"] == 2).all()


@pytest.mark.parametrize(
    ("relation", "first"), [("left of", 1), ("right of", 2), ("above", 1), ("below", 2)]
)
def test_the_place_is_that_of_the_picture_not_of_the_telling(relation, first):
    found = told(Scene((0, 0, 1), (RED, BLUE), relation, "white"))
    red = list(COLORS).index("red") + 1
    assert set(found["place"][found["color"] == red]) == {first}
    assert set(found["place"][found["color"] == 0]) == {0}


@pytest.mark.lvlm
def test_a_base_model_begins_to_see(tmp_path):
    from transformers import Qwen2VLForConditionalGeneration

    from refine.prompts import Prompt
    from refine.teaching.tiny_pretrain import make_base

    make_base(tmp_path / "a", Prompt("p", "look {{image}}{{caption}}"), 64, 60, 8, seed=1)
    make_base(tmp_path / "b", Prompt("p", "look {{image}}{{caption}}"), 64, 1, 8, seed=1)
    trained, fresh = (
        Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in "ab"
    )
    changed = {name for name in fresh if not np.allclose(fresh[name], trained[name], atol=1e-3)}
    assert changed and all("visual" in name for name in changed)
