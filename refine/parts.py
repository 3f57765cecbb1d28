"""One input to one part of the data set: read, choose, refine, check the image, write."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hqclip_jax.data.record import Record
from refine.engines import Engine, Quarantined, Refined, Refiner, Sums
from refine.inputs.find import Input
from refine.inputs.pairs import BROKEN, ImageError, Pair, Skip, image_size
from refine.journal import journal_folder
from refine.sink import PartWriter
from refine.uids import Subset, from_hex

FETCHED = "fetched"


@dataclass(frozen=True)
class Job:
    """What a process needs to know to make any part.

    Attributes:
        inputs: in the order that numbers the parts.
        limits: how many pairs each gives, for those that do not give all.
        parts: the directory of the parts.
        engine: prepared.
        uids: a list of the uids to keep, or None for all.
        skip_pixels: larger images are skipped.
        shard_bytes: where a shard is closed.
    """

    inputs: tuple[Input, ...]
    limits: dict[int, int]
    parts: Path
    engine: Engine
    uids: Path | None
    skip_pixels: int
    shard_bytes: int

    def open(self) -> "PartMaker":
        subset = self.uids and Subset(self.uids)
        return PartMaker(self, self.engine.open(), self.engine.refiner, subset)

    @property
    def scratch(self) -> Path:
        """Where inputs that lie elsewhere are kept while their part is made."""
        return self.parts / FETCHED


@dataclass
class PartMaker:
    """A job with its engine and list opened, for the life of a process."""

    job: Job
    refine: Refiner
    refiner: str
    subset: Subset | None

    def make(self, number: int) -> int:
        """Writes a part and returns how many pairs it read."""
        job = self.job
        given = job.inputs[number]
        here = given.local(job.scratch)
        with PartWriter(job.parts, number, job.shard_bytes) as part:
            source = _Counted(here.pairs(), job.limits.get(number))
            for result in self.refine(self.wanted(source, part.skip), number):
                if isinstance(result, Refined):
                    self._add(part, result)
                elif isinstance(result, Quarantined):
                    part.quarantine(result)
                elif isinstance(result, Sums):
                    part.sums.add(**result.values)
                else:
                    part.skip(result)
            part.seal(source.pairs)
        shutil.rmtree(journal_folder(job.parts, number), ignore_errors=True)
        given.release(job.scratch)
        return source.pairs

    def pairs(self, number: int) -> Iterator[Pair]:
        """The pairs of a part that are to be refined."""
        job = self.job
        here = job.inputs[number].local(job.scratch)
        return self.wanted(_Counted(here.pairs(), job.limits.get(number)), lambda item: None)

    def wanted(self, items: "_Counted", passed_over: Callable[[Skip], None]) -> Iterator[Pair]:
        """The pairs among what a source gives whose uid is asked for.

        Args:
            items: of the source.
            passed_over: is given the others.
        """
        for item in items:
            if item.uid and self.subset and not self.subset.contains(from_hex(item.uid))[0]:
                passed_over(Skip("not_in_subset"))
            elif isinstance(item, Skip):
                passed_over(item)
            else:
                yield item

    def _add(self, part: PartWriter, refined: Refined) -> None:
        pair = refined.pair
        try:
            width, height = image_size(pair.image, self.job.skip_pixels)
        except ImageError as e:
            part.skip(pair.skip(e.reason, str(e)))
            return
        part.add(
            Record(
                uid=pair.uid,
                image=pair.image,
                caption=pair.caption,
                width=width,
                height=height,
                source=pair.source,
                refiner=refined.refiner or self.refiner,
                **vars(refined.texts),
            )
        )


class _Counted:
    """Passes items on until `limit` pairs have come; a file that breaks off is no pair."""

    def __init__(self, items: Iterator[Pair | Skip], limit: int | None):
        self._items, self._limit, self.pairs = items, limit, 0

    def __iter__(self) -> Iterator[Pair | Skip]:
        for item in self._items:
            self.pairs += not (isinstance(item, Skip) and item.reason in BROKEN)
            yield item
            if self.pairs == self._limit:
                return


def make_part(maker: PartMaker, number: int) -> int:
    """`PartMaker.make` for `ordered_map`."""
    return maker.make(number)
