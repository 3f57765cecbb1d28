import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqclip_jax.evals.aro import VGAttribution, VGRelation, WordOrder
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.outcome import Skips

from .colours import picture


def item(true, false, top=0, **more):
    box = {"bbox_x": 0, "bbox_y": top, "bbox_w": 16, "bbox_h": 8}
    return {"image_path": "1.png", "true_caption": true, "false_caption": false, **box, **more}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(picture("red", "blue"))
    return tmp_path


def write(folder, items):
    (folder / "set.json").write_text(json.dumps(items))
    return folder / "set.json"


def test_relation_cuts_the_box_and_leaves_relations_out_of_the_mean(folder, embedder):
    items = [
        item("red", "blue", relation_name="behind"),
        item("red", "blue", top=8, relation_name="behind"),
        item("blue", "red", top=8, relation_name="to the left of"),
        item("red", "blue", top=8, relation_name="next to"),
    ]
    evaluator = VGRelation("vgr", write(folder, items))
    evaluator.check()
    outcome = evaluator.run(embedder)
    assert dict(zip(outcome.items["accuracy"].keys, outcome.items["accuracy"].values)) == {
        "0": 1, "1": 0, "2": 1, "3": 0,
    }  # fmt: skip
    assert outcome.scores["accuracy"] == 1 / 2
    assert outcome.scores["accuracy_macro"] == 3 / 4
    assert outcome.main == "accuracy_macro"
    assert "accuracy/next to" not in outcome.scores


def test_attribution_takes_pairs_of_25_items_into_the_mean(folder, embedder):
    often = [item("red", "blue", attributes=["old", "red"])] * 25
    rare = [item("blue", "red", attributes=["red", "old"])] * 24
    scores = VGAttribution("vga", write(folder, often + rare)).run(embedder).scores
    assert scores["accuracy"] == pytest.approx(25 / 49)
    assert (scores["accuracy_macro"], scores["n/old_red"]) == (1, 25)
    assert "n/red_old" not in scores


@pytest.mark.parametrize(
    "evaluator, broken, message",
    [
        (VGRelation, {"relation_name": None}, "has no `relation_name`"),
        (VGRelation, {"bbox_w": 0}, r"item 0 has no box in bbox_x, .*\(0, 0, 0, 8\)"),
        (VGRelation, {"false_caption": ""}, "has no `false_caption`"),
        (VGAttribution, {"attributes": ["red"]}, "item 0 has no two `attributes`"),
    ],
)
def test_unusable_items(folder, evaluator, broken, message):
    one = item("red", "blue", relation_name="on", attributes=["a", "b"]) | broken
    with pytest.raises(EvalDataError, match=message):
        list(evaluator("x", write(folder, [one])).examples(Skips()))


# The shuffles of the second caption are the caption itself but for what is cut: a tie.
ORDERS = [("red", ["blue", "green", "cyan", "yellow"]), ("red red", ["red red cyan"] * 4)]


def test_word_order_from_parquet_embeds_an_image_once(tmp_path, embedder):
    rows = [
        {"images": {"bytes": picture("red"), "path": "x.jpg"}, "correct_caption": caption}
        | {f"hard_text_{i + 1}": text for i, text in enumerate(shuffles)}
        for caption, shuffles in [*ORDERS, *ORDERS]
    ]
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "test-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[3:]), tmp_path / "test-1.parquet")
    evaluator = WordOrder("coco", tmp_path)
    evaluator.check()
    assert [len(e.items) for e in evaluator.examples(Skips())] == [4]
    outcome = evaluator.run(embedder)
    assert outcome.items["accuracy"].values.tolist() == [1, 0, 1, 0]
    assert outcome.items["accuracy"].keys.tolist() == ["0", "1", "2", "3"]
    assert outcome.scores["tie_rate"] == 1 / 2
    assert outcome.scores["accuracy_chance"] == pytest.approx(1 / 5)


def test_word_order_from_json(folder, embedder):
    items = [
        {"image": "1.png", "caption": caption, "negatives": negatives}
        for caption, negatives in (("red blue", ["green cyan", "yellow cyan"]), ("green", ["red"]))
    ]
    scores = WordOrder("mine", write(folder, items)).run(embedder).scores
    assert scores["accuracy"] == 1 / 2
    with pytest.raises(EvalDataError, match="item 0 has no list `negatives`"):
        WordOrder("mine", write(folder, [items[0] | {"negatives": []}])).run(embedder)


def test_missing_files(tmp_path):
    with pytest.raises(EvalDataError, match=r"set\.json is missing"):
        VGRelation("x", tmp_path / "set.json").check()
    (tmp_path / "set.json").touch()
    with pytest.raises(EvalDataError, match="images is missing"):
        VGRelation("x", tmp_path / "set.json").check()
    with pytest.raises(EvalDataError, match=r"holds no \.parquet"):
        WordOrder("x", tmp_path).check()
