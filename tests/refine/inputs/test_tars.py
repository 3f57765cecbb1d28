import gzip
import io
import tarfile

import pytest

from refine.errors import RefineError
from refine.inputs.tars import (
    BrokenTar,
    Member,
    expand,
    fingerprint,
    members,
    open_tar,
    short_names,
)

LONG = "deep/" * 40 + "name.json"  # 209 characters: past ustar's 100 and GNU's inline field


def listed(path) -> list[Member]:
    with open_tar(path) as file:
        return list(members(file))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_the_standard_library(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(["a.jpg", "d" * 60 + "/" + "f" * 90 + ".txt", "é.json"]):
            info = tarfile.TarInfo(name)
            info.size = (0, 511, 1025)[i]
            info.mtime = 1.5  # pax writes a header of its own for it, as img2dataset's tars have
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        if form != tarfile.USTAR_FORMAT:
            tar.addfile(tarfile.TarInfo(LONG))
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert len(expected) >= 3
    assert listed(path) == expected


def test_tars_behind_one_another_are_read_to_the_last(tmp_path, make):
    one = make.tar(tmp_path / "1.tar", [("a.txt", b"1")])
    two = make.tar(tmp_path / "2.tar", [("b.txt", b"2")])
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert [m.name for m in listed(both)] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("keep", "names", "message"),
    [
        (512 + 512 + 512 + 100, ["a.txt"], "inside 'b.txt'"),
        (512 + 512, ["a.txt"], "no end-of-archive mark"),
        (512 + 512 + 200, ["a.txt"], "no tar header at byte 1,024"),
        (0, [], "no end-of-archive mark"),
    ],
)
def test_a_cut_is_told_after_what_came_before(tmp_path, make, keep, names, message):
    whole = make.tar(tmp_path / "a.tar", [("a.txt", b"x" * 500), ("b.txt", b"y" * 500)])
    whole.write_bytes(whole.read_bytes()[:keep])
    seen = []
    with open_tar(whole) as file, pytest.raises(BrokenTar, match=message):
        for member in members(file):
            seen.append(member.name)
    assert seen == names


def test_what_is_no_tar_is_broken(tmp_path):
    path = tmp_path / "page.tar"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(BrokenTar, match="no tar header at byte 0"):
        listed(path)


def test_a_negative_size_ends_the_reading(tmp_path):
    info = tarfile.TarInfo("a")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 12  # base-256 for -1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(block + bytes(1024))
    with pytest.raises(BrokenTar, match="negative size"):
        listed(path)


def test_a_compressed_tar_is_named_with_the_mend(tmp_path, make):
    plain = make.tar(tmp_path / "a.tar", [("a.txt", b"1")])
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(RefineError, match=r"a\.tar\.gz is compressed.*gunzip"):
        listed(packed)


def test_expand(tmp_path, make):
    for name in ("b/1.tar", "b/0.tar", "a/0.tar", "a/0.txt"):
        make.tar(tmp_path / name, [])
    one = str(tmp_path / "b/1.tar")
    found = expand([one, str(tmp_path / "b"), str(tmp_path / "?/0.tar")], "--input")
    assert [str(p.relative_to(tmp_path)) for p in found] == ["b/1.tar", "b/0.tar", "a/0.tar"]
    assert short_names(found) == ["b/1.tar", "b/0.tar", "a/0.tar"]
    assert short_names(found[:2]) == ["1.tar", "0.tar"]


def test_expand_names_what_matches_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefineError, match=r"--input .*empty: the directory holds no \*\.tar"):
        expand([str(tmp_path / "empty")], "--input")
    with pytest.raises(RefineError, match=r"--annotations .*x\*\.tar: no such file"):
        expand([str(tmp_path / "x*.tar")], "--annotations")


def test_fingerprint_sees_sizes_and_if_asked_times(tmp_path, make):
    path = make.tar(tmp_path / "a.tar", [("a.txt", b"1")])
    plain, timed = fingerprint([path]), fingerprint([path], times=True)
    assert (plain["files"], plain["bytes"]) == (1, path.stat().st_size)
    import os

    os.utime(path, ns=(1, 1))
    assert fingerprint([path]) == plain
    assert fingerprint([path], times=True) != timed
    path.write_bytes(path.read_bytes() + bytes(512))
    assert fingerprint([path]) != plain
