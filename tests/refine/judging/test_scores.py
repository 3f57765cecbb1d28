"""Scores beside an output: kept by record, resumed, never mixed up."""

import json
import math
import shutil

import numpy as np
import pytest

from hqclip_jax.data.record import Record
from refine.errors import RefineError
from refine.judging.outputs import Output
from refine.judging.scores import (
    CLIP_COLUMNS,
    About,
    Scores,
    ahead,
    clip_rows,
    digest_of,
    fill,
    slug,
)
from tests.refine.outputs import make_record, write_output

ABOUT = About("stub-1", "clip", ("desc", "other"), {"context": 7})


class Stub:
    """Scores a record by its number in the name of its picture; remembers what it was asked."""

    about = ABOUT

    def __init__(self, after: int | None = None) -> None:
        self.asked: list[int] = []
        self.after = after

    def score(self, records):
        for number, record in records:
            assert record == make_record(number)
            self.asked.append(number)
            if len(self.asked) == self.after:
                raise KeyboardInterrupt
            yield number, {"desc": number / 2, "other": math.nan}


@pytest.fixture
def output(tmp_path):
    records = [make_record(i) for i in range(12)]
    return Output.open(write_output(tmp_path / "out", [records[:5], records[5:6], records[6:]]))


def test_every_record_is_scored_once(output):
    stub = Stub()
    scores = fill(output, stub)
    assert stub.asked == list(range(12))
    rows = scores.rows(np.array([11, 0, 5, 4, 6]))
    assert rows["desc"].tolist() == [5.5, 0, 2.5, 2, 3]
    assert np.isnan(rows["other"]).all() and rows["scored"].all()
    again = Stub()
    fill(output, again)
    assert again.asked == []
    stored = json.loads((output.directory / "scores/stub-1/scorer.json").read_text())
    assert stored == {"kind": "clip", "columns": ["desc", "other"], "context": 7}


def test_a_sample_first_and_the_rest_later(output):
    sample = Stub()
    fill(output, sample, np.array([2, 5, 9]))
    assert sample.asked == [2, 5, 9]
    scores = Scores(output, ABOUT)
    assert scores.count_missing() == 9 == len([*scores.missing()])
    rows = scores.rows(np.array([3, 9]))
    assert rows["scored"].tolist() == [False, True]
    assert np.isnan(rows["desc"][0]) and rows["desc"][1] == 4.5
    rest = Stub()
    fill(output, rest)
    assert rest.asked == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert scores.rows(np.arange(12))["desc"].tolist() == [i / 2 for i in range(12)]


def test_a_stop_costs_what_is_under_way(output):
    with pytest.raises(KeyboardInterrupt):
        fill(output, Stub(after=8))
    again = Stub()
    fill(output, again)
    assert again.asked == [7, 8, 9, 10, 11]


def test_rows_that_come_in_another_order_are_not_mixed_up(output):
    class Backwards(Stub):
        def score(self, records):
            yield from reversed([*super().score(records)])

    scores = fill(output, Backwards())
    assert scores.rows(np.arange(12))["desc"].tolist() == [i / 2 for i in range(12)]


def test_a_shard_of_other_content_has_no_scores(output, tmp_path):
    fill(output, Stub())
    records = [make_record(i) for i in range(12)]
    other = write_output(tmp_path / "other", [records[:5], records[6:7], records[6:]])
    shutil.copytree(output.directory / "scores", other / "scores")
    assert [*Scores(Output.open(other), ABOUT).missing()] == [5]


def test_two_scorers_do_not_share_rows(output):
    fill(output, Stub())
    other = About("stub-2", "clip", ("desc", "other"), {})
    assert Scores(output, other).count_missing() == 12


def test_other_columns_under_the_same_name_are_refused(output):
    fill(output, Stub())
    with pytest.raises(RefineError, match="another version: delete it"):
        Scores(output, About("stub-1", "clip", ("desc",), {}))


def test_clip_rows_are_cosines_and_lengths():
    record = Record("0" * 32, b"", caption="a b", desc=("c", "d"), tags=("e",), neg_tags=())
    other = Record("1" * 32, b"")
    vectors = {"a b": [1, 0], "c, d": [0.6, 0.8], "e": [0, -1]}
    embed = lambda texts: np.array([vectors[text] for text in texts], np.float32)
    zimg = np.array([[0.6, 0.8], [1, 0]], np.float32)
    (one, row), (two, empty) = clip_rows([(4, record), (9, other)], zimg, embed, len)
    assert (one, two) == (4, 9)
    assert {name: row[name] for name in ("caption", "desc", "tags")} == pytest.approx(
        {"caption": 60, "desc": 100, "tags": -80}
    )
    assert {name for name in CLIP_COLUMNS if math.isnan(row[name])} == {
        "neg_desc", "neg_tags", "neg_desc_tokens", "neg_tags_tokens",
    }  # fmt: skip
    assert (row["caption_tokens"], row["desc_tokens"], row["tags_tokens"]) == (3, 4, 1)
    assert all(math.isnan(value) for value in empty.values())


def test_a_picture_that_does_not_decode_has_no_score():
    nan = np.full((1, 2), np.nan, np.float32)
    embed = lambda texts: np.eye(2, dtype=np.float32)[: len(texts)]
    ((_, row),) = clip_rows([(0, Record("0" * 32, b"", caption="x"))], nan, embed, len)
    assert math.isnan(row["caption"]) and row["caption_tokens"] == 1


def test_ahead_keeps_order_and_stays_within_its_depth():
    taken, done = [], []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    for item, result in ahead(lambda i: i * i, items(), depth=4, threads=2):
        done.append(item)
        assert result == item * item
        assert len(taken) - len(done) <= 5
    assert done == list(range(50))


def test_names_for_folders(tmp_path):
    assert slug("org/Model: 8B?") == "org-Model-8B" and slug("../..") == "unnamed"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest_of(tmp_path)
    assert first == digest_of(tmp_path)
    (tmp_path / "a" / "x").write_text("2")
    second = digest_of(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, digest_of(tmp_path)}) == 3
