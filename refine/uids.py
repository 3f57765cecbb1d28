"""Uids by the hundred million: on disk, memory-mapped, never all in memory.

A uid is DataComp's: 128 bits, written as 32 hex digits.
"""

import itertools
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from refine.errors import RefineError
from refine.parallel import ordered_map

# NumPy compares S16 byte by byte, and so in the order of the hex digits; only reading one as a
# Python object strips its trailing zero bytes, which `to_hex` puts back.
ENTRY = np.dtype([("uid", "S16"), ("file", "<u4"), ("length", "<u4"), ("offset", "<u8")])
PACK = struct.Struct("<16sIIQ")  # one ENTRY
BUCKET_ROWS = 1 << 20
READ_ROWS = 1 << 20


def to_hex(uid: np.bytes_) -> str:
    return bytes(uid).ljust(16, b"\0").hex()


def from_hex(uid: str) -> np.ndarray:
    """An array S16 [1] of a uid's 32 hex digits."""
    return np.frombuffer(bytes.fromhex(uid), "S16")


def words(uids: np.ndarray) -> np.ndarray:
    """S16 [n] as numbers, uint64 [n, 2], most significant first."""
    return np.ascontiguousarray(uids).view(">u8").astype("<u8").reshape(-1, 2)


def read_entries(path: Path) -> Iterator[np.ndarray]:
    """A file of entries, a million at a time."""
    with open(path, "rb") as file:
        while len(rows := np.fromfile(file, ENTRY, READ_ROWS)):
            yield rows


