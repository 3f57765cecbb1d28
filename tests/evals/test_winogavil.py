import csv
import itertools
import json

import numpy as np
import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.metrics import jaccard
from hqclip_jax.evals.winogavil import WinoGAViL, chance, chosen, prompt, read_items

from .colours import picture

NAMES = ["red", "green", "blue", "yellow", "cyan"]


def write_set(folder, rows, images=None):
    (folder / "winogavil_images").mkdir(parents=True)
    for name, content in (images or {}).items():
        (folder / "winogavil_images" / f"{name}.jpg").write_bytes(content)
    with (folder / "winogavil_dataset.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "candidates", "cue", "associations", "ID"])
        for i, (candidates, cue, associations) in enumerate(rows):
            writer.writerow([i, json.dumps(candidates), cue, json.dumps(associations), i + 100])
    return folder


def test_evaluator(tmp_path, embedder):
    """Of ten candidates, the two reds are the cue's: one is associated, with a green. The item of
    five is all right, the last one lacks an image."""
    names = [f"{colour} {i}" for i in range(2) for colour in NAMES]
    images = {name: picture(name.split()[0]) for name in names} | {"tea é": picture("blue")}
    images["torn"] = picture("red")[:40]
    rows = [
        (names, "red", ["red 0", "green 1"]),
        (["tea é", *names[:4]], "blue", ["tea é", "blue 0"]),
        (["gone", *names[:4]], "red", ["red 0"]),
        (["torn", *names[:4]], "red", ["red 0"]),
    ]
    evaluator = WinoGAViL("winogavil", write_set(tmp_path, rows, images))
    evaluator.check()
    found = evaluator.run(embedder)
    scores = found.scores
    assert (found.main, scores["jaccard_10_12"]) == ("jaccard_10_12", pytest.approx(1 / 3))
    assert (scores["jaccard_5_6"], scores["jaccard"]) == (1, pytest.approx(2 / 3))
    assert (scores["jaccard/candidates=10"], scores["n/candidates=5"]) == (pytest.approx(1 / 3), 1)
    assert scores["n"] == 2
    for score, items in found.items.items():
        assert items.score() == pytest.approx(scores[score])
    table = tmp_path / "winogavil_dataset.csv"
    assert found.items["jaccard"].keys.tolist() == [f"{table}:100", f"{table}:101"]
    assert found.skips.names == {
        "image is missing": [f"{tmp_path}/winogavil_images/gone.jpg"],
        "image does not decode": [f"{tmp_path}/winogavil_images/torn.jpg"],
        "an item lacks a candidate's image": [f"{table}:102: gone", f"{table}:103: torn"],
    }


def test_chance_is_the_mean_over_all_draws():
    for candidates, right in ((5, 2), (6, 3), (10, 1)):
        truth = set(range(right))
        draws = [jaccard({*d}, truth) for d in itertools.combinations(range(candidates), right)]
        assert chance(candidates, right) == pytest.approx(sum(draws) / len(draws))


def test_nearest_candidates():
    assert chosen(np.array([0.1, 0.9, 0.5, 0.9]), 2) == {1, 3}
    assert chosen(np.zeros(4), 2) == {0, 1}


def test_prompt():
    assert (prompt("Eagle"), prompt("full Moon")) == ("An eagle", "A full moon")


@pytest.mark.parametrize(
    "row, message",
    [
        ((["a"], "x", ["b"]), r"dataset\.csv line 2: `candidates` and `assoc.*ValueError"),
        ((["a"], "", ["a"]), "line 2 has no `cue` or no `associations`"),
        ((["a"], "x", []), "line 2 has no `cue` or no `associations`"),
        ((3, "x", ["a"]), "line 2: `candidates`.*TypeError"),
    ],
)
def test_unusable_item(tmp_path, row, message):
    folder = write_set(tmp_path, [row])
    with pytest.raises(EvalDataError, match=message):
        read_items(folder / "winogavil_dataset.csv")


def test_unusable_set(tmp_path, embedder):
    with pytest.raises(EvalDataError, match=r"winogavil_dataset\.csv is missing"):
        WinoGAViL("w", tmp_path).check()
    folder = write_set(tmp_path / "set", [(["a"], "x", ["a"])])
    with pytest.raises(EvalDataError, match=r"holds no whole items \(image is missing: 1"):
        WinoGAViL("w", folder).run(embedder)
    (folder / "winogavil_images").rmdir()
    with pytest.raises(EvalDataError, match=r"unpack winogavil_images\.zip there"):
        WinoGAViL("w", folder).check()
    (folder / "winogavil_dataset.csv").write_text("candidates,cue,associations\n")
    with pytest.raises(EvalDataError, match="holds no items"):
        WinoGAViL("w", folder).check()
    small = write_set(tmp_path / "small", [(["a"], "red", ["a"])], {"a": picture("red")})
    with pytest.raises(EvalDataError, match="no item has 10 or 12 candidates"):
        WinoGAViL("w", small).run(embedder)
