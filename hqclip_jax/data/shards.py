"""Where records come from: the shards of a data set, read by number from any thread.

ArrayRecord keeps 8 bytes of index per record in every open reader, 10 GiB at 1.37 billion, and a
file descriptor per shard. It can leave the index in the file, but then each read decodes the whole
of it, as slow as opening the shard anew (`bench/index.py`). So readers keep their index, and the
least recently used is closed when index or descriptors reach their bounds.
"""

import json
import logging
import resource
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from hqclip_jax.data.folder import Folder
from hqclip_jax.data.record import MANIFEST_FILE, DatasetError, RecordError, Shard
from hqclip_jax.data.shard_cache import ShardCache

log = logging.getLogger(__name__)

INDEX_BYTES = 4 * 2**30  # of all open readers of a process
BYTES_PER_RECORD = 8  # of a reader's index, as measured
BYTES_PER_READER = 16 * 2**10  # beside it
PAUSES = (1.0, 5.0, 30.0)  # seconds before each further attempt at a shard that can't be read


class Readers:
    """The open readers of a process, within bounds of memory and descriptors.

    Closing is dropping the reference: a thread that is reading holds one of its own, and the file
    closes after its read.
    """

    def __init__(self, index_bytes: int = INDEX_BYTES) -> None:
        self.index_bytes = index_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**20  # infinity is -1
        self.most = max(1, allowed // 2)  # the other half is for checkpoints, sockets and logs
        self.bytes = 0
        self._open: OrderedDict[str, tuple[ArrayRecordReader, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: str, records: int) -> ArrayRecordReader:
        """The reader of a shard of `records`, opened where need be.

        Raises:
            OSError: it can't be opened, is truncated, or holds another number of records.
        """
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path][0]
        reader = _open_reader(path, records)  # outside the lock; two threads may both open one
        with self._lock:
            self._forget(path)
            self._open[path] = reader, BYTES_PER_READER + BYTES_PER_RECORD * records
            self.bytes += self._open[path][1]
            while len(self) > 1 and (len(self) > self.most or self.bytes > self.index_bytes):
                self._forget(next(iter(self._open)))
        return reader

    def drop(self, path: str) -> None:
        with self._lock:
            self._forget(path)

    def _forget(self, path: str) -> None:
        if path in self._open:
            self.bytes -= self._open.pop(path)[1]


@cache
def readers() -> Readers:
    """One for all sources of a process: the bounds are the process's."""
    return Readers()


def _open_reader(path: str, records: int) -> ArrayRecordReader:
    # The footer is read in one request if it fits in what is fetched first.
    footer = 2 * 65_536 + 5 * records
    options = f"readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:{footer}"
    reader = ArrayRecordReader(path, options=options, file_reader_buffer_size=32_768)
    if not reader.ok():  # opening fails in silence; the next call says why
        try:
            reader.read([0])
        except RuntimeError as e:
            raise OSError(str(e)) from e
    found = reader.num_records()
    if found != records:
        raise OSError(f"it holds {found:,} records, and the data set's metadata says {records:,}")
    return reader


@dataclass(frozen=True)
class ShardSource:
    """All records of a data set by number, for any number of threads.

    Sent to another process it opens its shards anew there.

    Attributes:
        folder: where the shards lie.
        shards: in order; without a manifest `bytes` is 0 and `sha256` empty.
        cache: where shards that can't be read in place are kept.
        patient: whether a shard that can't be read is tried again for a while.
    """

    folder: Folder
    shards: tuple[Shard, ...]
    cache: ShardCache | None = None
    patient: bool = True

    @cached_property
    def ends(self) -> list[int]:
        """The number after each shard's last record."""
        return list(accumulate(s.records for s in self.shards))

    @cached_property
    def files(self) -> list[str]:
        """Each shard's path or address."""
        return [self.folder.file(s.file) for s in self.shards]

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, number: int) -> tuple[int, int]:
        """A record's shard, and its number in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = bisect_right(self.ends, number)
        return shard, number - self.ends[shard] + self.shards[shard].records

    def locate(self, number: int) -> tuple[str, int]:
        """A record's file, and its number in it, to tell people."""
        shard, inside = self.place(number)
        return self.files[shard], inside

    def __getitem__(self, number: int) -> bytes:
        """
        Raises:
            RecordError: the record's bytes are not what was written; its neighbours may be fine.
            DatasetError: the shard can't be read, after some attempts.
        """
        index, inside = self.place(number)
        for pause in (*(PAUSES if self.patient else ()), None):
            try:
                return self._read(index, inside)
            except OSError as e:
                problem = e
            if pause is not None:
                log.warning("shard %s: %s; trying again in %g s", self.files[index], problem, pause)
                time.sleep(pause)
        raise DatasetError(
            f"shard {self.files[index]} can't be read: {problem}. Restore it, or look "
            f"at the whole with `python -m hqclip_jax.data.check {self.folder.path}`"
        ) from problem

    def _read(self, index: int, inside: int) -> bytes:
        """Raises RecordError, and OSError where another attempt may help."""
        path, records = self._path(index), self.shards[index].records
        for _ in range(2):  # bytes may be damaged on their way: a second reading decides
            try:
                # As a range: a list of numbers is looked up through the shard's whole index.
                entry = readers().get(path, records).read(inside, inside + 1)[0]
            except RuntimeError as e:
                readers().drop(path)
                if not str(e).startswith("Corrupted"):
                    raise OSError(str(e)) from e
                damage = e
                continue
            if entry:
                return entry
            readers().drop(path)
            raise OSError("it was cut short")  # an open reader gives empty entries then
        raise RecordError(f"record {inside} of {self.files[index]}: {damage}")

    def _path(self, index: int) -> str:
        """What the reader opens; raises OSError where the shard can't be had."""
        if self.cache is None:
            return self.files[index]
        path, fetched = self.cache.fetch(self.folder, self.shards[index])
        if fetched:  # a reader of the same file from before it was evicted would keep its space
            readers().drop(path)
        return path


