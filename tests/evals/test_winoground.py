import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.winoground import Winoground

from .colours import picture

# Of images and captions: all right; captions swapped; the first image and both captions the same.
PAIRS = [
    (("red", "blue"), ("red", "blue"), "Object"),
    (("red", "blue"), ("blue", "red"), "Object"),
    (("red", "red"), ("red", "blue"), "Relation"),
    (("cyan", "green"), ("green", "cyan"), ""),
]


def rows():
    for i, (_, captions, tag) in enumerate(PAIRS):
        images = {f"image_{k}": f"ex_{i}_img_{k}" for k in range(2)}
        texts = {f"caption_{k}": caption for k, caption in enumerate(captions)}
        yield {"id": i, **images, **texts, "tag": "x", "collapsed_tag": tag}


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path / "winoground" / "data"
    (folder / "images").mkdir(parents=True)
    for i, (colours, _, _) in enumerate(PAIRS):
        for k, colour in enumerate(colours):
            (folder / "images" / f"ex_{i}_img_{k}.png").write_bytes(picture(colour))
    (folder / "examples.jsonl").write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    return folder.parent


def check_scores(outcome):
    """The third: the second image prefers the first caption, and each caption has two equal
    images, which is a tie, and wrong."""
    values = {name: outcome.items[name].values.tolist() for name in ("text", "image", "group")}
    assert values == {"text": [1, 0, 0, 0], "image": [1, 0, 0, 0], "group": [1, 0, 0, 0]}
    found = outcome.scores
    assert (found["text_chance"], found["image_chance"]) == (0.25, 0.25)
    assert found["group_chance"] == pytest.approx(1 / 6)
    assert found["image_tie_rate"] == 1 / 4
    assert found["text_tie_rate"] == found["tie_rate"] == 0
    assert (found["n"], found["n/Object"], found["group/Object"]) == (4, 2, 1 / 2)
    assert outcome.main == "group"
    assert not outcome.skips.total


def test_folder(unpacked, embedder):
    evaluator = Winoground("w", unpacked)
    evaluator.check()
    check_scores(evaluator.run(embedder))


def test_parquet(tmp_path, embedder):
    table = [
        row | {f"image_{k}": {"bytes": picture(colours[k]), "path": None} for k in range(2)}
        for row, (colours, _, _) in zip(rows(), PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "test-00000-of-00001.parquet")
    evaluator = Winoground("w", tmp_path)
    evaluator.check()
    check_scores(evaluator.run(embedder))


def test_text_and_image_scores_are_apart(tmp_path, embedder):
    """Both images are nearer to red, the second more so: the captions choose rightly between the
    images, and the first image not between the captions."""

    def mixed(red, blue):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (red, 0, blue)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue()}

    row = {
        "image_0": mixed(160, 120), "image_1": mixed(240, 60),
        "caption_0": "blue", "caption_1": "red", "collapsed_tag": "",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "0.parquet")
    found = Winoground("w", tmp_path).run(embedder).scores
    assert (found["text"], found["image"], found["group"]) == (0, 1, 0)


def test_what_is_missing(unpacked, embedder, tmp_path):
    (unpacked / "data" / "images" / "ex_0_img_1.png").unlink()
    (unpacked / "data" / "images" / "ex_1_img_0.png").unlink()
    outcome = Winoground("w", unpacked).run(embedder)
    assert outcome.items["group"].keys.tolist() == ["2", "3"]
    assert outcome.skips.counts == {
        "an item's image is missing": 2, "an item lacks one of its images": 1,
    }  # fmt: skip
    (unpacked / "data" / "examples.jsonl").write_text('{"image_0": "a", "image_1": "b"}')
    with pytest.raises(EvalDataError, match=r"examples\.jsonl, line 1 has no `caption_0`"):
        Winoground("w", unpacked).run(embedder)
    with pytest.raises(EvalDataError, match=r"holds no \.parquet"):
        Winoground("w", tmp_path).check()
    pq.write_table(pa.table({"caption_0": ["a"]}), tmp_path / "0.parquet")
    with pytest.raises(EvalDataError, match="has no column caption_1, collapsed_tag, image_0"):
        Winoground("w", tmp_path).run(embedder)
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(EvalDataError, match="can't be read as Parquet"):
        Winoground("w", tmp_path).run(embedder)
