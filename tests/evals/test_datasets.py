import json
import tarfile

import pytest

from hqclip_jax.evals.classification import ClassificationFolder
from hqclip_jax.evals.datasets import (
    EvalDataError,
    read_captioned,
    read_contrasted,
    read_files,
    read_tar,
    tar_files,
)
from hqclip_jax.evals.outcome import Skips

from .colours import picture, write_classification, write_tar


def test_members_are_grouped_by_key_up_to_the_first_dot(tmp_path):
    tar = write_tar(
        tmp_path / "0.tar",
        {"d.0/a.JPG": "1", "d.0/a.txt": "2", "README": "-", "d.1/a.seg.png": "3", "._b.jpg": "-"},
    )
    assert list(read_tar(tar, Skips())) == [
        (f"{tar}:d.0/a", {"jpg": b"1", "txt": b"2"}),
        (f"{tar}:d.1/a", {"seg.png": b"3"}),
    ]


def read(tar):
    """Keys of the samples, and what was left out."""
    skips = Skips()
    return [source.rpartition(":")[2] for source, _ in read_tar(tar, skips)], skips


CUT = "tar is cut short or no uncompressed tar"


def test_what_stands_before_a_cut_is_read_and_the_cut_is_counted(tmp_path):
    # 1536 bytes a member: a header and two blocks
    whole = write_tar(tmp_path / "0.tar", {f"{i}.txt": "x" * 900 for i in range(9)}).read_bytes()
    bad = tmp_path / "bad.tar"
    bad.write_bytes(whole[: 4 * 1536 + 700])
    keys, skips = read(bad)
    assert keys == ["0", "1", "2", "3"]
    assert skips.counts == {CUT: 1}
    assert skips.names[CUT][0].startswith(f"{bad}: unexpected end")
    broken = bytearray(whole)
    broken[4 * 1536] ^= 1
    for content in (whole[: 4 * 1536], broken):  # where tarfile sees a regular end
        bad.write_bytes(content)
        keys, skips = read(bad)
        assert keys == ["0", "1", "2"]  # of the fourth something may be missing
        assert skips.names == {CUT: [f"{bad} at byte 6,144"]}
    with tarfile.open(bad, "w:gz") as tar:
        tar.add(tmp_path / "0.tar", "0.txt")
    keys, skips = read(bad)
    assert (keys, skips.counts) == ([], {CUT: 1})


def test_an_empty_tar_is_counted(tmp_path):
    empty = write_tar(tmp_path / "0.tar", {})
    assert read(empty)[1].names == {"tar is empty": [str(empty)]}


def test_tar_files_of_every_layout(tmp_path):
    one = write_tar(tmp_path / "plain" / "b.tar", {"0.txt": ""})
    two = write_tar(tmp_path / "plain" / "a.tar", {"0.txt": ""})
    assert tar_files(one) == [one]
    assert tar_files(one.parent) == [two, one]
    counted = tmp_path / "wds"
    shards = [write_tar(counted / "test" / f"{i}.tar", {"0.txt": ""}) for i in range(11)]
    (counted / "test" / "nshards.txt").write_text("11\n")
    assert tar_files(counted) == shards  # 10 after 9, not after 1
    shards[3].unlink()
    with pytest.raises(EvalDataError, match=r"promises 11 tars, missing beside it: 3\.tar"):
        tar_files(counted)
    (counted / "test" / "nshards.txt").write_text("many")
    with pytest.raises(EvalDataError, match=r"nshards\.txt holds 'many'"):
        tar_files(counted)
    with pytest.raises(EvalDataError, match="nothing is missing"):
        tar_files(tmp_path / "nothing")
    with pytest.raises(EvalDataError, match=r"neither test/nshards\.txt nor a \.tar"):
        tar_files(tmp_path)


def test_classification_folder(tmp_path):
    folder = write_classification(tmp_path / "set", {"red": 0, "blue": 2})
    data = ClassificationFolder.open(folder)
    assert data.classnames == ("red", "green", "blue", "yellow", "cyan")
    assert data.templates == ("a {c} thing", "some {c}")
    examples = list(data.examples(Skips()))
    assert [e.label for e in examples] == [0, 2]
    assert [e.image for e in examples] == [picture("red"), picture("blue")]
    assert examples[1].source == f"{folder}/test/0.tar:s1"


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("classnames.txt", None, r"classnames\.txt is missing"),
        ("classnames.txt", "a\n\nb", "blank line among its 3"),
        ("classnames.txt", "", "is empty"),
        ("zeroshot_classification_templates.txt", "a {}", r"'a \{\}' has no \{c\}"),
        ("dataset_type.txt", "multilabel", "says 'multilabel'"),
        ("test/nshards.txt", "2", r"missing beside it: 1\.tar"),
    ],
)
def test_unusable_classification_folder(tmp_path, file, content, message):
    folder = write_classification(tmp_path, {"red": 0})
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(EvalDataError, match=message):
        ClassificationFolder.open(folder)


