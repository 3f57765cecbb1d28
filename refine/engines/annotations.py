"""The engine `annotations`: published texts, joined to their images by uid.

*Published* for VLM-150M and VLM-1B: tars of NNNNNN/<uid>.json, each with `tags`, `neg_tags`, `desc`
and `neg_desc`, lists of strings. The alt-text is not inside; it comes with the image. About a
quarter of the images were gone when the authors downloaded them, so absent ones are counted, not
an error.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from refine.engines import Refined, Refiner, Texts
from refine.engines.index import REASONS, AnnotationIndex
from refine.inputs.pairs import Pair, Skip
from refine.inputs.tars import fingerprint
from refine.ledger import Ledger
from refine.uids import Subset, UidTable, among, repeats, to_hex

FIELDS = ("desc", "neg_desc", "tags", "neg_tags")


class AnnotationError(ValueError):
    """JSON that is not of the published form; the message names the field."""


@dataclass(frozen=True)
class Annotations:
    """Joins annotations by uid.

    Args:
        tars: the annotation tars; of two annotations of a uid the first counts.
        index: directory of the index over them, built if it is not there.
        annotator: which model wrote them, kept in every record.
    """

    note: ClassVar[str] = "joins published annotations to images by uid"

    tars: tuple[Path, ...]
    index: Path
    annotator: str = "-"

    @property
    def refiner(self) -> str:
        return f"annotations:{self.annotator}:-"

    @property
    def buckets(self) -> int:
        return self._opened().table.buckets

    def plan(self, times: bool) -> dict:
        return {"annotations": fingerprint(self.tars, times)}

    def prepare(self, workers: int) -> None:
        AnnotationIndex.build(self.index, self.tars, workers)

    def open(self) -> Refiner:
        return partial(join, self._opened().read)

    def settle(self, ledger: Ledger, seen: UidTable, subset: Subset | None, whole: bool) -> None:
        """Counts annotations whose image never came, bucket by bucket of both sorted tables."""
        index = self._opened()
        ledger.include(index.counts, index.skips(), REASONS)
        for number in range(seen.buckets if whole else 0):
            rows = index.table.bucket(number * index.table.buckets // seen.buckets)
            uids = rows["uid"][~repeats(rows["uid"])]
            uids = uids[seen.bucket_of(uids) == number]
            alone = uids[~among(uids, seen.bucket(number)["uid"])]
            if subset is not None:
                alone = alone[subset.contains(alone)]
            names = (Skip("annotation_without_pair", uid=to_hex(uid)) for uid in alone)
            ledger.add("annotation_without_pair", len(alone), names)

    def _opened(self) -> AnnotationIndex:
        return AnnotationIndex.open(self.index, self.tars)


def join(
    read: Callable[[str], bytes | None], pairs: Iterable[Pair], number: int
) -> Iterator[Refined | Skip]:
    """Gives each pair the texts that `read` finds for its uid."""
    for pair in pairs:
        data = read(pair.uid)
        if data is None:
            yield pair.skip("missing_annotation")
            continue
        try:
            texts = parse(data)
        except AnnotationError as e:
            yield pair.skip("malformed_annotation", str(e))
            continue
        yield Refined(pair, texts)


def parse(data: bytes) -> Texts:
    """The texts of one annotation file, cleaned.

    Raises:
        AnnotationError: no JSON object, or a field that is absent or no list of strings.
    """
    try:
        stored = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise AnnotationError(f"no JSON: {e}") from e
    if not isinstance(stored, dict):
        raise AnnotationError(f"a {type(stored).__name__}, no object")
    for field in FIELDS:
        value = stored.get(field)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise AnnotationError(f"field {field!r} is no list of strings")
    return Texts.cleaned(**{field: stored[field] for field in FIELDS})
