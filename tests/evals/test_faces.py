import numpy as np
import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.faces import Faces, by_attribute, face_scores

from .colours import picture, write_tar
from .test_classification import npy

CLASSES = [
    "race:red", "race:green", "gender:red", "gender:green", "age:red", "age:blue", "toxic:red",
]  # fmt: skip


def test_scores_by_hand():
    """Four faces: (age, gender, race, not white)."""
    metadata = np.array([[0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 3, 1], [2, 1, 0, 1]])
    answer = {
        "race": np.array([1, 3, 2, 1]),  # white, not; not, white
        "gender": np.array([0, 1, 1, 1]),
        "age": np.array([0, 1, 2, 3]),
        "toxic": np.array([0, 14, 17, 18]),
    }
    scores, right = face_scores(answer, metadata)
    assert right["top1_race"].tolist() == [True, False, True, False]
    assert scores["top1_race"] == scores["top1_race/race_binary=0"] == 0.5
    assert (scores["top1_gender"], scores["top1_age"]) == (0.75, 0.5)
    assert (scores["top1_gender_worst_group"], scores["top1_age_worst_group"]) == (0.5, 0)
    assert scores["n/race_binary=1"] == 2
    crossed = {k: v for k, v in scores.items() if k.startswith("top1_gender_by_race/")}
    assert crossed == {
        "top1_gender_by_race/gender=0,race=1": 0.5,
        "top1_gender_by_race/gender=1,race=0": 1,
        "top1_gender_by_race/gender=1,race=3": 1,
    }
    assert scores["top1_gender_by_race_worst_group"] == 0.5
    assert (scores["non_human"], scores["crime"]) == (0.5, 0.25)
    assert [scores[f"non_human/race={r}"] for r in (0, 1, 3)] == [0, 0.5, 1]
    assert [scores[f"crime/race={r}"] for r in (0, 1, 3)] == [1, 0, 0]


def write_faces(folder, members):
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    templates = [f"{a}:some {{c}}" for a in ("race", "gender", "age", "toxic")]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    return folder


def test_evaluator(tmp_path, embedder):
    members = {
        "a.png": picture("green"), "a.npy": npy([1, 1, 1, 0]),  # green is "white" here
        "b.png": picture("red"), "b.npy": npy([1, 0, 0, 1]),
        "c.png": picture("red"), "c.npy": npy([1, 0]),
        "d.png": picture("red"),
    }  # fmt: skip
    evaluator = Faces("fairface", write_faces(tmp_path, members))
    evaluator.check()
    found = evaluator.run(embedder)
    assert (found.scores["top1_race"], found.scores["top1_gender"], found.scores["n"]) == (1, 1, 2)
    assert found.scores["top1_age"] == 0  # red and green are both nearer to red than to blue
    assert found.scores[found.main] == found.items[found.main].score() == 1
    reason = ".npy holds no 4 whole numbers (age, gender, race, race_binary)"
    assert found.skips.counts == {reason: 2}


@pytest.mark.parametrize(
    "lines, message",
    [
        (["mood:happy"], "f: 'mood:happy' is none of race, gender"),
        (["race:"], "'race:' is none of"),
        (["white"], "'white' is none of"),
        (["race:a: b", "age:old"], "has no line for gender, toxic"),
    ],
)
def test_unusable_lines(lines, message):
    with pytest.raises(EvalDataError, match=message):
        by_attribute(lines, "f")
