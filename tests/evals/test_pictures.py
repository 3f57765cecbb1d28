import base64
import io

import numpy as np
from PIL import Image

from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.outcome import Card, Cell, Classes, Outcome
from hqclip_jax.evals.pictures import SIDE, confusions, jpeg_uri, pictures, wanted

from .colours import picture


class Set:
    name = "set"

    def __init__(self, examples, error=None):
        self.all, self.error, self.read = examples, error, 0

    def examples(self, skips):
        for example in self.all:
            self.read += 1
            yield example
        if self.error:
            raise self.error


def test_a_picture_is_a_small_jpeg_of_its_pixels_alone():
    buffer = io.BytesIO()
    Image.new("RGB", (900, 300), (200, 30, 30)).save(buffer, "JPEG", comment=b"<script>secret")
    uri = jpeg_uri(buffer.getvalue())
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    assert b"secret" not in data
    small = Image.open(io.BytesIO(data))
    assert small.format == "JPEG" and small.size == (SIDE, SIDE // 3)
    assert np.abs(np.asarray(small)[32, 96].astype(int) - (200, 30, 30)).max() < 6
    assert Image.open(io.BytesIO(base64.b64decode(jpeg_uri(picture("red"))[23:]))).size == (16, 16)


def test_only_wanted_pictures_are_kept_and_reading_ends_with_the_last(caplog):
    some = Set([Example(f"p{i}", picture("red") if i != 2 else b"broken") for i in range(9)])
    found = pictures(some, {"p1", "p2", "p4"})
    assert [*found] == ["p1", "p4"] and some.read == 5
    assert "p2: not shown" in caplog.text
    assert pictures(some, ()) == {} and some.read == 5


def test_a_set_that_can_no_longer_be_read_costs_pictures_only(caplog):
    found = pictures(Set([Example("a", picture("red"))], EvalDataError("gone")), {"a", "b"})
    assert [*found] == ["a"]
    assert "set: the report lacks 1 pictures: gone" in caplog.text


def classified() -> Outcome:
    labels, predicted = np.array([0, 0, 0, 1, 2, 0, 1]), np.array([2, 1, 1, 1, 0, 1, 2])
    sources = np.array([f"s{i}" for i in range(7)])
    card = Card("x", Cell("q", "asked"), (Cell(source="answered"), Cell("text")))
    return Outcome(
        {}, "", cards=(card,), classes=Classes(("a", "b", "c"), sources, labels, predicted)
    )


def test_confusions_are_counted_and_show_the_first_picture():
    assert confusions(classified()) == [
        (0, 1, 3, "s1"), (0, 2, 1, "s0"), (1, 2, 1, "s6"), (2, 0, 1, "s4"),
    ]  # fmt: skip
    assert confusions(classified(), 1) == [(0, 1, 3, "s1")]


def test_wanted_are_the_pictures_of_cards_and_confusions():
    assert wanted(classified()) == {"asked", "answered", "s0", "s1", "s4", "s6"}
    assert wanted(Outcome({}, "")) == set()
