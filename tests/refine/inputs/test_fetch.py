import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from refine.errors import RefineError
from refine.inputs import fetch
from refine.inputs.fetch import copied, open_file, read
from refine.inputs.stores import look
from tests.data.object_store import CUT
from tests.refine.buckets import bucket, server  # noqa: F401 (fixtures)

DATA = bytes(range(256)) * 4000  # a megabyte
COPY = 3 * len(DATA)


@pytest.fixture
def file(bucket):
    return look(bucket.put("some/a.tar", DATA))


def test_a_copy_is_made_once(bucket, file, tmp_path):
    copy = fetch.fetch(file, tmp_path / "scratch")
    assert copy == copied(file, tmp_path / "scratch")
    assert (copy.read_bytes(), copy.suffix) == (DATA, ".tar")
    assert bucket.asked("a.tar") > 0
    assert fetch.fetch(file, tmp_path / "scratch") == copy
    assert bucket.asked("a.tar") == 0


def test_what_a_killed_process_left_is_written_over(file, tmp_path):
    copy = copied(file, tmp_path)
    copy.with_name(f"{copy.name}.partial").write_bytes(b"x" * COPY)
    assert fetch.fetch(file, tmp_path).read_bytes() == DATA
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".lock", ".tar"]


def test_of_two_that_ask_at_once_one_downloads(bucket, file, tmp_path, monkeypatch):
    streams = []
    stream = fetch._stream
    monkeypatch.setattr(fetch, "_stream", lambda *a: streams.append(a) or stream(*a))
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: fetch.fetch(file, tmp_path), range(4)))
    assert len(set(copies)) == len(streams) == 1
    assert copies[0].read_bytes() == DATA


@pytest.mark.parametrize("statuses", [(CUT,), (503, CUT), (CUT, 500)])
def test_a_broken_connection_is_mended(bucket, file, tmp_path, statuses):
    bucket.breaks("some/a.tar", *statuses)
    assert fetch.fetch(file, tmp_path).read_bytes() == DATA
    assert bucket.server.broken == {f"{bucket.name}/some/a.tar": []}


def test_a_download_that_ends_early_is_begun_again(file, tmp_path, monkeypatch):
    stream, sizes = fetch._stream, [10, COPY]

    def broken(address, target):
        stream(address, target)
        if sizes:
            size = sizes.pop(0)
            target.truncate(min(size, len(DATA)))
            target.seek(0, os.SEEK_END)
            if size == COPY:
                raise OSError("connection reset")
        else:
            assert target.tell() == len(DATA)
        return target.tell()

    monkeypatch.setattr(fetch, "_stream", broken)
    assert fetch.fetch(file, tmp_path).read_bytes() == DATA
    assert sizes == []
    sizes += [10] * 3
    with pytest.raises(RefineError, match="10 of 1,024,000 bytes came"):
        fetch.fetch(file, tmp_path / "other")
    assert not copied(file, tmp_path / "other").exists()


def test_an_attempt_leaves_nothing_to_the_next(file):
    target = io.BytesIO(b"x" * COPY)
    assert fetch._stream(file.address, target) == len(DATA)
    assert target.getvalue() == DATA


def test_another_version_is_another_copy(file, tmp_path):
    others = [replace(file, **change) for change in ({"size": 1}, {"stamp": "1"}, {"address": "a"})]
    assert len({copied(each, tmp_path) for each in [file, *others]}) == 4


def test_a_file_that_changed_or_went_is_told(bucket, file, tmp_path):
    path = bucket.root / "some/a.tar"
    os.utime(path, (1, 1))
    with pytest.raises(RefineError, match=r"some/a\.tar has changed since the run began"):
        fetch.fetch(file, tmp_path)
    path.unlink()
    with pytest.raises(RefineError, match=r"some/a\.tar has gone"):
        fetch.fetch(file, tmp_path)


def test_a_full_disk_is_no_matter_of_the_network(file, tmp_path):
    class Full:
        seek = truncate = lambda self, *_: 0

        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(RefineError, match="can't be copied to this disk: No space left") as told:
        fetch._download(file, Full())
    assert "network" not in str(told.value)


def test_small_files_are_read_whole_or_told_missing(bucket):
    address = bucket.put("some/b.jpg", DATA)
    bucket.breaks("some/b.jpg", CUT)
    assert read(address) == DATA
    assert read(bucket.put("some/empty.jpg", b"")) == b""
    assert read(f"{bucket.url}/some/c.jpg") is None
    bucket.breaks("some/b.jpg", 403)
    with pytest.raises(RefineError, match=r"b\.jpg can't be read"):
        read(address)


def test_a_file_is_opened_local_or_not(bucket, file):
    for found in (file, look(str(bucket.root / "some/a.tar"))):
        with open_file(found) as opened:
            opened.seek(255)
            assert opened.read(2) == b"\xff\0"
    os.utime(bucket.root / "some/a.tar", (1, 1))
    with pytest.raises(RefineError, match="changed"):
        open_file(found)
