import tracemalloc

import numpy as np
import pytest

from refine import uids
from refine.errors import RefineError
from refine.uids import ENTRY, PACK, Subset, UidTable, among, from_hex, repeats, to_hex

EDGES = ["00" * 16, "ff" * 16, "00" * 15 + "01", "01" + "00" * 15, "80" + "00" * 15]


def entries(keys: list[str]) -> np.ndarray:
    """One entry per uid, its place in the list for an offset."""
    packed = b"".join(PACK.pack(bytes.fromhex(k), i % 7, i % 11, i) for i, k in enumerate(keys))
    return np.frombuffer(packed, ENTRY)


def random_keys(rng: np.random.Generator, n: int) -> list[str]:
    return [rng.bytes(16).hex() for _ in range(n)]


def test_an_entry_is_32_bytes_and_packs_as_numpy_reads_it():
    row = np.frombuffer(PACK.pack(bytes.fromhex("ab" * 16), 3, 5, 1 << 40), ENTRY)[0]
    assert (PACK.size, ENTRY.itemsize) == (32, 32)
    assert (to_hex(row["uid"]), row["file"], row["length"], row["offset"]) == (
        "ab" * 16, 3, 5, 1 << 40,
    )  # fmt: skip


@pytest.mark.parametrize("key", EDGES)
def test_hex_keeps_zero_bytes_at_the_end(key):
    assert to_hex(from_hex(key)[0]) == key


@pytest.mark.parametrize("buckets", [1, 2, 64])
def test_every_uid_is_found_whatever_the_order_and_the_buckets(tmp_path, buckets):
    rng = np.random.default_rng(0)
    keys = EDGES + random_keys(rng, 500) + [f"{i:032x}" for i in range(2, 300)]
    keys = [keys[i] for i in rng.permutation(len(keys))]
    chunks = np.split(entries(keys), [10, 10, 200])
    table = UidTable.build(tmp_path / "t", chunks, len(keys), least=buckets)
    assert {k: table.find(k)["offset"] for k in keys} == {k: i for i, k in enumerate(keys)}
    assert [table.find(k) for k in random_keys(rng, 100)] == [None] * 100
    for number in range(buckets):
        stored = [to_hex(uid) for uid in table.bucket(number)["uid"]]
        assert stored == sorted(stored)


def test_of_equal_uids_the_first_given_is_found(tmp_path):
    keys = ["aa" * 16, "bb" * 16, "aa" * 16, "aa" * 16]
    table = UidTable.build(tmp_path / "t", [entries(keys)[2:], entries(keys)[:2]], 4)
    assert table.find("aa" * 16)["offset"] == 2
    assert repeats(table.bucket(0)["uid"]).tolist() == [False, True, True, False]
    assert repeats(table.bucket(0)["uid"][:0]).tolist() == []


def test_buckets_split_evenly_also_where_uids_are_counters(tmp_path):
    keys = np.array([bytes.fromhex(f"{i:032x}") for i in range(10_000)], "S16")
    few, many = UidTable(tmp_path, 8), UidTable(tmp_path, 32)
    counts = np.bincount(few.bucket_of(keys), minlength=8)
    assert counts.sum() == 10_000 and counts.min() > 1000
    assert (many.bucket_of(keys) // 4 == few.bucket_of(keys)).all()


def test_memory_does_not_grow_with_the_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(uids, "BUCKET_ROWS", 1 << 12)
    monkeypatch.setattr(uids, "READ_ROWS", 1 << 12)
    peaks = []
    for n in (1 << 15, 1 << 18):
        rng = np.random.default_rng(n)
        path = tmp_path / f"{n}.bin"
        rows = np.zeros(n, ENTRY)
        rows["uid"] = np.frombuffer(rng.bytes(16 * n), "S16")
        rows.tofile(path)
        del rows
        tracemalloc.start()
        table = UidTable.build(tmp_path / f"t{n}", uids.read_entries(path), n)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(len(table.bucket(i)) for i in range(table.buckets)) == n
        assert table.buckets == n >> 12
    # A bucket of 4,096 rows is 128 KiB; eight times the entries are 8 MiB.
    assert peaks[1] < 1.5 * peaks[0] < 2 << 20


def test_among():
    some = np.array([b"a", b"c", b"e"], "S16")
    assert among(np.array([b"a", b"b", b"e", b"f"], "S16"), some).tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert among(some, some[:0]).tolist() == [False] * 3


@pytest.mark.parametrize("plain", [False, True])
def test_subset_in_both_published_forms(tmp_path, make, plain):
    subset = Subset(make.subset(tmp_path / "u.npy", range(0, 1000, 2), plain))
    assert (len(subset), subset.check_sorted()) == (500, 500)
    asked = np.concatenate([from_hex(make.uid(n)) for n in range(1000)])
    assert subset.contains(asked).tolist() == [n % 2 == 0 for n in range(1000)]


def test_subset_where_first_halves_repeat(tmp_path):
    rows = np.array([(0, 1), (0, 5), (0, 5), (0, 9), (7, 0), (2**64 - 1, 2**64 - 1)], np.uint64)
    np.save(tmp_path / "u.npy", rows)
    subset = Subset(tmp_path / "u.npy")
    assert subset.check_sorted() == 5
    asked = {f"{0:016x}{n:016x}": n in (1, 5, 9) for n in range(12)}
    asked |= {f"{7:016x}{0:016x}": True, f"{7:016x}{1:016x}": False, "f" * 32: True}
    for key, there in asked.items():
        assert subset.contains(from_hex(key)).tolist() == [there]


def test_unsorted_lists_are_refused_also_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(uids, "READ_ROWS", 4)
    rows = np.array([(i, 9) for i in range(8)], np.uint64)
    rows[4] = (3, 8)  # before (3, 9), at the edge of two pieces
    np.save(tmp_path / "u.npy", rows)
    with pytest.raises(RefineError, match=r"u\.npy is not sorted.*lexsort"):
        Subset(tmp_path / "u.npy").check_sorted()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.uint64), "no list of uids"),
        (np.zeros((4, 3), np.uint64), "no list of uids"),
        (np.zeros((4, 2), np.int64), "holds int64, not uint64"),
        (np.zeros((4, 2), ">u8"), "holds >u8, not uint64"),
        (np.array([{}], object), "can't be read"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, array, message):
    np.save(tmp_path / "u.npy", array, allow_pickle=True)
    with pytest.raises(RefineError, match=message):
        Subset(tmp_path / "u.npy")


def test_an_empty_list_is_refused(tmp_path):
    np.save(tmp_path / "u.npy", np.zeros((0, 2), np.uint64))
    with pytest.raises(RefineError, match=r"u\.npy"):
        Subset(tmp_path / "u.npy").check_sorted()
