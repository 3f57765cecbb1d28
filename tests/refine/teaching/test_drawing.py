"""A sample drawn and written."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from refine.errors import RefineError
from refine.inputs.find import find
from refine.inputs.pairs import Pair
from refine.storage import locked
from refine.teaching import drawing
from refine.teaching.drawing import draw

ROOT = Path(__file__).parents[3]


@pytest.fixture
def inputs(tmp_path, make):
    """Three tars of 40 pairs; every fifth picture is cut short, which its header does not say."""
    for tar in range(3):
        members = []
        for n in range(40 * tar, 40 * tar + 40):
            image, *rest = make.pair(n)
            data = make.image(n, "PNG" if n % 2 else "JPEG")
            members += [(image[0], data[:-60] if n % 5 == 0 else data), *rest]
        make.tar(tmp_path / f"in/{tar}.tar", members)
    return find([str(tmp_path / "in")])


def pairs_of(folder):
    return [item for each in find([str(folder)]) for item in each.pairs()]


def test_what_is_drawn_is_a_set_of_pairs_like_any_other(tmp_path, inputs, make):
    folder = draw(inputs, tmp_path / "out", 30, 0, 1)
    found = pairs_of(folder)
    assert len(found) == 30 and all(isinstance(pair, Pair) for pair in found)
    numbers = {make.uid(n): n for n in range(120)}
    for pair in found:
        n = numbers.pop(pair.uid)
        assert n % 5
        assert pair.image == make.image(n, "PNG" if n % 2 else "JPEG")
        assert pair.caption == f"A red apple no {n}"
    with tarfile.open(folder / "00000.tar") as tar:
        names = tar.getnames()
        image, meta = tar.extractfile(names[0]).read(), json.load(tar.extractfile(names[2]))
        stems = [name.partition(".")[0] for name in names]
        assert stems == [f"{n:09d}" for n in range(30) for _ in range(3)]
        with Image.open(io.BytesIO(image)) as opened:
            assert {"png": "PNG", "jpg": "JPEG"}[names[0][-3:]] == opened.format
            assert (meta["width"], meta["height"]) == opened.size
    assert meta["source"].endswith(".tar") and meta["source_key"].isdigit()
    assert meta["status"] == "success"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pairs", "sample.json"]


def test_the_sample_is_told(tmp_path, inputs):
    draw(inputs, tmp_path / "out", 30, 0, 1)
    told = json.loads((tmp_path / "out/sample.json").read_text())
    assert (told["drawn"], told["pairs"], told["inputs_drawn_from"]) == (30, 120, 3)
    assert sum(kind["drawn"] for kind in told["kinds"]) == 30
    assert sum(kind["pairs"] for kind in told["kinds"]) == 120
    assert set(told["drawn_and_replaced"]) == {"corrupt_image"}
    assert 1 <= told["drawn_and_replaced"]["corrupt_image"] <= 24
    assert (told["plan"]["samples"], told["plan"]["seed"]) == (30, 0)


def test_a_broken_picture_is_replaced_by_the_next(tmp_path, inputs, make):
    """The sample is the one that would have been drawn had the broken ones not been there."""
    folder = draw(inputs, tmp_path / "out", 30, 0, 1)
    sound = [
        [m for n in range(40 * tar, 40 * tar + 40) if n % 5 for m in
         [(make.pair(n)[0][0], make.image(n, "PNG" if n % 2 else "JPEG")), *make.pair(n)[1:]]]
        for tar in range(3)
    ]  # fmt: skip
    for tar, members in enumerate(sound):
        make.tar(tmp_path / f"sound/{tar}.tar", members)
    other = draw(find([str(tmp_path / "sound")]), tmp_path / "other", 30, 0, 1)
    assert [p.uid for p in pairs_of(folder)] == [p.uid for p in pairs_of(other)]


def test_fewer_than_asked_for_are_all_drawn(tmp_path, inputs):
    assert len(pairs_of(draw(inputs, tmp_path / "out", 10_000, 0, 1))) == 96
    told = json.loads((tmp_path / "out/sample.json").read_text())
    assert told["drawn_and_replaced"] == {"corrupt_image": 24}


def test_many_pairs_make_several_tars(tmp_path, inputs, monkeypatch):
    whole = draw(inputs, tmp_path / "whole", 96, 0, 1)
    monkeypatch.setattr(drawing, "TAR_PAIRS", 40)
    folder = draw(inputs, tmp_path / "out", 96, 0, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert [p.uid for p in pairs_of(folder)] == [p.uid for p in pairs_of(whole)]
    with tarfile.open(folder / "00001.tar") as tar:
        assert tar.getnames()[0].startswith("000010000.")


def test_workers_change_no_byte_and_the_seed_does(tmp_path, inputs, read_tree):
    one, two = (draw(inputs, tmp_path / f"out{n}", 30, 0, n) for n in (1, 2))
    assert read_tree(one) == read_tree(two)
    assert read_tree(one) != read_tree(draw(inputs, tmp_path / "other", 30, 1, 1))


def test_a_finished_draw_is_left_and_another_one_refused(tmp_path, inputs, read_tree, monkeypatch):
    out = tmp_path / "out"
    draw(inputs, out, 30, 0, 1)
    before = read_tree(out)
    for samples, seed, given in ((31, 0, inputs), (30, 1, inputs), (30, 0, inputs[:2])):
        with pytest.raises(RefineError, match=r"begun with other arguments .*another --output"):
            draw(given, out, samples, seed, 1)
    monkeypatch.setattr(drawing, "survey", None)  # not called
    assert draw(inputs, out, 30, 0, 2) == out / "pairs"
    assert read_tree(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path, inputs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    with pytest.raises(RefineError, match=r"holds other files .thesis.tex.*another --output"):
        draw(inputs, tmp_path / "out", 30, 0, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RefineError, match="can't be written"):
        draw(inputs, tmp_path / "file/out", 30, 0, 1)


def test_two_draws_do_not_write_to_one_folder(tmp_path, inputs):
    (tmp_path / "out/.drawing").mkdir(parents=True)
    with (
        locked(tmp_path / "out/.drawing/lock", wait=False),
        pytest.raises(RefineError, match="another run is writing"),
    ):
        draw(inputs, tmp_path / "out", 30, 0, 1)


def test_a_pair_that_goes_while_it_is_drawn_is_replaced(tmp_path, inputs, make, monkeypatch):
    def survey(*arguments):
        found = surveyed(*arguments)
        make.pairs(tmp_path / "in/0.tar", [39])
        return found

    surveyed = drawing.survey
    monkeypatch.setattr(drawing, "survey", survey)
    found = pairs_of(draw(inputs, tmp_path / "out", 30, 0, 1))
    assert len(found) == 30
    told = json.loads((tmp_path / "out/sample.json").read_text())
    assert told["drawn_and_replaced"]["gone"] >= 8


def test_nothing_to_draw_is_an_error_that_says_why(tmp_path, make):
    make.tar(tmp_path / "in/0.tar", [("a.jpg", b"x"), *make.pair(0, "a")[1:], *make.pair(1)[1:]])
    with pytest.raises(RefineError, match=r"corrupt_image.* 1.*missing_image.* 1"):
        draw(find([str(tmp_path / "in")]), tmp_path / "out", 30, 0, 1)


def test_a_begun_draw_is_for_the_same_arguments(tmp_path, inputs, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "_write_tars", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        draw(inputs, out, 30, 0, 1)
    monkeypatch.undo()
    with pytest.raises(RefineError, match=r"begun with other arguments \(samples"):
        draw(inputs, out, 31, 0, 1)
    assert len(pairs_of(draw(inputs, out, 30, 0, 1))) == 30


PROGRAM = """
import sys
from pathlib import Path
from refine.teaching.drawing import draw
from refine.inputs.find import find
draw(find([sys.argv[1]]), Path(sys.argv[2]), 90, 0, 1)
"""


@pytest.mark.parametrize("moment", ["plan", "fetched", "tar", "pairs"])
def test_a_killed_draw_starts_anew_to_the_same_bytes(tmp_path, inputs, read_tree, moment):
    whole, out = tmp_path / "whole", tmp_path / "out"
    draw(inputs, whole, 90, 0, 1)
    happened = {
        "plan": lambda: (out / ".drawing/plan.json").exists(),
        "fetched": lambda: len(list(out.glob(".drawing/fetched/*"))) > 40,
        "tar": lambda: (out / ".drawing/pairs/00000.tar").exists(),
        "pairs": lambda: (out / "pairs").exists(),
    }[moment]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ)
    while process.poll() is None and not happened():
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    draw(inputs, out, 90, 0, 1)
    assert read_tree(out) == read_tree(whole)
