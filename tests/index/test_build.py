import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hqclip_jax.index import approximate
from hqclip_jax.index import build as build_module
from hqclip_jax.index.build import build, hint
from hqclip_jax.index.store import About, Index, SearchError
from tests.evals.colours import write_tar
from tests.index.encoder import MODEL, MeanColour, png

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (9, 9, 9)}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four pictures of a colour and a tar of two."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, rgb in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(*rgb))
    write_tar(folder / "two.tar", {"cyan.png": png(0, 9, 9), "pink.png": png(255, 0, 255)})
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "index"


ALL = ["blue.png", "green.png", "grey.png", "red.png", "two.tar:cyan.png", "two.tar:pink.png"]


def names(folder: Path) -> list[str]:
    return [picture.name for picture in Index.open(folder).pictures()]


def nearest(folder: Path, *rgb: float) -> str:
    index = Index.open(folder)
    return index.picture(index.nearest(np.array(rgb), 1)[1][0, 0]).name


def test_a_built_index_finds_each_picture_by_its_colour(photos, folder):
    about = build(folder, photos, MeanColour())
    assert (about.count, about.skipped, about.others) == (6, {}, 0)
    assert names(folder) == ALL
    assert nearest(folder, 1, 0, 0) == "red.png"
    assert nearest(folder, 1, 0, 1) == "two.tar:pink.png"
    assert sorted(p.name for p in folder.iterdir()) == [
        "000001", "index.json", "lock", "skipped.jsonl",
    ]  # fmt: skip


def test_built_again_only_what_is_new_or_changed_is_embedded(photos, folder):
    build(folder, photos, MeanColour())
    (photos / "more").mkdir()
    (photos / "more" / "new.png").write_bytes(png(9, 9, 0))
    (photos / "grey.png").write_bytes(png(200, 90, 10, size=(9, 9)))
    os.utime(photos / "red.png", (1, 1))  # touched: it might be another one
    (photos / "blue.png").unlink()
    model = MeanColour()
    about = build(folder, photos, model)
    assert sorted(model.embedded) == ["grey.png", "more/new.png", "red.png"]
    assert sorted(names(folder)) == sorted([*ALL[1:], "more/new.png"])
    assert nearest(folder, 200, 90, 10) == "grey.png"
    assert nearest(folder, 0, 0, 1) != "blue.png"
    assert about.snapshot == "000002"
    assert not (folder / "000001").exists()


def test_of_a_changed_tar_all_members_are_embedded_again(photos, folder):
    build(folder, photos, MeanColour())
    write_tar(photos / "two.tar", {"pink.png": png(255, 0, 255), "cyan.png": png(0, 9, 9)})
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == ["two.tar:pink.png", "two.tar:cyan.png"]


def test_nothing_changed_writes_no_new_snapshot(photos, folder, monkeypatch):
    build(folder, photos, MeanColour())
    model = MeanColour()
    assert build(folder, photos, model).snapshot == "000001"
    assert model.embedded == []
    # A library that has come since makes its file.
    monkeypatch.setattr(approximate, "wanted", lambda count: True)
    monkeypatch.setattr(approximate, "build", lambda vectors, path: path.touch())
    assert build(folder, photos, MeanColour()).snapshot == "000002"


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_build_that_died_goes_on_after_the_last_whole_batch(photos, folder, batches):
    with pytest.raises(KeyboardInterrupt):
        build(folder, photos, MeanColour(dies_at=batches))
    with pytest.raises(SearchError, match="has not finished: start it again"):
        Index.open(folder)
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == ALL[2 * batches :]
    assert names(folder) == ALL


def test_what_died_in_a_later_build_leaves_the_index_as_it_was(photos, folder):
    build(folder, photos, MeanColour())
    (photos / "new.png").write_bytes(png(9, 9, 0))
    (photos / "newer.png").write_bytes(png(9, 90, 0))
    (photos / "red.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        build(folder, photos, MeanColour(batch=1, dies_at=1))
    assert names(folder) == ALL
    (photos / "new.png").write_bytes(png(255, 255, 0, size=(9, 9)))  # after its part was written
    model = MeanColour()
    assert build(folder, photos, model).count == 7
    assert model.embedded == ["new.png", "newer.png"]
    assert nearest(folder, 1, 1, 0) == "new.png"


def test_as_many_as_before_are_not_the_same_as_before(photos, folder):
    """One gone and one new: all is known to the build after a kill, some of it from parts alone."""
    build(folder, photos, MeanColour())
    (photos / "red.png").unlink()
    (photos / "new.png").write_bytes(png(255, 255, 0))
    with pytest.raises(KeyboardInterrupt):
        build(folder, photos, MeanColour(batch=1, dies_at=1))
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == []
    assert nearest(folder, 1, 1, 0) == "new.png"
    assert "red.png" not in names(folder)


@pytest.mark.parametrize("moment", [("write_snapshot", 1), ("replace_text", 1), ("_sweep", 2)])
def test_a_kill_while_the_index_is_written_loses_nothing(photos, folder, monkeypatch, moment):
    """Before the snapshot, between it and `index.json`, and after that."""
    name, fatal = moment
    real, calls = getattr(build_module, name), itertools.count(1)

    def dies(*args, **options):
        if next(calls) == fatal:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, name, dies)
        build(folder, photos, MeanColour())
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == []
    assert names(folder) == ALL
    assert not (folder / "parts").exists()
    assert len([p for p in folder.iterdir() if p.name.isdecimal()]) == 1


