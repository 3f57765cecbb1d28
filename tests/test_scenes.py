import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hqclip_jax import scenes, shapes
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.shapes import Group, Scene, sample

SCENE = Scene(
    (0, 0, 0),
    (Group("red", "square", "large", "plain", 1), Group("blue", "cross", "small", "dotted", 2)),
    "left of",
    "white",
)
HELD_OUT_WORDS = [f"{color} {shape}" for color, shape in shapes.HELD_OUT]


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_description_tells_the_facts():
    assert scenes.caption(SCENE) == "a large red square left of two small blue crosses"
    assert scenes.describe(SCENE) == [
        "a red square left of two blue crosses",
        "a plain square and dotted crosses",
        "a large square and small crosses",
        "three shapes on white",
    ]
    assert scenes.tags(SCENE) == [
        "red square", "red", "square", "plain square",
        "blue cross", "blue", "cross", "dotted cross",
        "three shapes", "white background",
    ]  # fmt: skip
    alone = Scene((0, 0, 0), (Group("red", "moon"),), "", "gray")
    assert scenes.describe(alone) == [
        "a red moon",
        "a plain moon",
        "a large moon",
        "one shape on gray",
    ]


def test_paraphrases_are_both_true():
    assert scenes.paraphrases(SCENE) == [
        "a large red square left of two small blue crosses on a white background",
        "on a white background, two small blue crosses right of a large red square",
    ]


def test_every_negative_sentence_mirrors_a_description_and_is_false():
    for index in range(200):
        scene = sample(0, index)
        texts = scenes.annotation(scene)
        assert len(texts["desc"]) == len(texts["neg_desc"]) == 4
        assert not set(texts["desc"]) & set(texts["neg_desc"])
        assert texts["neg_tags"] and not set(texts["neg_tags"]) & set(texts["tags"])


def test_a_negative_is_a_picture_that_could_be():
    """Its sentences agree with each other, so that no text betrays itself."""
    negatives = [scenes.contradict(SCENE, np.random.default_rng(k)) for k in range(300)]
    for negative in negatives:
        assert (
            len({g.shape for g in negative.groups}) == len({g.color for g in negative.groups}) == 2
        )
        assert negative.count <= 3 and not negative.held_out
    first = {scenes.describe(negative)[0] for negative in negatives}
    assert "a blue square left of two red crosses" in first
    assert "a red square above a blue cross" in first
    assert "a green square left of two blue crosses" in first
    assert "a red square left of two blue stars" in first
    assert {n.background for n in negatives} == {"white", "gray", "black"}


def test_training_texts_never_name_a_held_out_pair():
    for index in range(1000):
        scene = sample(0, index)
        lists = scenes.annotation(scene).values()
        texts = [scenes.alt_text(scene, scene.rng(2)), *("\n".join(texts) for texts in lists)]
        told = "\n".join(texts).lower().replace("_", " ")
        assert not [pair for pair in HELD_OUT_WORDS if pair in told]


def test_alt_texts_are_as_poor_as_the_webs():
    texts = [scenes.alt_text(s, s.rng(2)) for s in (sample(0, i) for i in range(2000))]
    colors = [any(c in t.lower() for c in shapes.COLORS) for t in texts]
    pairs = [f"{c} {s}" for c, s in shapes.PAIRS]
    named = [any(p in t.lower() for p in pairs) for t in texts]
    files = [t.endswith((".JPG", ".jpg", ".png")) or t.startswith("DSC") for t in texts]
    full = [" of " in t.lower().removeprefix("vector image of") for t in texts]
    assert 0.5 < np.mean(colors) < 0.8
    assert 0.4 < np.mean(named) < 0.6
    assert np.mean(files) == pytest.approx(scenes.ALT_TEXTS["file"], abs=0.03)
    assert 0.05 < np.mean(full) < 0.2
    assert sum(scenes.ALT_TEXTS.values()) == pytest.approx(1)


def test_joined_descriptions_and_negatives_fit_32_tokens():
    length = ClipTokenizer().length
    for index in range(500):
        scene = sample(0, index, shapes.SPLITS[index % 2])
        for texts in scenes.annotation(scene).values():
            assert length(", ".join(texts)) <= 32


