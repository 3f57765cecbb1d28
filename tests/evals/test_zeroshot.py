import numpy as np
import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.zeroshot import ZeroShot, classification_scores, zero_shot_classifier

from .colours import COLOURS, picture, write_classification, write_tar


def test_classifier_is_the_normalised_mean_of_normalised_templates(embedder):
    """ "red blue" and "red": the mean of the units, not the unit of the mean colour."""
    found = zero_shot_classifier(embedder, ["red"], ["{c} blue", "only {c}"])
    mean = (np.array([1, 0, 1]) / np.sqrt(2) + np.array([1, 0, 0])) / 2
    np.testing.assert_allclose(found, [mean / np.linalg.norm(mean)], atol=1e-6)


def test_braces_in_names_and_templates_are_text(embedder):
    assert zero_shot_classifier(embedder, ["{red} red"], ["{} {c} {x}"]).shape == (1, 3)


def test_scores_by_hand():
    ranks = np.array([0, 0, 4, 0, 5, 9])
    labels = np.array([0, 0, 0, 1, 1, 7])
    found = classification_scores(ranks, labels, classes=20)
    assert found == pytest.approx(
        {
            "top1": 3 / 6, "top1_chance": 0.05,
            "top5": 4 / 6, "top5_chance": 0.25,
            "mean_per_class": (2 / 3 + 1 / 2 + 0) / 3, "mean_per_class_chance": 0.05,
            "n": 6, "classes": 20, "classes_seen": 3,
        }
    )  # fmt: skip


def test_evaluator(tmp_path, embedder):
    """Seven pictures: five right, "red" filed under green and "blue" under cyan.

    Red is nearest to itself, then to yellow, then equally far from green, blue and cyan (0), so
    the label green has two classes before it. Blue: itself, cyan: one before it.
    """
    folder = write_classification(tmp_path, {c: i for i, c in enumerate(COLOURS)})
    more = write_classification(tmp_path / "more", {"red": 1, "blue": 4})
    (more / "test" / "0.tar").rename(folder / "test" / "1.tar")
    (folder / "test" / "nshards.txt").write_text("2")
    evaluator = ZeroShot("colours", folder)
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    assert found["top1"] == pytest.approx(5 / 7)
    assert found["top5"] == found["top5_chance"] == 1
    assert found["mean_per_class"] == pytest.approx((1 + 1 / 2 + 1 + 1 + 1 / 2) / 5)
    assert (found["n"], found["classes"]) == (7, 5)
    for score, items in outcome.items.items():
        assert items.score() == pytest.approx(found[score])
        assert len({*items.keys}) == 7


def test_score_stands_on_what_is_whole(tmp_path, embedder):
    folder = write_classification(tmp_path, {"red": 0, "blue": 2})
    more = {"bad.png": picture("red")[:30], "bad.cls": "0", "é.png": picture("green"), "é.cls": "9"}
    write_tar(folder / "test" / "1.tar", more)
    write_tar(folder / "test" / "2.tar", {})
    (folder / "test" / "nshards.txt").write_text("3")
    outcome = ZeroShot("colours", folder).run(embedder)
    assert (outcome.scores["n"], outcome.scores["classes_seen"], outcome.skips.total) == (2, 2, 3)
    assert outcome.skips.names == {
        "image does not decode": [f"{folder}/test/1.tar:bad"],
        "label is no class from 0 to 4": [f"{folder}/test/1.tar:é.cls: '9'"],
        "tar is empty": [f"{folder}/test/2.tar"],
    }


def test_empty_and_missing_sets(tmp_path, embedder):
    folder = write_classification(tmp_path / "set", {"red": 0})
    write_tar(folder / "test" / "0.tar", {})
    with pytest.raises(EvalDataError, match=r"no images \(tar is empty: 1, such as .*0\.tar\)"):
        ZeroShot("empty", folder).run(embedder)
    with pytest.raises(EvalDataError, match="nowhere is missing"):
        ZeroShot("missing", tmp_path / "nowhere").check()