def test_leftovers_of_a_kill_are_removed(photos, folder):
    build(folder, photos, MeanColour())
    (folder / "index.json.tmp").write_text("{")
    (folder / "000002.tmp").mkdir()
    (folder / "parts").mkdir()
    (folder / "parts" / "00000001.tmp").write_bytes(b"half")
    build(folder, photos, MeanColour())
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["000001"]


def test_a_kill_before_the_index_was_described_does_not_close_its_folder(photos, folder):
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "index.json.tmp").write_text("{")
    assert build(folder, photos, MeanColour()).count == 6


KILLED = """
import sys, time
from pathlib import Path
from hqclip_jax.index.build import build
from tests.index.encoder import MeanColour

class Slow(MeanColour):
    def pictures(self, root, pictures):
        for number, batch in enumerate(super().pictures(root, pictures)):
            if number == 2:
                print("two batches", flush=True)
                time.sleep(600)
            yield batch

build(Path(sys.argv[1]), Path(sys.argv[2]), Slow())
"""


def test_kill_nine_in_the_middle(photos, folder):
    command = [sys.executable, "-c", KILLED, str(folder), str(photos)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "two batches\n"
            with pytest.raises(SearchError, match=r"another build of .* is under way"):
                build(folder, photos, MeanColour())
        finally:
            process.send_signal(signal.SIGKILL)
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == ALL[4:]
    assert names(folder) == ALL


def test_corrupt_pictures_are_named_counted_and_tried_again(photos, folder, caplog):
    (photos / "a\n.png").write_bytes(b"no picture")
    (photos / "half.png").write_bytes(png(1, 2, 3)[:40])
    with caplog.at_level(logging.WARNING):
        about = build(folder, photos, MeanColour())
    assert (about.count, about.skipped) == (6, {"picture does not decode": 2})
    assert r"left out: a\n.png: picture does not decode" in caplog.text
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["a\n.png", "half.png"]
    model = MeanColour()
    assert build(folder, photos, model).skipped == {"picture does not decode": 2}
    assert model.embedded == ["a\n.png", "half.png"]


def test_names_that_are_no_utf_8(photos, folder):
    raw = os.fsencode(photos) + b"/\xff\xe9.png"
    Path(os.fsdecode(raw)).write_bytes(png(255, 255, 0))
    build(folder, photos, MeanColour())
    model = MeanColour()
    build(folder, photos, model)
    assert model.embedded == []
    assert os.fsencode(nearest(folder, 1, 1, 0)) == b"\xff\xe9.png"


def test_what_can_not_be_built_says_why(photos, folder, tmp_path):
    build(folder, photos, MeanColour())
    other = replace(MODEL, digest="f" * 12, step=4)
    with pytest.raises(SearchError, match=r"built by runs/x, step 3 .*not by runs/x, step 4"):
        build(folder, photos, MeanColour(about=other))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(SearchError, match=r"holds no pictures.*, only nothing else"):
        build(folder, elsewhere, MeanColour())
    (elsewhere / "a.png").write_bytes(b"no picture")
    with pytest.raises(SearchError, match=r"is of the folder .*photos, not of .*elsewhere"):
        build(folder, elsewhere, MeanColour())
    with pytest.raises(SearchError, match=r"none of the 1 pictures in .* can be read"):
        build(tmp_path / "new", elsewhere, MeanColour())
    with pytest.raises(SearchError, match="nowhere is no folder"):
        build(folder, tmp_path / "nowhere", MeanColour())
    with pytest.raises(SearchError, match="holds other things and no index"):
        build(elsewhere, photos, MeanColour())
    assert names(folder) == ALL


def test_progress_only_on_a_terminal(photos, folder, tmp_path, capsys):
    build(folder, photos, MeanColour(), Console(force_terminal=True, width=100))
    assert "6/6" in capsys.readouterr().out
    build(tmp_path / "other", photos, MeanColour(), Console(force_terminal=False))
    assert capsys.readouterr().out == ""


def test_a_hint_where_a_library_would_help(monkeypatch):
    monkeypatch.setattr(approximate, "available", lambda: False)
    assert "pip install faiss-cpu" in hint(About("/x", MODEL, 200_000))
    assert hint(About("/x", MODEL, 199_999)) == ""
    monkeypatch.setattr(approximate, "available", lambda: True)
    assert hint(About("/x", MODEL, 200_000)) == ""
