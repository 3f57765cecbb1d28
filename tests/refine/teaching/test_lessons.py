import json
from pathlib import Path

import numpy as np
import pytest

from refine.engines import Texts
from refine.errors import RefineError
from refine.parse import Rejected, parse
from refine.prompts import Prompt
from refine.teaching.lessons import Lessons, answer_of, answer_text, data_digest, split

PROMPT = Prompt("p", "Look: {{image}} Said: {{caption}}")


@pytest.fixture
def annotated(make, refine, tmp_path) -> Path:
    """60 records, of which every third has negatives that equal its positives."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "round", "small", "wooden", "old", "wet", "bright"]

    def texts(number: int) -> dict:
        a, b, c = rng.choice(words, 3, replace=False)
        false = c if number % 3 else a
        return {
            "desc": [f"a {a} apple on a {b} tray"], "neg_desc": [f"a {false} apple on a {b} tray"],
            "tags": [f"{a} apple"], "neg_tags": [f"{c} apple"],
        }  # fmt: skip

    make.pairs(tmp_path / "pairs.tar", range(60))
    members = [(f"000000/{make.uid(n)}.json", json.dumps(texts(n)).encode()) for n in range(60)]
    make.tar(tmp_path / "annotations.tar", members)
    out = tmp_path / "data"
    assert not refine(
        "--engine=annotations", "--input", tmp_path / "pairs.tar",
        "--annotations", tmp_path / "annotations.tar", "--output", out,
    )  # fmt: skip
    return out


@pytest.fixture
def lessons(annotated) -> Lessons:
    return Lessons(annotated, PROMPT, max_pixels=100)


def test_an_answer_is_read_as_it_was_written():
    texts = Texts(('a "red" apple, 3 €',), ("a blue apple",), ("apple", "red"), ("pear",))
    written = answer_text(texts)
    assert list(json.loads(written)) == ["desc", "neg_desc", "tags", "neg_tags"]
    assert '"apple","red"' in written and "€" in written
    parsed = parse(written)
    assert parsed.texts == texts and not parsed.repaired


def test_what_a_run_would_not_keep_is_not_taught(lessons, records):
    good, bad = (
        next(n for n, r in enumerate(records(lessons.directory)) if (r.desc != r.neg_desc) is keep)
        for keep in (True, False)
    )
    with pytest.raises(Rejected, match="equal_negative"):
        answer_of(lessons.record(bad))
    assert json.loads(answer_of(lessons.record(good)))["desc"] == list(lessons.record(good).desc)


def test_every_record_is_in_one_part(lessons):
    parts = split(lessons, 0.3)
    assert parts.unusable == {"equal_negative": 20}
    assert not set(parts.train) & set(parts.held_out)
    assert len(parts.train) + len(parts.held_out) == 40
    assert 5 <= len(parts.held_out) <= 20


def test_a_record_stays_in_its_part_whatever_else_is_there(lessons, make, refine, tmp_path):
    held_out = {lessons.record(n).uid for n in split(lessons, 0.3).held_out}
    make.pairs(tmp_path / "other.tar", range(50, 20, -1))
    out = tmp_path / "other"
    assert not refine(
        "--engine=annotations", "--input", tmp_path / "other.tar",
        "--annotations", tmp_path / "annotations.tar", "--output", out,
    )  # fmt: skip
    other = Lessons(out, PROMPT, 100)
    parts = split(other, 0.3)
    assert parts.held_out
    assert {other.record(n).uid for n in parts.held_out} <= held_out
    assert not {other.record(n).uid for n in parts.train} & held_out


def test_nothing_to_train_on_is_told(lessons):
    with pytest.raises(RefineError, match=r"40 records are held out.*equal_negative"):
        split(lessons, 1.0)


def test_the_student_sees_what_an_engine_shows(lessons):
    record = lessons.record(0)
    picture = lessons.picture(record)
    assert picture.mode == "RGB" and picture.width * picture.height <= 100 < 24 * 16
    (message,) = lessons.question(record)
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image", "text"]
    assert record.caption in message["content"][2]["text"]


def test_a_digest_stands_for_the_records(annotated, make, refine, tmp_path):
    assert data_digest(annotated) == data_digest(annotated)
    out = tmp_path / "other"
    assert not refine(
        "--engine=annotations", "--input", tmp_path / "pairs.tar", "--limit", 59,
        "--annotations", tmp_path / "annotations.tar", "--output", out,
    )  # fmt: skip
    assert data_digest(out) != data_digest(annotated)
    with pytest.raises(RefineError, match="is no data set"):
        data_digest(tmp_path)
