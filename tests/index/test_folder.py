import contextlib
import os

import pytest

from hqclip_jax.index import folder
from hqclip_jax.index.folder import PictureError, Walk, printable
from tests.evals.colours import write_tar
from tests.index.encoder import png


def names(walk: Walk) -> list[str]:
    return [picture.name for picture in walk]


def test_finds_pictures_and_members_of_tars_below_a_folder(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.JPG", "b/c/é.png", "b/notes.txt", ".hidden/x.png", ".x.png"):
        (tmp_path / name).write_bytes(b"x")
    write_tar(tmp_path / "b" / "a.tar", {"2.webp": "second", "d/1.jpg": "first", "1.json": "{}"})
    (tmp_path / "circle").symlink_to(tmp_path)
    walk = Walk(tmp_path)
    assert names(walk) == ["b/a.tar:2.webp", "b/a.tar:d/1.jpg", "b/c/é.png", "z.JPG"]
    assert (walk.skipped, walk.others) == ([], 2)  # the text and the link
    assert [p.read(tmp_path) for p in walk] == [b"second", b"first", b"x", b"x"]


def test_of_a_name_twice_in_a_tar_the_last_counts(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.png": "old"})
    write_tar(tmp_path / "b.tar", {"x.png": "new"})
    path.write_bytes(path.read_bytes()[:1024] + (tmp_path / "b.tar").read_bytes())
    assert [p.read(tmp_path) for p in Walk(tmp_path) if p.path == "a.tar"] == [b"new"]


@pytest.mark.parametrize(
    "length, whole",
    [
        (700, []),  # inside the first picture
        (1536, ["1.png"]),  # before the second header
        (1800, ["1.png"]),  # inside it
        (2200, ["1.png"]),  # inside the second picture
        (3072, ["1.png", "2.png"]),  # before the archive's end
    ],
)
def test_of_a_cut_tar_what_is_whole_is_found_and_the_rest_told(tmp_path, length, whole):
    path = write_tar(tmp_path / "a.tar", {"1.png": "x" * 600, "2.png": "y" * 600})
    path.write_bytes(path.read_bytes()[:length])
    walk, found = Walk(tmp_path), []
    for picture in walk:
        with contextlib.suppress(PictureError):
            picture.read(tmp_path)
            found.append(picture.member)
    assert found == whole
    assert [(s.name, s.reason) for s in walk.skipped] == [("a.tar", "broken tar, or none")]


def test_what_is_no_tar_or_no_file_is_told(tmp_path):
    (tmp_path / "a.tar").write_text("no tar")
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would hang
    walk = Walk(tmp_path)
    assert names(walk) == []
    reasons = [(s.name, s.reason) for s in walk.skipped]
    assert reasons == [
        ("a.tar", "broken tar, or none"),
        ("gone.png", "unreadable file"),
        ("pipe.png", "no regular file"),
    ]


def test_a_picture_that_changed_or_went_is_not_taken_for_the_one_listed(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 2, 3))
    (picture,) = Walk(tmp_path)
    path.write_bytes(png(1, 2, 3) + b"more")
    with pytest.raises(PictureError, match="changed since"):
        picture.read(tmp_path)
    path.unlink()
    with pytest.raises(PictureError, match="unreadable file: No such file"):
        picture.read(tmp_path)
    monkeypatch.setattr(folder, "MAX_BYTES", 10)
    with pytest.raises(PictureError, match="too large"):
        picture.read(tmp_path)


def test_printable_names_act_on_no_terminal():
    name = os.fsdecode(b"\xff\x1b[31m\n") + "é\u202e\u65e5"
    assert printable(name) == r"\udcff\x1b[31m\né\u202e日"
    printable(name).encode()
