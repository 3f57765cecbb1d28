import io
import json
import tarfile

import numpy as np
import pytest

from hqclip_jax.evals.classification import ClassificationFolder, open_labelled, with_metadata
from hqclip_jax.evals.datasets import EvalDataError, Labelled
from hqclip_jax.evals.embed import EmbeddingError
from hqclip_jax.evals.folders import ImageFolder
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.zeroshot import ZeroShot, zero_shot_classifier

from .colours import COLOURS, picture, write_classification, write_tar


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def write_grouped(folder, rows):
    """Rows of (colour, label, contents of .npy or None)."""
    write_classification(folder, {})
    members = {}
    for i, (colour, label, content) in enumerate(rows):
        members |= {f"s{i}.png": picture(colour), f"s{i}.cls": str(label)}
        members |= {} if content is None else {f"s{i}.npy": content}
    write_tar(folder / "test" / "0.tar", members)
    return folder


def test_numbers_beside_the_class(tmp_path):
    contents = [npy([3, 0]), npy(np.float32([2.0, 1.0])), None]
    odd = [npy([0.5]), npy([[1]]), npy(["a"]), npy([np.nan]), b"no npy", npy([{}])]
    rows = [("red", 0, content) for content in contents + odd]
    folder = write_grouped(tmp_path, rows)
    found = [e.metadata for e in ClassificationFolder.open(folder).examples(Skips())]
    assert found == [(3, 0), (2, 1), ()] + [()] * len(odd)


def test_examples_without_the_fields_are_counted():
    numbers = {"a": (1, 2, 3), "b": (1,), "c": ()}
    examples = [Labelled(key, b"", 0, metadata) for key, metadata in numbers.items()]
    skips = Skips()
    (kept,) = with_metadata(examples, ("region", "year"), skips)
    assert kept.metadata == (1, 2)
    reason = ".npy holds no 2 whole numbers (region, year)"
    assert skips.names == {reason: ["b.npy: 1", "c.npy: 0"]}


@pytest.mark.parametrize("content", ["classification", None])
def test_kind_of_set_must_be_the_tasks(tmp_path, content):
    folder = write_classification(tmp_path, {"red": 0})
    if content:
        (folder / "dataset_type.txt").write_text(content)
    ClassificationFolder.open(folder)
    if content:
        with pytest.raises(EvalDataError, match="says 'classification', this task reads 'multil"):
            ClassificationFolder.open(folder, kind="multilabel")


def test_layout_is_found_out(tmp_path):
    wds = write_classification(tmp_path / "wds", {"red": 0})
    assert isinstance(open_labelled(wds), ClassificationFolder)
    (wds / "test" / "nshards.txt").unlink()
    with pytest.raises(EvalDataError, match=r"neither test/nshards\.txt nor a \.tar"):
        open_labelled(wds)  # and not: a folder of the one class "test"
    (tmp_path / "folder" / "red").mkdir(parents=True)
    assert isinstance(open_labelled(tmp_path / "folder"), ImageFolder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvalDataError, match=r"classnames\.txt is missing"):
        open_labelled(tmp_path / "empty")
    with pytest.raises(EvalDataError, match="nowhere is missing"):
        open_labelled(tmp_path / "nowhere")


