import json

import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.valse import Valse

from .colours import picture, write_tar


def item(caption, foil, image="r.png", votes=3):
    return {
        "dataset": "SWiG", "image_file": image, "caption": caption, "foil": foil,
        "mturk": {"caption": votes, "foil": 0, "other": 0},
    }  # fmt: skip


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pieces = {
        "existence": {"e_0": item("red", "blue"), "e_1": item("blue", "red", votes=2)},
        "plurals": {"p_0": item("red", "green"), "p_1": item("blue", "red", votes=1)},
    }
    for piece, items in pieces.items():
        (folder / f"{piece}.json").write_text(json.dumps(items))
    return folder


@pytest.mark.parametrize("place", ["images", "images/SWiG", "images/tar"])
def test_pieces_and_their_mean_over_valid_items(data, embedder, place):
    if place == "images/tar":
        write_tar(data.parent / "images" / "0.tar", {"r.png": picture("red")})
    else:
        (data.parent / place).mkdir(parents=True)
        (data.parent / place / "r.png").write_bytes(picture("red"))
    evaluator = Valse("valse", data)
    evaluator.check()
    outcome = evaluator.run(embedder)
    found = outcome.scores
    assert (found["accuracy/existence"], found["accuracy/plurals"]) == (1 / 2, 1)
    assert found["accuracy_macro"] == 3 / 4
    assert (found["n"], outcome.main, outcome.skips.total) == (3, "accuracy_macro", 0)
    assert outcome.items["accuracy"].keys.tolist() == [
        "existence/e_0", "existence/e_1", "plurals/p_0",
    ]  # fmt: skip


def test_unusable(data, embedder, tmp_path):
    with pytest.raises(EvalDataError, match="images is missing"):
        Valse("valse", data).check()
    (tmp_path / "images").mkdir()
    with pytest.raises(EvalDataError, match=r"holds no items .*image is missing: 1"):
        Valse("valse", data).run(embedder)
    del (broken := item("a", "b"))["mturk"]
    (data / "existence.json").write_text(json.dumps({"e_0": broken}))
    with pytest.raises(EvalDataError, match=r"existence\.json: e_0 has no votes in `mturk`"):
        Valse("valse", data).run(embedder)
    with pytest.raises(EvalDataError, match=r"holds no \.json"):
        Valse("valse", tmp_path / "images").run(embedder)
