"""From the parts to the data set: duplicates dropped, shards named, counts and manifest written.

Everything here follows from the parts alone and can be done again after a kill at any moment: a
shard gets its final name in one rename, and the parts stay until the manifest is written.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from hqclip_jax.data.record import Shard, decode, shard_name
from refine.engines import Sums
from refine.inputs.pairs import Skip, read_skips
from refine.ledger import SKIPPED_FILE, Ledger
from refine.parallel import ordered_map
from refine.progress import progress
from refine.sink import QUARANTINE_FILE, Part, ShardWriter, record_tags
from refine.storage import sha256
from refine.uids import UidTable, read_entries, repeats, to_hex

COPY_RECORDS = 32


@dataclass(frozen=True)
class Losers:
    """Records whose uid an earlier record has, by part and number in it.

    Attributes:
        part: int64 [n], ascending.
        record: int64 [n], number within the part, ascending within it.
        uid: S16 [n].
        winner: int64 [n], the part of the record that is kept.
        distinct: how many different uids came in all, refined or not.
    """

    part: np.ndarray
    record: np.ndarray
    uid: np.ndarray
    winner: np.ndarray
    distinct: int

    def of(self, part: int) -> slice:
        start, stop = np.searchsorted(self.part, [part, part + 1])
        return slice(int(start), int(stop))


def collect_seen(files: Sequence[Path], directory: Path, least: int, workers: int) -> UidTable:
    """Sorts the uids of all parts on disk; `files` are their `seen.bin`."""
    rows = sum(file.stat().st_size for file in files) // 32
    chunks = (chunk for file in files for chunk in read_entries(file))
    return UidTable.build(directory, chunks, rows, workers, least)


def find_losers(seen: UidTable) -> Losers:
    """The records to drop: of equal uids the first that became a record stays, in the order of
    the tars and within them."""
    found, distinct = [], 0
    for number in range(seen.buckets):
        rows = seen.bucket(number)
        distinct += len(rows) - int(repeats(rows["uid"]).sum())
        joined = rows[rows["length"] == 1]
        again = repeats(joined["uid"])
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(joined))))
        lost = joined[again]
        found.append((lost["file"], lost["offset"], lost["uid"], joined["file"][first[again]]))
    part, record, uid, winner = (np.concatenate(column) for column in zip(*found))
    order = np.lexsort((record, part))
    part, record, winner = (column[order].astype(np.int64) for column in (part, record, winner))
    return Losers(part, record, uid[order], winner, distinct)


@dataclass(frozen=True)
class Piece:
    """A shard of a part, and the numbers of the records in it that are dropped.

    Attributes:
        path: where it lies.
        shard: what it holds.
        drop: numbers of records.
        keep: the file stays where it is; otherwise it may be moved.
    """

    path: Path
    shard: Shard
    drop: tuple[int, ...] = ()
    keep: bool = False

    @property
    def kept(self) -> int:
        return self.shard.records - len(self.drop)


def pieces(number: int, part: Part, losers: Losers, keep: bool) -> list[Piece]:
    """The shards of a part, and what is dropped of each."""
    lost = losers.record[losers.of(number)]
    found, first = [], 0
    for shard in part.shards:
        inside = lost[(lost >= first) & (lost < first + shard.records)] - first
        found.append(Piece(part.directory / shard.file, shard, tuple(inside.tolist()), keep))
        first += shard.records
    return found


def pack(found: Sequence[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Puts neighbouring pieces together while they stay within `shard_bytes`; a piece that stands
    alone and drops nothing is renamed, not copied."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in (p for p in found if p.kept):
        if not groups or size + piece.shard.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.shard.bytes
    return groups


def seal(_: None, job: tuple[list[Piece], Path, Path]) -> Shard:
    """Makes one final shard, or finds it made."""
    group, target, scratch = job
    if target.exists():
        records = sum(piece.kept for piece in group)
        return Shard(target.name, records, target.stat().st_size, sha256(target))
    if len(group) == 1 and not group[0].drop:
        if group[0].keep:
            _link(group[0].path, target, scratch)
        else:
            group[0].path.rename(target)
        return replace(group[0].shard, file=target.name)
    writer = ShardWriter(scratch / target.name)
    for piece in group:
        dropped = set(piece.drop)
        kept = [number for number in range(piece.shard.records) if number not in dropped]
        for entry in _entries(piece.path, kept):
            writer.write(entry)
    shard = writer.close()
    writer.path.rename(target)
    return shard


def _link(path: Path, target: Path, scratch: Path) -> None:
    """Gives a file one more name, or copies it where its file system has no such thing."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, scratch / target.name)
        (scratch / target.name).rename(target)


