import json
import os

import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.folders import CaptionFile, ImageFolder, utf8_name
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.retrieval import Retrieval
from hqclip_jax.evals.zeroshot import ZeroShot

from .colours import picture


def write_folder(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def test_folder_per_class(tmp_path, embedder):
    """Two right, one red filed under green; a class without images, a note, a broken picture."""
    root = write_folder(
        tmp_path,
        {
            "green/a.png": picture("red"), "green/deep/é.PNG": picture("green"),
            "red/b.jpeg": picture("red"), "red/broken.jpg": picture("red")[:40],
            "red/note.txt": b"a note", "red/.DS_Store": b"-", ".cache/x.png": b"-",
        },
    )  # fmt: skip
    (root / "blue").mkdir()
    (root / "zeroshot_classification_templates.txt").write_text("some {c}")
    evaluator = ZeroShot("colours", root)
    evaluator.check()
    found = evaluator.run(embedder)
    assert found.scores["top1"] == pytest.approx(2 / 3)
    assert [found.scores[k] for k in ("n", "classes", "classes_seen")] == [3, 3, 2]
    assert found.skips.names == {
        "image does not decode": [f"{root}/red/broken.jpg"],
        "no image (.jpg, .jpeg, .png, .webp)": [f"{root}/red/note.txt"],
    }
    assert f"{root}/green/deep/é.PNG" in found.items["top1"].keys


def test_split_folder_and_names_beside_it(tmp_path):
    write_folder(tmp_path, {"val/n1/a.png": b"A", "val/n2/a.png": b"B", "train/n1/a.png": b"C"})
    (tmp_path / "val" / "classnames.txt").write_text("tench\ngoldfish\n")
    data = ImageFolder.open(tmp_path, "val", None, None)
    assert data.classnames == ("tench", "goldfish")
    assert [(e.image, e.label) for e in data.examples(Skips())] == [(b"A", 0), (b"B", 1)]
    with pytest.raises(EvalDataError, match="holds train, val and no test: name one as the set's"):
        ImageFolder.open(tmp_path, "test", None, None)
    with pytest.raises(EvalDataError, match="holds no folder per class"):
        ImageFolder.open(tmp_path / "val" / "n1", "test", None, None)


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    folder = tmp_path / "red"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"A")
    (example,) = ImageFolder.open(tmp_path, "test", None, None).examples(Skips())
    assert example.source == utf8_name(folder / os.fsdecode(b"caf\xe9.png"))
    assert example.source.encode().endswith(rb"caf\xe9.png")


def write_coco(root):
    images = [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}]
    images += [{"id": 9, "file_name": "gone.png"}, {"id": 4, "file_name": "silent.png"}]
    texts = [(3, "blue"), (7, " red "), (7, "red thing"), (9, "green")]
    annotations = [{"image_id": i, "caption": c} for i, c in texts]
    (root / "captions_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    write_folder(root / "val2017", {"a.png": picture("red"), "b.png": picture("blue")})
    write_folder(root / "val2017", {"silent.png": picture("green")})
    return Retrieval("coco", root / "captions_val2017.json", root / "val2017")


def test_cocos_captions(tmp_path, embedder, caplog):
    evaluator = write_coco(tmp_path)
    evaluator.check()
    assert "1 images are missing" in caplog.text
    assert "gone.png" in caplog.text
    examples = list(evaluator.examples(Skips()))
    assert [e.captions for e in examples] == [("red", "red thing"), ("blue",)]
    found = evaluator.run(embedder)
    assert (found.scores["n"], found.scores["captions"]) == (2, 3)
    assert found.scores["recall_at_1"] == 1
    assert found.skips.names == {
        "image is missing": [f"{tmp_path}/val2017/gone.png"],
        "image has no caption": [f"{tmp_path}/val2017/silent.png"],
    }


def test_karpathys_split(tmp_path):
    sentences = [{"raw": "one"}, {"raw": " two"}]
    stored = [
        {"filename": "a.jpg", "filepath": "val2014", "split": "test", "sentences": sentences},
        {"filename": "b.jpg", "split": "test", "sentences": sentences[:1]},
        {"filename": "c.jpg", "split": "train", "sentences": sentences},
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": stored}))
    images = write_folder(tmp_path / "images", {"val2014/a.jpg": b"A", "b.jpg": b"B"})
    found = list(CaptionFile.open(file, images).examples(Skips()))
    assert [(e.image, e.captions) for e in found] == [(b"A", ("one", "two")), (b"B", ("one",))]
    with pytest.raises(EvalDataError, match="holds no image of the split 'val'"):
        CaptionFile.open(file, images, "val")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "has no list `images`"),
        ("{", "is not JSON"),
        ('{"images": [{"filename": "a"}]}', "lacks or misuses the field 'split'"),
        ('{"images": [{"id": 1}], "annotations": []}', "lacks or misuses the field 'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "none of the images of"),
    ],
)
def test_unusable_caption_file(tmp_path, content, message):
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(EvalDataError, match=message):
        Retrieval("r", file, tmp_path).check()


def test_captions_without_their_folder(tmp_path):
    with pytest.raises(EvalDataError, match="nowhere is no folder, but the images of"):
        Retrieval("r", tmp_path / "captions.json", tmp_path / "nowhere").check()
