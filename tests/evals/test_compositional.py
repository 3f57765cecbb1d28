import json

import numpy as np
import pytest

from hqclip_jax.evals.compositional import HardNegatives, choice_scores
from hqclip_jax.evals.datasets import EvalDataError

from .colours import picture, write_tar


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


def hard(caption, negative, category=""):
    return json.dumps({"caption": caption, "negative_caption": negative, "category": category})


def test_evaluator_on_a_tar(tmp_path, embedder):
    """One right, one wrong, and one whose texts differ only behind the two tokens kept: a tie."""
    tar = write_tar(
        tmp_path / "0.tar",
        {
            "a.png": picture("red"), "a.json": hard("a red thing", "a blue thing"),
            "b.png": picture("green"), "b.json": hard("a blue thing", "a yellow thing"),
            "c.png": picture("red", "blue"), "c.json": hard("red blue cyan", "red blue green"),
        },
    )  # fmt: skip
    evaluator = HardNegatives("colours", tar)
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["tie_rate"] == pytest.approx(1 / 3)
    assert found["n"] == 3


def test_evaluator_on_sugarcrepes_json(tmp_path, embedder):
    """Two items on one picture, one on another: each is scored with its own picture."""
    tar = write_tar(tmp_path / "0.tar", {"r.png": picture("red"), "g.png": picture("green")})
    rows = [("g.jpg", "green", "red"), ("r.jpg", "red", "green"), ("r.jpg", "blue", "yellow")]
    items = [
        {"filename": f, "caption": c, "negative_caption": n, "category": f[0]} for f, c, n in rows
    ]
    (tmp_path / "items.json").write_text(json.dumps(items))
    evaluator = HardNegatives("colours", tmp_path / "items.json", tar)
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    assert found["accuracy/g"] == 1
    assert found["accuracy/r"] == 1 / 2
    assert found["accuracy"] == outcome.items["accuracy"].score() == pytest.approx(2 / 3)
    assert len({*outcome.items["accuracy"].keys}) == 3


def test_missing_files(tmp_path, embedder):
    tar = write_tar(tmp_path / "0.tar", {})
    with pytest.raises(EvalDataError, match="holds no items"):
        HardNegatives("empty", tar).run(embedder)
    with pytest.raises(EvalDataError, match=r"items\.json is missing"):
        HardNegatives("x", tmp_path / "items.json", tar).check()
    with pytest.raises(EvalDataError, match=r"images is missing"):
        HardNegatives("x", tar, tmp_path / "images").check()
