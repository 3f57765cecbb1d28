import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hqclip_jax.data import record, shards
from hqclip_jax.data.folder import Folder
from hqclip_jax.data.record import DatasetError, RecordError, Shard, decode, encode
from hqclip_jax.data.shard_cache import ShardCache
from hqclip_jax.data.shards import Readers, ShardSource, open_source
from hqclip_jax.data.tags import TagVocabulary
from tests.conftest import make_record, write_dataset


@pytest.fixture
def copy(dataset: Path, tmp_path: Path, readers: Readers) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def a_shard(directory: Path) -> Path:
    return sorted(directory.glob("*array_record*"))[1]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def same_records(source: ShardSource) -> bool:
    return [source[i] for i in range(len(source))] == [encode(make_record(i)) for i in range(60)]


def test_records_by_number_and_where_they_lie(dataset):
    source = open_source(dataset)
    assert len(source) == 60 and same_records(source)
    first, second = (str(p) for p in sorted(dataset.glob("*array_record*")))
    places = [source.locate(i) for i in (0, 24, 25, 59)]
    assert places == [(first, 0), (first, 24), (second, 0), (second, 34)]
    for beyond in (-1, 60):
        with pytest.raises(IndexError):
            source[beyond]


def test_numbers_beyond_32_bits():
    many = tuple(Shard(f"{i}", 45_667, 1, "") for i in range(100_000))
    source = ShardSource(Folder("x"), many)
    assert len(source) == 4_566_700_000
    assert source.place(4_566_699_999) == (99_999, 45_666)
    assert source.place(45_667 * 70_000) == (70_000, 0)


def test_a_copy_sent_to_another_process_reads_too(dataset):
    source = open_source(dataset)
    source[0]
    assert same_records(pickle.loads(pickle.dumps(source)))


def test_readers_are_opened_once_and_bounded_by_their_number(dataset, readers):
    readers.most = 1
    source = open_source(dataset)
    first = readers.get(source.locate(0)[0], 25)
    assert readers.get(source.locate(1)[0], 25) is first
    source[30]
    assert len(readers) == 1
    assert readers.get(source.locate(0)[0], 25) is not first
    assert first.read([3]) == [source[3]]  # closed only when nobody holds it


def test_reader_unused_for_longest_is_closed(tmp_path, readers):
    readers.most = 2
    source = open_source(write_dataset(tmp_path / "three", [[make_record(i)] for i in range(3)]))
    source[0], source[1]
    kept = readers.get(source.locate(0)[0], 1)
    source[2]
    assert readers.get(source.locate(0)[0], 1) is kept


def test_readers_are_bounded_by_their_index(dataset, readers):
    source = open_source(dataset)
    one = shards.BYTES_PER_READER + shards.BYTES_PER_RECORD * 35
    readers.index_bytes = one
    for number, records in ((0, 25), (30, 35), (59, 35), (1, 25)):
        source[number]
        assert len(readers) == 1
        assert readers.bytes == shards.BYTES_PER_READER + shards.BYTES_PER_RECORD * records
    readers.index_bytes = 2 * one
    assert same_records(source) and len(readers) == 2 and readers.bytes <= 2 * one


def test_descriptors_are_returned(dataset, readers):
    readers.most = 1
    source = open_source(dataset)
    source[0]
    before = len(os.listdir("/proc/self/fd"))
    for i in range(200):
        source[i % 2 * 30]
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_threads_read_while_readers_are_closed(dataset, readers):
    readers.most = 1
    source = open_source(dataset)
    order = np.random.default_rng(0).integers(60, size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(source.__getitem__, order))
    assert [decode(e).uid for e in entries] == [make_record(i).uid for i in order]


@pytest.mark.parametrize("with_manifest", [True, False])
def test_truncated_shard_is_named(copy, with_manifest):
    if not with_manifest:
        (copy / record.MANIFEST_FILE).unlink()
    shard = a_shard(copy)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DatasetError, match=rf"{shard.name}.*truncated.*restore it"):
        open_source(copy)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_missing_shard_is_named(copy, with_manifest):
    if not with_manifest:
        (copy / record.MANIFEST_FILE).unlink()
    a_shard(copy).unlink()
    with pytest.raises(DatasetError, match=r"00001-of-00002 is missing: restore it"):
        open_source(copy)


def test_all_faulty_shards_are_counted(copy):
    for shard in copy.glob("*array_record*"):
        shard.unlink()
    with pytest.raises(DatasetError, match=r"00000-of-00002 is missing \(and 1 other shards\)"):
        open_source(copy)


def test_directory_without_a_manifest_takes_tfds_counts(copy):
    (copy / record.MANIFEST_FILE).unlink()
    source = open_source(copy)
    assert [s.records for s in source.shards] == [25, 35] and same_records(source)


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(DatasetError, match="is not a directory"):
        open_source(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="neither manifest"):
        open_source(tmp_path)