def write_shards(
    found: Sequence[Piece],
    output: Path,
    scratch: Path,
    name: str,
    split: str,
    shard_bytes: int,
    workers: int,
) -> list[Shard]:
    """Puts all shards under their final names."""
    groups = pack(found, shard_bytes)
    jobs = [
        (group, output / shard_name(name, split, i, len(groups)), scratch)
        for i, group in enumerate(groups)
    ]
    shards = []
    with progress("writing shards", len(jobs), "shards") as bar:
        for shard in ordered_map(seal, jobs, workers):
            shards.append(shard)
            bar.advance(1)
    return shards


def tags_of_dropped(found: Sequence[Piece]) -> Counter[str]:
    """In how many dropped records each tag occurs."""
    tags: Counter[str] = Counter()
    for piece in found:
        if piece.drop:
            for entry in _entries(piece.path, piece.drop):
                tags.update(record_tags(decode(entry)))
    return tags


@dataclass(frozen=True)
class Gathered:
    """What the parts add up to.

    Attributes:
        pieces: their shards, in order.
        tags: in how many kept records each tag occurs.
        sums: what the engine counted beside the pairs.
    """

    pieces: list[Piece]
    tags: Counter[str]
    sums: dict[str, float]


def gather(
    parts: Iterable[Part],
    names: Sequence[str],
    losers: Losers,
    ledger: Ledger,
    quarantine: Path,
    keep: bool = False,
) -> Gathered:
    """Adds up the parts.

    The counts and the names of what was skipped go to the ledger, and what a model said of pairs of
    which it made nothing to the file `quarantine`, where there are such, in the order of the parts.
    With `keep` the parts stay as they are.
    """
    found: list[Piece] = []
    tags: Counter[str] = Counter()
    sums = Sums()
    for number, part in enumerate(parts):
        ledger.include(part.counts, read_skips(part.directory / SKIPPED_FILE), part.named)
        mine = losers.of(number)
        ledger.add("duplicate_uid", mine.stop - mine.start, _named(losers, mine, names))
        ledger.counts["joined"] -= mine.stop - mine.start
        here = pieces(number, part, losers, keep)
        tags.update(part.tags)
        tags.subtract(tags_of_dropped(here))
        found += here
        sums.add(**part.sums)
        held = part.directory / QUARANTINE_FILE
        if held.exists():
            with open(quarantine, "ab") as out, open(held, "rb") as file:
                shutil.copyfileobj(file, out)
    return Gathered(found, +tags, sums.values)


def _named(losers: Losers, rows: slice, names: Sequence[str]) -> Iterator[Skip]:
    for part, uid, winner in zip(losers.part[rows], losers.uid[rows], losers.winner[rows]):
        detail = f"kept the first, in {names[winner]}"
        yield Skip("duplicate_uid", names[part], uid=to_hex(uid), detail=detail)


def _entries(path: Path, numbers: Sequence[int]) -> Iterator[bytes]:
    reader = ArrayRecordReader(str(path))
    for start in range(0, len(numbers), COPY_RECORDS):
        yield from reader.read(list(numbers[start : start + COPY_RECORDS]))
    reader.close()
