import numpy as np
import pytest

from hqclip_jax.evals.compositional import CHOICE, Compositional, choice_scores, join
from hqclip_jax.evals.datasets import EvalDataError, Item, Pictured, Region
from hqclip_jax.evals.outcome import Skips

from .colours import picture


def test_scores_by_hand():
    margins = np.array([0.1, -0.1, 0.0, 0.2, 0.3])
    found = choice_scores(margins, ["att", "att", "att", "obj", "obj"])
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5, "accuracy_chance": 0.5, "tie_rate": 1 / 5, "n": 5,
            "accuracy_macro": (1 / 3 + 1) / 2, "accuracy_macro_chance": 0.5,
            "accuracy/att": 1 / 3, "accuracy/att_chance": 0.5, "n/att": 3,
            "accuracy/obj": 1.0, "accuracy/obj_chance": 0.5, "n/obj": 2,
        }
    )  # fmt: skip


def test_items_without_a_category_are_in_no_macro():
    assert "accuracy_macro" not in choice_scores(np.array([1.0]), [""])
    assert choice_scores(np.array([1.0, -1.0]), ["", "x"])["accuracy_macro"] == 0


def item(key, images, right, wrong=(), category=""):
    return Item(key, tuple(Region(image) for image in images), right, wrong, category)


@pytest.mark.parametrize("right, wrong, chance", [(1, 1, 1 / 2), (1, 4, 1 / 5), (2, 1, 1 / 3)])
def test_chance_is_what_cosines_in_any_order_reach(right, wrong, chance):
    asked = item("k", ["i"], ("r",) * right, ("w",) * wrong)
    assert CHOICE.chance(asked) == pytest.approx(chance)
    cosines = np.random.default_rng(0).random((20_000, 1 + right + wrong))
    held = [cosines[:, b] > cosines[:, c] for _, b, c in CHOICE.comparisons(asked)]
    assert np.all(held, axis=0).mean() == pytest.approx(chance, abs=0.015)


class InMemory(Compositional):
    asked = (
        item("a", ["red.png"], ("red",), ("blue", "green", "yellow")),
        item("b", ["red.png"], ("red blue",), ("green", "red")),
        item("c", ["blue.png"], ("blue",), ("red", "cyan")),
        item("d", ["gone.png"], ("blue",), ("red",)),
    )

    def items(self):
        return self.asked


def test_one_right_text_among_several(tmp_path, embedder):
    (tmp_path / "images").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(picture(colour))
    path = tmp_path / "set.json"
    with pytest.raises(EvalDataError, match=r"set\.json is missing"):
        InMemory("x", path).check()
    path.touch()
    InMemory("x", path).check()
    counts = []
    embedder.on_embedded = counts.append
    outcome = InMemory("x", path).run(embedder)
    assert sum(counts) == 2 + 6  # each image and each text once
    assert dict(zip(outcome.items["accuracy"].keys, outcome.items["accuracy"].values)) == {
        "a": 1, "b": 0, "c": 1,
    }  # fmt: skip
    assert outcome.scores["accuracy"] == outcome.items["accuracy"].score() == pytest.approx(2 / 3)
    assert outcome.scores["accuracy_chance"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 3) / 3)
    assert outcome.skips.names == {
        "an item's image is missing": [str(tmp_path / "images" / "gone.png")]
    }


def test_macro_is_the_mean_of_its_answers(tmp_path, embedder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(picture("red"))

    class Named(InMemory):
        asked = (
            item("a", ["red.png"], ("red",), ("blue",), "x"),
            item("b", ["red.png"], ("blue",), ("red",), "x"),
            item("c", ["red.png"], ("red",), ("blue",), "y"),
            item("d", ["red.png"], ("blue",), ("red",)),
        )

    outcome = Named("x", tmp_path / "set.json").run(embedder)
    assert outcome.scores["accuracy"] == 1 / 2
    assert outcome.scores["accuracy_macro"] == outcome.items["accuracy_macro"].score() == 3 / 4
    assert outcome.items["accuracy_macro"].keys.tolist() == ["a", "b", "c"]


def test_the_model_sees_the_box(tmp_path):
    """Of red above blue, the lower half is blue; both halves come from one reading."""
    (tmp_path / "two.png").write_bytes(picture("red", "blue", size=(16, 16)))
    halves = [Region("two.png", (0, y, 16, 8)) for y in (0, 8)]
    items = [Item(str(i), (half,), ("t",)) for i, half in enumerate(halves)]
    found = list(join(items, tmp_path, Skips()))
    assert [e.rgb().getpixel((5, 5)) for e in found] == [(255, 0, 0), (0, 0, 255)]
    assert [e.rgb().size for e in found] == [(16, 8)] * 2
    assert found[1].source == f"{tmp_path}/two.png at 0,8,16,8"


def test_an_image_that_comes_twice_moves_no_other(tmp_path, embedder):
    """Each example is a row of its own, however often its picture has been seen."""
    colours = "red", "green", "red", "blue"
    asked = [item(str(i), [c], (c,), ("yellow",)) for i, c in enumerate(colours)]

    class Repeated(InMemory):
        def examples(self, skips):
            for i, colour in enumerate(colours):
                region = Region(colour)
                yield Pictured(colour, picture(colour), region, (asked[i],))

    assert Repeated("x", tmp_path / "set.json").run(embedder).scores["accuracy"] == 1