def test_pairs_and_annotations_join_by_uid(tmp_path):
    scenes.write_pairs(tmp_path / "pairs", 25, shard=10)
    scenes.write_annotations(tmp_path / "annotations", 25, missing=0.08, shard=10)
    pairs = [read_tar(p) for p in sorted((tmp_path / "pairs").iterdir())]
    assert [len(p) for p in pairs] == [30, 30, 15]
    about = json.loads(pairs[1]["000010002.json"])
    assert about["uid"] == sample(0, 12).uid
    assert about["caption"].encode() == pairs[1]["000010002.txt"]
    assert about["key"] == "000010002"
    uids = [json.loads(v)["uid"] for p in pairs for k, v in p.items() if k.endswith(".json")]

    annotations = [read_tar(p) for p in sorted((tmp_path / "annotations").iterdir())]
    names = [name for tar in annotations for name in tar]
    assert [n.split("/")[0] for n in names] == ["000000"] * 10 + ["000001"] * 10 + ["000002"] * 3
    found = [n.split("/")[1].removesuffix(".json") for n in names]
    assert set(found) < set(uids) and len(found) == 23  # 8% of 25 are missing
    assert found != [u for u in uids if u in found]
    first = json.loads(annotations[0][names[0]])
    assert first == scenes.annotation(sample(0, uids.index(found[0])))
    assert list(first) == ["tags", "neg_tags", "desc", "neg_desc"]


def test_writing_twice_gives_equal_bytes_and_leaves_nothing_temporary(tmp_path):
    for name in ("a", "b"):
        scenes.write_pairs(tmp_path / name, 5, seed=4, split="test")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["00000.tar"]
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


def test_zeroshot_shows_the_class_that_it_names(tmp_path):
    scenes.write_zeroshot(tmp_path, per_class=2, pairs=[("green", "star"), ("red", "circle")])
    names = (tmp_path / "classnames.txt").read_text().splitlines()
    assert len(names) == 48
    tar = read_tar(tmp_path / "test/0.tar")
    labels = [names[int(v)] for k, v in tar.items() if k.endswith(".cls")]
    assert labels == ["green star"] * 2 + ["red circle"] * 2
    assert (tmp_path / "test/nshards.txt").read_text().strip() == "1"
    assert "{c}" in (tmp_path / "zeroshot_classification_templates.txt").read_text()
    with tarfile.open(tmp_path / "test/0.tar") as opened:
        image = np.asarray(Image.open(opened.extractfile("s0000000.png"))).astype(int)
    green = np.abs(image - shapes.COLORS["green"]).max(axis=-1) < 40
    assert 60 < green.sum() < 600


def test_retrieval_captions_fit_one_picture_only(tmp_path):
    scenes.write_retrieval(tmp_path, 150)
    tar = read_tar(tmp_path / "00000.tar")
    captions = [c for k, v in tar.items() if k.endswith(".json") for c in json.loads(v)["captions"]]
    assert len(captions) == len(set(captions)) == 300
    assert sum(name.endswith(".png") for name in tar) == 150


def test_hard_negatives_take_turns_and_differ_in_their_category(tmp_path):
    scenes.write_hard_negatives(tmp_path, 60)
    items = [json.loads(v) for k, v in read_tar(tmp_path / "00000.tar").items() if ".json" in k]
    assert [i["category"] for i in items] == list(scenes.CATEGORIES) * 10
    words = {
        "color": set(shapes.COLORS), "size": set(shapes.SIZES),
        "relation": {"left", "right", "of", "above", "below"},
    }  # fmt: skip
    for item in items:
        a, b = item["caption"].split(), item["negative_caption"].split()
        if item["category"] in words:
            assert set(a) ^ set(b) <= words[item["category"]]
        if item["category"] == "swap":
            assert sorted(a) == sorted(b)
        assert a != b


def test_imports_without_jax_or_tensorflow():
    check = (
        "import sys, hqclip_jax.scenes;"
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'torch'} & set(sys.modules);"
        "sys.exit(f'{heavy} came along' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
