import numpy as np
import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.multilabel import MultiLabel

from .colours import picture, write_classification, write_tar
from .test_classification import npy


def write_multilabel(folder, members):
    write_classification(folder, {})
    (folder / "dataset_type.txt").write_text("multilabel\n")
    write_tar(folder / "test" / "0.tar", members)
    return folder


def one(key, present, *colours, content=None):
    return {f"{key}.png": picture(*colours), f"{key}.npy": content or npy(present)}


def test_mean_average_precision(tmp_path, embedder):
    """Red ranks: red (has it), red-blue (has it), blue (has not): 1. Green: the three pictures
    have none of it and tie, one is labelled: 1/3. Blue: blue, red-blue, red; the last alone is
    labelled: 1/3. Yellow and cyan have no image."""
    folder = write_multilabel(
        tmp_path,
        one("a", [1.0, 0, 0, 0, 0], "red")
        | one("b", [1, 1, 0, 0, 0], "red", "blue")
        | one("c", [0, 0, 0, 0, 0], "blue")
        | one("d", [1, 0], "blue")
        | one("e", [2, 0, 0, 0, 0], "blue")
        | one("é", None, "blue", content=b"-")
        | {"f.png": picture("red")[:40], "f.npy": npy([1, 0, 0, 0, 0])},
    )
    evaluator = MultiLabel("voc", folder)
    evaluator.check()
    found = evaluator.run(embedder)
    assert found.main == "mean_average_precision"
    assert found.scores["mean_average_precision"] == pytest.approx((1 + 1 / 3) / 2)
    assert found.scores["mean_average_precision_chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert [found.scores[k] for k in ("n", "classes", "classes_seen")] == [3, 5, 2]
    items = found.items["mean_average_precision"]
    assert items.keys.tolist() == ["0: red", "1: green"]
    np.testing.assert_allclose(items.values, [1, 1 / 3], rtol=1e-6)
    tar = f"{folder}/test/0.tar"
    assert found.skips.names == {
        ".npy holds no 5 labels, each 0 or 1": [
            f"{tar}:d.npy: 2 whole numbers",
            f"{tar}:e.npy: 5 whole numbers",
            f"{tar}:é.npy: 0 whole numbers",
        ],
        "image does not decode": [f"{tar}:f"],
    }


def test_set_of_one_label_or_of_none(tmp_path, embedder):
    folder = write_multilabel(tmp_path / "none", one("a", [0] * 5, "red"))
    with pytest.raises(EvalDataError, match="no image has a class"):
        MultiLabel("voc", folder).run(embedder)
    (folder / "dataset_type.txt").write_text("retrieval")
    with pytest.raises(EvalDataError, match="says 'retrieval', this task reads 'multilabel'"):
        MultiLabel("voc", folder).check()
    empty = write_multilabel(tmp_path / "empty", {})
    with pytest.raises(EvalDataError, match=r"holds no images \(tar is empty: 1"):
        MultiLabel("voc", empty).run(embedder)
