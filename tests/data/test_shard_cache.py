import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from hqclip_jax.data import folder, shard_cache, shards
from hqclip_jax.data.record import DatasetError, decode
from hqclip_jax.data.shard_cache import ShardCache
from hqclip_jax.data.shards import open_source
from tests.conftest import make_record
from tests.data.test_shards import same_records

S3 = "s3://bucket/some/data"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1.0)


def fetched(server) -> list[tuple[str, str]]:
    """The requests for shards, less those that ask for the size."""
    return [r for r in server.requests if "array_record" in r[0] and not r[1].endswith("-")]


def kept(cache: ShardCache) -> list[str]:
    return sorted(p.name[17:] for p in cache.directory.iterdir() if "lock" not in p.name)


def test_every_shard_is_fetched_once_and_verified(remote, cache):
    source = open_source(S3, cache)
    assert same_records(source) and same_records(open_source(S3, cache))
    assert len(fetched(remote)) == 2
    assert kept(cache) == [s.file for s in source.shards]
    assert source.locate(30)[0].startswith("s3://bucket/some/data/")


def test_large_shards_come_in_order_and_in_parts(remote, cache, monkeypatch):
    monkeypatch.setattr(folder, "CHUNK", 10_000)
    assert same_records(open_source(S3, cache))
    assert len(fetched(remote)) > 10


def test_threads_that_want_the_same_shard_wait_for_one_fetch(remote, cache):
    source = open_source(S3, cache)
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(source.__getitem__, range(25)))
    assert [decode(e).uid for e in entries] == [make_record(i).uid for i in range(25)]
    assert len(fetched(remote)) == 1


def test_processes_share_what_one_fetched(remote, cache):
    program = f"""
from pathlib import Path
from types import SimpleNamespace
from hqclip_jax.data.shards import ShardCache, open_source
source = open_source({S3!r}, ShardCache(Path({str(cache.directory)!r}), 1.0))
print(sum(len(source[i]) for i in range(len(source))))
"""
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate()[0] for process in both]
    assert sums[0] == sums[1] and int(sums[0]) > 0
    assert len(fetched(remote)) == 2


def test_least_recently_read_goes_first(remote, cache):
    source = open_source(S3, cache)
    first, second = source.shards
    for number, shard in enumerate((first, second)):
        path, _ = cache.fetch(source.folder, shard)
        os.utime(path, (number, number))
    assert not cache.fetch(source.folder, first)[1]  # there, and now the one read last
    small = ShardCache(cache.directory, (first.bytes + second.bytes + 10) / shard_cache.GB)
    other = type(first)(first.file, first.records, first.bytes, "")  # no hash: another name
    small.fetch(source.folder, other)
    assert kept(cache) == [first.file, first.file]


def test_evicted_shard_is_fetched_again(remote, cache):
    source = open_source(S3, cache)
    source[0]
    for path in cache.directory.glob("*array_record*"):
        path.unlink()
    assert decode(source[0]).uid == make_record(0).uid and kept(cache) == [source.shards[0].file]


def test_spoilt_transfer_is_tried_again_and_then_named(remote, cache):
    source = open_source(S3, cache)
    shard = remote.root / "bucket" / "some" / "data" / source.shards[0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"?" + whole[101:])
    with pytest.raises(DatasetError, match=rf"{shard.name} can't be read: .*SHA-256"):
        source[0]
    assert len(fetched(remote)) == 1 + len(shards.PAUSES) and kept(cache) == []
    shard.write_bytes(whole)
    assert decode(source[0]).uid == make_record(0).uid


def test_data_set_written_anew_is_fetched_anew(remote, cache):
    source = open_source(S3, cache)
    source[0]
    newer = type(source.shards[0])(source.shards[0].file, 25, source.shards[0].bytes, "0" * 64)
    assert cache.name(source.folder, newer) != cache.name(source.folder, source.shards[0])


def test_part_left_by_a_killed_process_is_replaced(remote, cache):
    source = open_source(S3, cache)
    part = cache.directory / (cache.name(source.folder, source.shards[0]) + ".part")
    cache.directory.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"?" * 10_000_000)
    assert decode(source[0]).uid == make_record(0).uid and not part.exists()


def test_data_set_larger_than_the_cache_is_refused(remote, cache):
    small = ShardCache(cache.directory, 1e-4)
    with pytest.raises(DatasetError, match=r"s3://bucket.* do not fit in data\.cache_gb=0\.0001"):
        open_source(S3, small)


def test_data_sets_are_counted_together(remote, cache, tmp_path):
    source = open_source(S3, cache)
    size = sum(s.bytes for s in source.shards)
    cache.reserve(source.folder, size)  # the same again counts once
    with pytest.raises(DatasetError, match=r"data, s3://other.*do not fit in data.cache_gb=1,"):
        cache.reserve(shards.Folder("s3://other"), int(1e9) - size + 1)


def test_disk_without_room_is_told(remote, cache, monkeypatch):
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DatasetError, match=r"do not fit on the disk of data\.cache="):
        open_source(S3, cache)


def test_s3_needs_a_cache_and_a_manifest(remote, cache):
    with pytest.raises(DatasetError, match=r"--config\.data\.cache"):
        open_source(S3)
    (remote.root / "bucket" / "some" / "data" / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"no manifest\.json"):
        open_source(S3, cache)