def list_shards(folder: Folder) -> tuple[Shard, ...]:
    """The shards that `manifest.json` names, or where there is none the TFDS metadata.

    Raises:
        DatasetError: no data set here, or metadata that can't be read.
    """
    if not folder.scheme and not Path(folder.path).is_dir():
        raise DatasetError(
            f"data set {folder.path!r} is not a directory: name the one that `python -m refine "
            "run` wrote, in training set --config.data.path"
        )
    manifest = folder.read(MANIFEST_FILE)
    if manifest is None:
        shards = _tfds_shards(folder)
    else:
        try:
            shards = tuple(Shard(**s) for s in json.loads(manifest)["shards"])
        except (ValueError, KeyError, TypeError) as e:
            raise DatasetError(
                f"{folder.file(MANIFEST_FILE)} is not a manifest ({e}): write the data set again"
            ) from e
    if not sum(s.records for s in shards):
        raise DatasetError(f"data set {folder.path} holds no records")
    return shards


def _tfds_shards(folder: Folder) -> tuple[Shard, ...]:
    with TemporaryDirectory() as copy:  # TFDS reads buckets only beside TensorFlow
        for name in ("dataset_info.json", "features.json"):
            Path(copy, name).write_bytes(folder.read(name) or b"")
        try:
            info = tfds.builder_from_directory(copy).info
        except Exception as e:
            raise DatasetError(
                f"{folder.path} has neither {MANIFEST_FILE} nor TFDS metadata: a refinement that "
                "was interrupted leaves none, so run the same `python -m refine run` again"
            ) from e
        split = info.splits["train" if "train" in info.splits else next(iter(info.splits))]
        names = [Path(p).name for p in split.filepaths]
        return tuple(Shard(name, n, 0, "") for name, n in zip(names, split.shard_lengths))


def find_faults(source: ShardSource) -> dict[str, str]:
    """Looks at every shard without reading it.

    With a manifest a shard must have the size it names. A data set of another origin has its shards
    opened, because a truncated one opens without complaint, as an empty one; shards that a cache
    would first have to fetch are opened when they are read.

    Returns:
        What is wrong, by shard file.
    """
    sizes = {s.file: s.bytes or None for s in source.shards}
    faults = source.folder.differing(sizes)
    for shard in source.shards:
        if shard.bytes and "has" in faults.get(shard.file, ""):
            faults[shard.file] += f" where the manifest says {shard.bytes:,}: truncated or changed"
    if source.cache is None:
        uncounted = [s for s in source.shards if not s.bytes and s.file not in faults]

        def count(shard: Shard) -> str:
            try:
                _open_reader(source.folder.file(shard.file), shard.records)
            except OSError as e:
                return f"is truncated or was changed: {e}"
            return ""

        with ThreadPoolExecutor(32) as pool:
            states = pool.map(count, uncounted)
            faults |= {s.file: state for s, state in zip(uncounted, states) if state}
    return faults


def open_source(path: str | Path, cache: ShardCache | None = None) -> ShardSource:
    """Opens a data set's records, after a look at every shard.

    Local and gs:// shards are read in place, those on s3:// through the cache.

    Args:
        path: a dataset directory, local, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
        cache: one for all data sets of a run; only s3:// needs it.

    Raises:
        DatasetError: no data set here; a shard is missing, cut short or changed; it is on s3:// and
            does not fit in the cache.
    """
    folder = Folder(str(path))
    shards = list_shards(folder)
    cached = folder.scheme == "s3"
    if cached and cache is None:
        raise DatasetError(f"{folder.path} is on s3:// and needs a cache: set --config.data.cache")
    if cached and not all(s.bytes for s in shards):
        raise DatasetError(
            f"{folder.path} has no {MANIFEST_FILE}, so a fetched shard can't be verified: copy the "
            "data set to a disk or gs://"
        )
    source = ShardSource(folder, shards, cache if cached else None)
    faults = find_faults(source)
    if faults:
        file, fault = next(iter(faults.items()))
        others = f" (and {len(faults) - 1:,} other shards)" if len(faults) > 1 else ""
        raise DatasetError(
            f"shard {folder.file(file)} {fault}{others}: restore it, or refine its source again"
        )
    if cached:
        cache.reserve(folder, sum(s.bytes for s in shards))
    _log_memory(source)
    return source


def _log_memory(source: ShardSource) -> None:
    index = BYTES_PER_RECORD * len(source) + BYTES_PER_READER * len(source.shards)
    kept = min(1.0, readers().index_bytes / index, readers().most / len(source.shards))
    log.info(
        "%s: %d records in %d shards, an index of %.2f GiB",
        source.folder.path, len(source), len(source.shards), index / 2**30,
    )  # fmt: skip
    if kept < 1:
        log.warning(
            "%s: %.0f%% of the shards stay open, a read from another opens it anew, which takes "
            "some milliseconds", source.folder.path, 100 * kept,
        )  # fmt: skip
