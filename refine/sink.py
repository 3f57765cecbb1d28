"""Where records go: ArrayRecord shards, and the part of a data set that comes from one input.

A part is a directory .parts/NNNNNN, renamed into place when it is whole:

    0.array_record …   records in the order of the tar
    seen.bin           one entry per uid that came: part, joined or not, number among the records
    skipped.jsonl      what did not become a record
    quarantine.jsonl   what a model said of those of which it made nothing that passes
    part.json          the shards, the counts, the tags, the sums of what the engine counted
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from hqclip_jax.data.record import WRITER_OPTIONS, Record, Shard, encode
from hqclip_jax.data.tags import normalise
from refine.engines import Quarantined, Sums
from refine.errors import RefineError
from refine.inputs.pairs import Skip
from refine.ledger import SKIPPED_FILE, Ledger
from refine.storage import sha256, write_json
from refine.uids import PACK

PART_FILE, SEEN_FILE, QUARANTINE_FILE = "part.json", "seen.bin", "quarantine.jsonl"


class ShardWriter:
    """Writes one ArrayRecord file.

    Raises:
        RefineError: the file can't be written; from `write` or `close`.
    """

    def __init__(self, path: Path):
        self.path, self.records, self.bytes = path, 0, 0
        self._writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)

    def write(self, entry: bytes) -> None:
        try:
            self._writer.write(entry)
        except RuntimeError as e:
            raise RefineError(f"{self.path} can't be written ({e}): is the disk full?") from e
        self.records += 1
        self.bytes += len(entry)

    def close(self) -> Shard:
        try:
            self._writer.close()
        except RuntimeError as e:
            raise RefineError(f"{self.path} can't be written ({e}): is the disk full?") from e
        size = self.path.stat().st_size
        return Shard(self.path.name, self.records, size, sha256(self.path))


def record_tags(record: Record) -> set[str]:
    """The tags that a record counts for, each once."""
    return {normalise(tag) for tag in record.tags}


@dataclass(frozen=True)
class Part:
    """A finished part.

    Attributes:
        directory: where it lies.
        shards: its ArrayRecord files, as written.
        counts: by reason, "pairs" and "joined" among them.
        named: the reasons that its `skipped.jsonl` names.
        tags: in how many records each tag occurs.
        sums: what the engine counted beside the pairs.
    """

    directory: Path
    shards: tuple[Shard, ...]
    counts: dict[str, int]
    named: tuple[str, ...]
    tags: dict[str, int]
    sums: dict[str, float]

    @classmethod
    def load(cls, directory: Path) -> "Part":
        stored = json.loads((directory / PART_FILE).read_text())
        shards = tuple(Shard(**shard) for shard in stored.pop("shards"))
        return cls(directory, shards, **stored)


class PartWriter:
    """Writes one part under a temporary name; `seal` puts it in place.

    Args:
        parts: the directory of all parts.
        number: of this part; parts are ordered by it.
        shard_bytes: a shard is closed when its entries reach so many bytes.
    """

    def __init__(self, parts: Path, number: int, shard_bytes: int):
        self.number, self.shard_bytes = number, shard_bytes
        self.target = part_directory(parts, number)
        self.directory = parts / f"{self.target.name}.tmp-{os.getpid()}"
        self.directory.mkdir()
        self.ledger = Ledger(self.directory / SKIPPED_FILE)
        self.tags: Counter[str] = Counter()
        self.shards: list[Shard] = []
        self.sums = Sums()
        self._open: ShardWriter | None = None
        self._seen = bytearray()
        self._joined = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_) -> None:
        self.ledger.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, record: Record) -> None:
        if self._open is None:
            path = self.directory / f"{len(self.shards)}.array_record"
            self._open = ShardWriter(path)
        self._open.write(encode(record))
        self._see(record.uid, joined=True)
        self._joined += 1
        self.tags.update(record_tags(record))
        if self._open.bytes >= self.shard_bytes:
            self._close_shard()

    def skip(self, skip: Skip) -> None:
        self.ledger.skip(skip)
        if skip.uid:
            self._see(skip.uid, joined=False)

    def quarantine(self, item: Quarantined) -> None:
        self.skip(item.pair.skip(item.reason, item.detail))
        with open(self.directory / QUARANTINE_FILE, "a", encoding="ascii") as file:
            file.write(item.line())

    def seal(self, pairs: int) -> None:
        """Finishes the part; `pairs` is how many its input held."""
        self._close_shard()
        self.ledger.close()
        (self.directory / SEEN_FILE).write_bytes(self._seen)
        part = {
            "shards": [asdict(shard) for shard in self.shards],
            "counts": {"pairs": pairs, "joined": self._joined, **self.ledger.counts},
            "named": list(self.ledger.named),
            "tags": dict(sorted(self.tags.items())),
            "sums": self.sums.values,
        }
        write_json(self.directory / PART_FILE, part)
        self.directory.rename(self.target)

    def _see(self, uid: str, joined: bool) -> None:
        self._seen += PACK.pack(bytes.fromhex(uid), self.number, joined, self._joined)

    def _close_shard(self) -> None:
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None


def part_directory(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}"