def test_broken_manifest_is_named(copy):
    for content in ("{", "{}", '{"shards": [{"file": "a"}]}'):
        (copy / record.MANIFEST_FILE).write_text(content)
        with pytest.raises(DatasetError, match="is not a manifest"):
            open_source(copy)


def test_flipped_byte_spoils_one_record_and_is_named(copy):
    source = open_source(copy)
    flip(a_shard(copy), 10_000)
    spoilt = {}
    for i in range(60):
        try:
            assert decode(source[i]).uid == make_record(i).uid
        except RecordError as e:
            spoilt[i] = str(e)
    ((i, told),) = spoilt.items()
    assert i > 25 and told.startswith(f"record {i - 25} of {a_shard(copy)}: Corrupted")


def test_flipped_byte_in_the_index_spoils_the_shard(copy):
    source = open_source(copy)
    flip(a_shard(copy), a_shard(copy).stat().st_size - 65_536 + 50)
    with pytest.raises(DatasetError, match=rf"{a_shard(copy).name} can't be read: Corrupted"):
        source[30]


def test_shard_exchanged_for_another_of_equal_size_is_named(copy):
    manifest = json.loads((copy / record.MANIFEST_FILE).read_text())
    manifest["shards"][1]["records"] = 34
    (copy / record.MANIFEST_FILE).write_text(json.dumps(manifest))
    source = open_source(copy)
    with pytest.raises(DatasetError, match=r"00001-of-00002.*holds 35 records.*says 34"):
        source[30]


def test_shard_that_vanishes_is_tried_again_and_then_named(copy, monkeypatch):
    source = open_source(copy)
    shard = a_shard(copy)
    away = shard.rename(copy / "away")
    with pytest.raises(DatasetError, match=rf"{shard.name} can't be read.*No such file"):
        source[30]
    pauses = []
    monkeypatch.setattr(shards, "PAUSES", (1, 2, 3))
    monkeypatch.setattr(
        shards.time, "sleep", lambda s: (pauses.append(s), s == 2 and away.rename(shard))
    )
    assert decode(source[30]).uid == make_record(30).uid and pauses == [1, 2]


def test_shard_cut_short_under_an_open_reader_is_named(copy):
    source = open_source(copy)
    source[30]
    os.truncate(a_shard(copy), 1000)
    with pytest.raises(DatasetError, match=rf"{a_shard(copy).name} can't be read"):
        source[58]


def test_gs_is_read_in_place(remote):
    source = open_source("gs://bucket/some/data/")
    shards_of = [r for r in remote.requests if "array_record" in r[0]]
    assert len(shards_of) == 2 and all(asked.endswith("-") for _, asked in shards_of)
    assert same_records(source)
    assert source.locate(30)[0].startswith("gs://bucket/some/data/rendered-train.array_record")
    remote.requests.clear()
    source[3]
    assert len(remote.requests) == 1  # the index is kept


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_metadata_is_read_from_buckets(remote, scheme, dataset):
    here, there = dataset, f"{scheme}://bucket/some/data"
    assert TagVocabulary.from_datasets([there], 10) == TagVocabulary.from_datasets([here], 10)
    with pytest.raises(FileNotFoundError, match=rf"{scheme}://bucket/none/tag_counts.json"):
        TagVocabulary.from_datasets([f"{scheme}://bucket/none"], 10)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("fault", ["is missing", "fewer bytes", "more bytes"])
def test_faulty_shard_in_a_bucket_is_named(remote, scheme, fault, tmp_path):
    shard = a_shard(remote.root / "bucket" / "some" / "data")
    size = shard.stat().st_size
    if fault == "is missing":
        shard.unlink()
    else:
        os.truncate(shard, size + (5 if fault == "more bytes" else -1))
    with pytest.raises(DatasetError, match=rf"{scheme}://bucket/.*00001-of-00002 .*{fault}"):
        open_source(f"{scheme}://bucket/some/data", ShardCache(tmp_path, 1))


def test_gs_without_a_manifest(remote):
    (remote.root / "bucket" / "some" / "data" / record.MANIFEST_FILE).unlink()
    assert same_records(open_source("gs://bucket/some/data"))


def test_passing_failures_of_a_store_are_passed_over(remote):
    remote.broken["bucket/some/data/manifest.json"] = [503]
    source = open_source("gs://bucket/some/data")
    remote.broken["bucket/some/data/" + source.shards[0].file] = [404]
    assert decode(source[0]).uid == make_record(0).uid


def test_store_that_keeps_its_doors_shut_is_told(remote):
    remote.broken["bucket/some/data/manifest.json"] = [403]
    with pytest.raises(DatasetError, match=r"gs://bucket/some/data/manifest.json can't.*credent"):
        open_source("gs://bucket/some/data")


def test_no_data_set_in_a_bucket(remote):
    with pytest.raises(DatasetError, match="gs://bucket/none has neither manifest"):
        open_source("gs://bucket/none")