def test_tar_whose_names_are_no_utf8(tmp_path, embedder):
    folder = write_classification(tmp_path, {})
    with tarfile.open(folder / "test" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (("caf\udce9.png", picture("red")), ("caf\udce9.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (key,) = ZeroShot("s", folder).run(embedder).items["top1"].keys
    assert key.encode().endswith(rb"caf\xe9")


def test_names_from_elsewhere(tmp_path):
    folder = write_classification(tmp_path / "set", {"red": 0})
    (folder / "classnames.txt").unlink()
    table = {"c": [*COLOURS], "t": ["one {c}"]}
    (tmp_path / "en.json").write_text(json.dumps(table))
    data = open_labelled(folder, tmp_path / "en.json:c", tmp_path / "en.json:t")
    assert (data.classnames, data.templates) == (tuple(COLOURS), ("one {c}",))


def test_worst_group(tmp_path, embedder):
    """Group 0: one of two right. Group 4: both right. Group 7: not its one, but among five."""
    rows = [("red", 0, 0), ("red", 1, 0), ("green", 1, 4), ("blue", 2, 4), ("red", 4, 7)]
    folder = write_grouped(tmp_path, [(c, n, npy([2019, g])) for c, n, g in rows])
    fields = {"metadata": ("year", "region"), "group_by": "region"}
    evaluator = ZeroShot("fmow", folder, main="top1_worst_group", **fields)
    found = evaluator.run(embedder)
    assert found.main == "top1_worst_group"
    scores = found.scores
    assert [scores[f"top1/region={g}"] for g in (0, 4, 7)] == [0.5, 1, 0]
    assert [scores[f"n/region={g}"] for g in (0, 4, 7)] == [2, 2, 1]
    assert (scores["top1_worst_group"], scores["top5_worst_group"]) == (0, 1)
    assert [scores[f"top{k}_worst_group_chance"] for k in (1, 5)] == pytest.approx([0.2, 1])
    assert (scores["top1"], scores["n"]) == (pytest.approx(3 / 5), 5)
    by_year = ZeroShot("fmow", folder, metadata=("year", "region"), group_by="year").run(embedder)
    assert by_year.scores["top1_worst_group"] == by_year.scores["top1/year=2019"] == scores["top1"]


def test_image_of_no_group_is_left_out_and_named(tmp_path, embedder):
    folder = write_grouped(tmp_path, [("red", 0, npy([1])), ("green", 0, None)])
    found = ZeroShot("g", folder, metadata=("region",), group_by="region").run(embedder)
    assert (found.scores["n"], found.scores["top1"]) == (1, 1)
    assert found.skips.names == {
        ".npy holds no 1 whole numbers (region)": [f"{folder}/test/0.tar:s1.npy: 0"]
    }
    assert ZeroShot("g", folder).run(embedder).scores["n"] == 2


def test_f1_of_the_classes_with_images(tmp_path, embedder):
    """Red: 2 right of 2 labelled and 3 answered. Green: none of its one. Blue: no image, though
    one is answered so."""
    rows = [("red", 0, None), ("red", 0, None), ("red", 1, None), ("blue", 0, None)]
    found = ZeroShot("i", write_grouped(tmp_path, rows), main="f1_macro").run(embedder)
    assert found.scores["f1_macro"] == pytest.approx((2 * 2 / (3 + 3) + 0) / 2)
    # Drawn evenly from 5 classes, 4 answers: 0.8 of each; of them 0.6 and 0.2 are right.
    by_hand = (2 * 0.6 / (3 + 0.8) + 2 * 0.2 / (1 + 0.8)) / 2
    assert found.scores["f1_macro_chance"] == pytest.approx(by_hand)
    items = found.items["f1_macro"]
    assert items.keys.tolist() == ["0: red", "1: green"]
    assert items.score() == found.scores[found.main]


def test_missing_classes_and_images_are_told(tmp_path, embedder, caplog):
    folder = write_classification(tmp_path, {"red": 0, "green": 1})
    found = ZeroShot("colours", folder, classes=6, size=3).run(embedder)
    assert (found.scores["classes"], found.scores["classes_seen"], found.scores["n"]) == (5, 2, 2)
    assert "3 of 5 classes have no image: blue, yellow, cyan" in caplog.text
    assert "scored 2 images, the set has 3" in caplog.text
    assert "has 5 class names, the set has 6" in caplog.text


def test_class_whose_texts_have_no_direction(embedder):
    with pytest.raises(EmbeddingError, match="class 'mauve' have no direction"):
        zero_shot_classifier(embedder, ["red", "mauve"], ["some {c}"])


def test_another_split_of_tars(tmp_path):
    folder = write_classification(tmp_path, {"red": 0})
    (folder / "test").rename(folder / "train")
    (example,) = open_labelled(folder, split="train").examples(Skips())
    assert example.source == f"{folder}/train/0.tar:s0"
    with pytest.raises(EvalDataError, match=r"neither test/nshards\.txt nor a \.tar"):
        open_labelled(folder)
