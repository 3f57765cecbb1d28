"""One tar of pairs to one part of the data set: read, choose, refine, check the image, write."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hqclip_jax.data.record import Record
from refine.engines import Engine, Refiner
from refine.sink import PartWriter
from refine.sources import ImageError, Pair, Skip, image_size, read_pairs
from refine.uids import Subset, from_hex


@dataclass(frozen=True)
class Job:
    """What a process needs to know to make any part.

    Attributes:
        tars: the input tars, in the order that numbers the parts.
        names: their names in records and in `skipped.jsonl`.
        parts: the directory of the parts.
        engine: prepared.
        uids: a list of the uids to keep, or None for all.
        max_pixels: larger images are skipped.
        shard_bytes: where a shard is closed.
    """

    tars: tuple[Path, ...]
    names: tuple[str, ...]
    parts: Path
    engine: Engine
    uids: Path | None
    max_pixels: int
    shard_bytes: int

    def open(self) -> "PartMaker":
        subset = self.uids and Subset(self.uids)
        return PartMaker(self, self.engine.open(), self.engine.refiner, subset)


@dataclass
class PartMaker:
    """A job with its engine and list opened, for the life of a process."""

    job: Job
    refine: Refiner
    refiner: str
    subset: Subset | None

    def make(self, number: int, limit: int | None = None) -> int:
        """Writes a part from a tar, or from its first `limit` pairs, and returns how many pairs it
        read."""
        job = self.job
        with PartWriter(job.parts, number, job.shard_bytes) as part:
            source = _Counted(read_pairs(job.tars[number], job.names[number]), limit)
            for result in self.refine(self._wanted(source, part)):
                if isinstance(result, Skip):
                    part.skip(result)
                    continue
                pair, texts = result
                try:
                    width, height = image_size(pair.image, job.max_pixels)
                except ImageError as e:
                    part.skip(pair.skip(e.reason, str(e)))
                    continue
                part.add(
                    Record(
                        uid=pair.uid,
                        image=pair.image,
                        caption=pair.caption,
                        width=width,
                        height=height,
                        source=pair.source,
                        refiner=self.refiner,
                        **vars(texts),
                    )
                )
            part.seal(source.pairs)
        return source.pairs

    def _wanted(self, items: Iterator[Pair | Skip], part: PartWriter) -> Iterator[Pair]:
        for item in items:
            if item.uid and self.subset and not self.subset.contains(from_hex(item.uid))[0]:
                # Counted and not named: they are most of the input, and the list names the rest.
                part.ledger.add("not_in_subset", 1)
            elif isinstance(item, Skip):
                part.skip(item)
            else:
                yield item


class _Counted:
    """Passes items on until `limit` pairs have come; a tar that breaks off is no pair."""

    def __init__(self, items: Iterator[Pair | Skip], limit: int | None):
        self._items, self._limit, self.pairs = items, limit, 0

    def __iter__(self) -> Iterator[Pair | Skip]:
        for item in self._items:
            self.pairs += getattr(item, "reason", "") != "broken_tar"
            yield item
            if self.pairs == self._limit:
                return


def make_part(maker: PartMaker, number: int) -> int:
    """`PartMaker.make` for `ordered_map`."""
    return maker.make(number)