class UidTable:
    """Entries sorted by uid, in bucket files of about a million that are memory-mapped.

    An entry is 32 bytes: uid, and the file number, length and offset that the uid leads to. Entries
    of equal uid keep the order in which they were given.
    """

    def __init__(self, directory: Path, buckets: int):
        self.directory, self.buckets = directory, buckets
        self._mapped: dict[int, np.ndarray] = {}

    @classmethod
    def build(
        cls,
        directory: Path,
        chunks: Iterable[np.ndarray],
        total: int,
        workers: int = 1,
        least: int = 1,
    ) -> "UidTable":
        """Sorts entries on disk, in the memory of a bucket or two for each worker.

        Args:
            directory: made here; must not exist.
            chunks: arrays of ENTRY of any length.
            total: how many entries come, about; sets the number of buckets, a power of two.
            workers: processes that sort.
            least: the least number of buckets, a power of two.
        """
        table = cls(directory, max(least, 1 << max(0, (total - 1) // BUCKET_ROWS).bit_length()))
        directory.mkdir(parents=True)
        for rows in _batched(chunks):
            bucket = table.bucket_of(rows["uid"])
            order = np.argsort(bucket, kind="stable")
            numbers, starts = np.unique(bucket[order], return_index=True)
            for number, part in zip(numbers, np.split(order, starts[1:])):
                with open(table._path(number), "ab") as file:
                    file.write(rows[part].tobytes())
        for _ in ordered_map(_sort_file, sorted(directory.iterdir()), workers):
            pass
        return table

    def bucket_of(self, uids: np.ndarray) -> np.ndarray:
        """The bucket of each uid, int64 [n]: the first bits of a mix of all its bits, so that uids
        which are no hashes spread too; a table with more buckets splits these."""
        high, low = words(uids).T
        mixed = (high ^ (low * np.uint64(0xD1B54A32D192ED03))) * np.uint64(0x9E3779B97F4A7C15)
        bits = self.buckets.bit_length() - 1
        return (mixed >> np.uint64(32) >> np.uint64(32 - bits)).astype(np.int64)

    def bucket(self, number: int) -> np.ndarray:
        """One bucket's entries, sorted, memory-mapped."""
        if number not in self._mapped:
            path = self._path(number)
            mapped = np.memmap(path, ENTRY, "r") if path.exists() else np.empty(0, ENTRY)
            self._mapped[number] = mapped.view(np.ndarray)
        return self._mapped[number]

    def find(self, uid: str) -> np.void | None:
        """The first entry given for a uid, or None."""
        key = from_hex(uid)
        rows = self.bucket(int(self.bucket_of(key)[0]))
        at = int(np.searchsorted(rows["uid"], key)[0])
        return rows[at] if at < len(rows) and rows["uid"][at] == key[0] else None

    def _path(self, number: int) -> Path:
        return self.directory / f"bucket-{number:05d}.bin"


def repeats(uids: np.ndarray) -> np.ndarray:
    """Which of sorted S16 [n] equal the one before, bool [n]."""
    return np.concatenate([np.zeros(min(len(uids), 1), bool), uids[1:] == uids[:-1]])


def among(uids: np.ndarray, haystack: np.ndarray) -> np.ndarray:
    """Which of S16 [n] are in a sorted S16 [m], bool [n]."""
    at = np.searchsorted(haystack, uids)
    found = at < len(haystack)
    found[found] = haystack[at[found]] == uids[found]
    return found


def _batched(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    held, rows = [], 0
    for chunk in itertools.chain(chunks, [None]):
        if chunk is not None:
            held.append(chunk)
            rows += len(chunk)
        if rows >= READ_ROWS or (chunk is None and rows):
            yield np.concatenate(held)
            held, rows = [], 0


def _sort_file(_: None, path: Path) -> None:
    rows = np.fromfile(path, ENTRY)
    rows[np.argsort(rows["uid"], kind="stable")].tofile(path)


class Subset:
    """A published list of uids (DataComp's, DFN's), memory-mapped.

    Args:
        path: an .npy of [("f0", "<u8"), ("f1", "<u8")] or uint64 [n, 2], sorted; the uid is
            f"{f0:016x}{f1:016x}".

    Raises:
        RefineError: not such a file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise RefineError(f"--uids {path} can't be read as an .npy file: {e}") from e
        if isinstance(rows, np.ndarray) and rows.ndim == 1 and len(rows.dtype.names or ()) == 2:
            self._high, self._low = (rows[name].view(np.ndarray) for name in rows.dtype.names)
        elif isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] == 2:
            self._high, self._low = rows.view(np.ndarray).T
        else:
            raise RefineError(
                f"--uids {path} is no list of uids: expected pairs of uint64, as DataComp publishes"
            )
        if {self._high.dtype, self._low.dtype} != {np.dtype("<u8")}:
            raise RefineError(
                f"--uids {path} holds {self._high.dtype}, not uint64: save it as an array of '<u8'"
            )

    def __len__(self) -> int:
        return len(self._high)

    def check_sorted(self) -> int:
        """Reads the list once, in pieces, and returns how many different uids it holds.

        Raises:
            RefineError: it is empty or not sorted.
        """
        distinct = int(len(self) > 0)
        for start in range(0, len(self) - 1, READ_ROWS):
            high, low = (c[start : start + READ_ROWS + 1] for c in (self._high, self._low))
            same = high[1:] == high[:-1]
            if np.any(high[1:] < high[:-1]) or np.any(same & (low[1:] < low[:-1])):
                raise RefineError(
                    f"--uids {self.path} is not sorted: sort it with "
                    f"`python -c \"import numpy as np; a = np.load('{self.path}'); np.save("
                    "'sorted.npy', np.sort(a) if a.ndim == 1 else a[np.lexsort(a.T[::-1])])\"`"
                )
            distinct += int(np.count_nonzero(~same | (low[1:] != low[:-1])))
        if not distinct:
            raise RefineError(f"--uids {self.path} holds no uids")
        return distinct

    def contains(self, uids: np.ndarray) -> np.ndarray:
        """Which of S16 [n] are in the list, bool [n]."""
        high, low = words(uids).T
        # The needles must be of the list's own dtype: searchsorted would copy the list otherwise.
        left = np.searchsorted(self._high, high, "left")
        right = np.searchsorted(self._high, high, "right")
        found = np.zeros(len(high), bool)
        single = right - left == 1
        found[single] = self._low[left[single]] == low[single]
        for i in np.flatnonzero(right - left > 1):
            run = self._low[left[i] : right[i]]
            at = np.searchsorted(run, low[i])
            found[i] = at < len(run) and run[at] == low[i]
        return found
