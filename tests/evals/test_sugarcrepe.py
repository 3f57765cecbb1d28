import json
from collections import Counter

import pytest

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.sugarcrepe import HardNegatives, SugarCrepePlus

from .colours import picture, write_tar


def read(path, images, skips=None):
    return list(HardNegatives("x", path, images).examples(skips or Skips()))


def item(name, caption="yes", negative="no", **more):
    return {"filename": name, "caption": caption, "negative_caption": negative, **more}


def test_sugarcrepe_joins_items_to_images_by_name(tmp_path):
    file = tmp_path / "items.json"
    file.write_text(json.dumps([item("b.jpg", category="x"), item("a.jpg"), item("b.jpg", "2nd")]))
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": "A", "b.jpg": "B", "unused.jpg": "C"})
    expected = {b"A": ["yes"], b"B": ["yes", "2nd"]}
    found = list(read(file, tar))
    assert {e.image: [text for i in e.items for text in i.right] for e in found} == expected
    assert found[1].items[0].category == "x"
    assert found[0].items[0].category == "items"
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in (("a.jpg", b"A"), ("b.jpg", b"B")):
        (folder / name).write_bytes(content)
    found = list(read(file, folder))
    assert {e.image: [text for i in e.items for text in i.right] for e in found} == expected


def test_sugarcrepe_folder_takes_every_file_as_a_category(tmp_path):
    tar = write_tar(tmp_path / "images" / "0.tar", {"a.jpg": "A", "b.jpg": "B"})
    for category, name in (("add_att", "a.jpg"), ("swap_obj", "a.jpg"), ("add_obj", "b.jpg")):
        (tmp_path / f"{category}.json").write_text(json.dumps({"7": item(name)}))
    found = [i.category for e in read(tmp_path, tar) for i in e.items]
    assert sorted(found) == ["add_att", "add_obj", "swap_obj"]


def test_sugarcrepe_without_its_images_or_fields(tmp_path):
    file = tmp_path / "items.json"
    file.write_text(json.dumps([item("a.jpg"), item("b.jpg")]))
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": "A"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"A")
    for images, name in ((tar, f"{tar}: b.jpg"), (tmp_path / "images", f"{tmp_path}/images/b.jpg")):
        skips = Skips()
        assert [e.image for e in read(file, images, skips)] == [b"A"]
        assert skips.names == {"an item's image is missing": [name]}
    file.write_text(json.dumps([{"caption": "x"}]))
    with pytest.raises(EvalDataError, match="has no `filename`"):
        list(read(file, tar))
    file.write_text("[]")
    with pytest.raises(EvalDataError, match="holds no items"):
        list(read(file, tar))


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


def test_sugarcrepe_plus(tmp_path, embedder):
    """On red: all right; one caption only nearer than the negative; a negative that ties with a
    caption whose text it is but for what is cut; and one that is right of the image, but whose
    second caption is nearer to the negative than to the first."""
    rows = [
        ("red", "red red", "blue"),
        ("red", "blue", "yellow"),
        ("red yellow", "red", "red yellow cyan"),
        ("red", "red blue", "cyan red"),
    ]
    items = [
        {"filename": "r.png", "caption": one, "caption2": two, "negative_caption": negative}
        for one, two, negative in rows
    ]
    file = tmp_path / "swap.json"
    file.write_text(json.dumps(items))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "r.png").write_bytes(picture("red"))
    outcome = SugarCrepePlus("plus", file).run(embedder)
    found = outcome.scores
    assert found["accuracy"] == found["accuracy/swap"] == 1 / 2
    assert found["accuracy_chance"] == found["text_only_chance"] == pytest.approx(1 / 3)
    assert outcome.items["text_only"].values.tolist() == [1, 0, 0, 0]
    assert outcome.items["accuracy"].values.tolist() == [1, 0, 0, 1]
    assert found["tie_rate"] == 1 / 4
    assert outcome.items["accuracy"].keys.tolist() == [f"swap/{i}" for i in range(4)]
    del items[1]["caption2"]
    file.write_text(json.dumps(items))
    with pytest.raises(EvalDataError, match=r"swap\.json: item 1 has no `caption2`"):
        SugarCrepePlus("plus", file).run(embedder)


def test_real_items(real_data):
    folder = real_data / "coco_ccby"
    items = [
        i for e in read(folder / "sugarcrepe_ccby.json", folder / "00000.tar") for i in e.items
    ]
    assert len({i.key for i in items}) == len(items) == 44
    assert len(Counter(i.category for i in items)) == 7