@pytest.mark.parametrize("label", ["5", "-1", "cat", "", None])
def test_a_label_that_is_no_class_is_counted(tmp_path, label):
    folder = write_classification(tmp_path, {"red": 0})
    members = {"k.png": picture("red"), "k.cls": label or "", "l.png": picture("red"), "l.cls": "4"}
    if label is None:
        del members["k.cls"]
    tar = write_tar(folder / "test" / "0.tar", members)
    skips = Skips()
    found = list(ClassificationFolder.open(folder).examples(skips))
    assert [e.label for e in found] == [4]
    assert skips.names == {"label is no class from 0 to 4": [f"{tar}:k.cls: {label or ''!r}"]}


def test_captions_from_json_or_lines(tmp_path):
    tar = write_tar(
        tmp_path / "0.tar",
        {
            "a.jpg": "A", "a.txt": "first", "a.json": json.dumps({"captions": ["one", " two "]}),
            "b.webp": "B", "b.json": json.dumps({"caption": "three"}),
            "c.png": "C", "c.txt": "four\n\nfive\n",
        },
    )  # fmt: skip
    found = [(e.image, e.captions) for e in read_captioned(tar, Skips())]
    assert found == [(b"A", ("one", "two")), (b"B", ("three",)), (b"C", ("four", "five"))]


@pytest.mark.parametrize("content, message", [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_unusable_captions(tmp_path, content, message):
    tar = write_tar(tmp_path / "0.tar", {"k.jpg": "", "k.json": content})
    with pytest.raises(EvalDataError, match=f"k.json {message}"):
        list(read_captioned(tar, Skips()))


@pytest.mark.parametrize(
    "members, reason, name",
    [
        ({"k.jpg": "", "k.json": '{"caption": ""}'}, "no caption", "k"),
        ({"k.txt": "a caption"}, "no image", "k: only .txt"),
    ],
)
def test_what_one_image_lacks_is_counted(tmp_path, members, reason, name):
    tar = write_tar(tmp_path / "0.tar", members | {"l.jpg": "", "l.txt": "a caption"})
    skips = Skips()
    assert [e.source for e in read_captioned(tar, skips)] == [f"{tar}:l"]
    ((found, names),) = skips.names.items()
    assert found.startswith(reason)
    assert names == [f"{tar}:{name}"]


def test_hard_negatives_in_a_tar(tmp_path):
    one = {"caption": "a dog", "negative_caption": "a cat", "category": "obj"}
    two = {"captions": ["a hat", "the hat"], "negative_caption": "a cap"}
    tar = write_tar(
        tmp_path / "0.tar",
        {"a.jpg": "A", "a.json": json.dumps(one), "b.png": "B", "b.json": json.dumps(two)},
    )
    found = [(e.image, *e.items) for e in read_contrasted(tar, Skips())]
    assert [(image, item.right, item.wrong, item.category) for image, item in found] == [
        (b"A", ("a dog",), ("a cat",), "obj"),
        (b"B", ("a hat",), ("a cap",), ""),
    ]
    write_tar(tar, {"a.jpg": "A", "a.json": '{"caption": "a dog"}'})
    with pytest.raises(EvalDataError, match=r"a\.json has no `negative_caption`"):
        list(read_contrasted(tar, Skips()))


def test_real_sets(real_data):
    grocery = ClassificationFolder.open(real_data / "grocery" / "zeroshot")
    labels = [e.label for e in grocery.examples(Skips())]
    assert (len(grocery.classnames), len(grocery.templates)) == (81, 3)
    assert (len(labels), set(labels)) == (2485, set(range(81)))
    coco = list(read_captioned(real_data / "coco_ccby" / "00000.tar", Skips()))
    assert {len(e.captions) for e in coco} == {5}
    assert len(coco) == 47


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    files = ["swig/1.jpg", "visdial/1.jpg", "swig/2.jpg"]
    tar = write_tar(tmp_path / "0.tar", {f: f for f in [*files, "other/1.jpg"]})
    skips = Skips()
    found = [(file, image.decode()) for file, _, image in read_files(tar, files, skips)]
    assert found == [(f, f) for f in files] and not skips.total
    flat = write_tar(tmp_path / "1.tar", {"1.jpg": "1", "2.jpg": "2"})
    assert [(f, i) for f, _, i in read_files(flat, files, skips)] == [("swig/2.jpg", b"2")]
    assert skips.counts == {"an item's image is missing": 2}  # which of them 1.jpg is nobody knows
