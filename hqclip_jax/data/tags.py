"""The tag vocabulary: which short tags the classification head knows."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hqclip_jax.data.folder import Folder

COUNTS_FILE = "tag_counts.json"


def normalise(tag: str) -> str:
    """The form in which tags are counted and matched: lower-case, exact (our inference)."""
    return tag.lower()


@dataclass(frozen=True)
class TagVocabulary:
    """The V most frequent tags and in how many records each was seen.

    Attributes:
        tags: V tags, most frequent first, ties in alphabetical order.
        counts: records that hold each tag.
        records: records counted in all, for inverse document frequencies.
    """

    tags: tuple[str, ...]
    counts: tuple[int, ...]
    records: int

    @classmethod
    def from_datasets(cls, directories: Iterable[str | Path], size: int) -> "TagVocabulary":
        """Adds up `tag_counts.json` of dataset directories, local, gs:// or s3://.

        Raises:
            FileNotFoundError: a directory has no counts.
        """
        counts: Counter[str] = Counter()
        records = 0
        for directory in directories:
            folder = Folder(str(directory))
            found = folder.read(COUNTS_FILE)
            if found is None:
                raise FileNotFoundError(
                    f"{folder.file(COUNTS_FILE)} is missing, so there is no tag vocabulary: write "
                    "the data set with `python -m refine run`, or train without the tag loss "
                    "(--config.loss.tag=0)"
                )
            stored = json.loads(found)
            counts.update(stored["counts"])
            records += stored["records"]
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]
        return cls(tuple(t for t, _ in ranked), tuple(c for _, c in ranked), records)

    def __len__(self) -> int:
        return len(self.tags)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {tag: i for i, tag in enumerate(self.tags)}

    def ids(self, tags: Iterable[str], width: int) -> np.ndarray:
        """The known tags' ids without repeats, int32 [width], padded with -1."""
        out = np.full(width, -1, np.int32)
        known = dict.fromkeys([self._index.get(normalise(t), -1) for t in tags])
        known.pop(-1, None)
        kept = list(known)[:width]
        out[: len(kept)] = kept
        return out

    def idf(self) -> np.ndarray:
        """log(records / count) per tag, f32 [V]: SuperClass's weighting of frequent words."""
        return np.log(max(self.records, 1) / np.maximum(self.counts, 1)).astype(np.float32)

    def to_json(self) -> dict:
        return {"tags": list(self.tags), "counts": list(self.counts), "records": self.records}

    @classmethod
    def from_json(cls, stored: dict) -> "TagVocabulary":
        return cls(tuple(stored["tags"]), tuple(stored["counts"]), stored["records"])


def write_counts(directory: str | Path, counts: Counter, records: int) -> None:
    """Writes `tag_counts.json`: {"records": n, "counts": {tag: records that hold it}}."""
    ranked = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    path = Path(directory) / COUNTS_FILE
    path.write_text(json.dumps({"records": records, "counts": ranked}, ensure_ascii=False))
