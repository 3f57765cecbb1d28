"""What scorers say of an output's records, kept beside them, so that nothing is scored twice.

    OUT/scores/SCORER/scorer.json   what its numbers are
    OUT/scores/SCORER/HASH.npy      a row for each record of the shard of that content

A row counts once it is marked as scored, which is last: a kill at any moment costs the records that
are under way. A shard that is written anew has another hash, and no scores.
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from hqclip_jax.data.record import Record
from refine.errors import RefineError
from refine.judging.outputs import Output
from refine.progress import progress
from refine.storage import locked, sha256, write_json

SCORES, SCORER_FILE, SCORED = "scores", "scorer.json", "scored"
TEXTS = ("caption", "desc", "neg_desc", "tags", "neg_tags")
CLIP_COLUMNS = (*TEXTS, *(f"{text}_tokens" for text in TEXTS))
MAPPED = 32  # files that stay open

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class About:
    """A scorer, as far as its numbers depend on it.

    Attributes:
        name: of its folder.
        kind: "clip" or "judge".
        columns: of a row, f32; NaN where there is no text, or it could not be scored.
        facts: for readers of the numbers, such as {"context": 77}.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    facts: Mapping[str, float | str]


class Scorer(Protocol):
    """Gives numbers to records."""

    about: About

    def score(
        self, records: Iterable[tuple[int, Record]]
    ) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Takes numbered records and yields their rows, in any order, each as soon as it can."""


class Scores:
    """One scorer's rows of one output, memory-mapped.

    Args:
        output: what is scored.
        about: by whom.

    Raises:
        RefineError: other columns are there under this name.
    """

    def __init__(self, output: Output, about: About) -> None:
        self.output, self.about = output, about
        self.folder = output.directory / SCORES / about.name
        self.dtype = np.dtype([(SCORED, "?"), *((column, "<f4") for column in about.columns)])
        self._file = lru_cache(MAPPED)(self._open)
        stored = self.folder / SCORER_FILE
        if stored.exists() and json.loads(stored.read_text())["columns"] != list(about.columns):
            raise RefineError(f"{self.folder} was written by another version: delete it")

    def missing(self, numbers: np.ndarray | None = None) -> Iterator[int]:
        """Those of some records, or of all, that have no row yet.

        Args:
            numbers: int64 [n], ascending, or None for all.
        """
        for absent in self._absent(numbers):
            yield from absent.tolist()

    def count_missing(self, numbers: np.ndarray | None = None) -> int:
        """How many these are."""
        return sum(len(absent) for absent in self._absent(numbers))

    def put(self, number: int, values: Mapping[str, float]) -> None:
        """Keeps the row of a record."""
        shard, inside = self.output.source.place(number)
        rows = self.shard(shard)
        if rows is None:
            self._make(shard)
            rows = self._file(shard)
        for column, value in values.items():
            rows[column][inside] = value
        rows[SCORED][inside] = True

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of some records, structured [n]; all NaN where there is none.

        Args:
            numbers: int64 [n], in any order.
        """
        out = np.full(len(numbers), np.nan, self.dtype)
        out[SCORED] = False
        order = np.argsort(numbers, kind="stable")
        done = 0
        for shard, inside in self._by_shard(numbers[order]):
            rows, places = self.shard(shard), order[done : done + len(inside)]
            done += len(inside)
            if rows is not None:
                there = rows[SCORED][inside]
                out[places[there]] = rows[inside[there]]
        return out

    def shard(self, index: int) -> np.ndarray | None:
        """The rows of a shard, in order, those without scores marked so; None if it has none."""
        try:
            return self._file(index)
        except FileNotFoundError:
            return None

    def describe(self) -> None:
        """Says in the folder what its numbers are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"kind": self.about.kind, "columns": list(self.about.columns)}
        write_json(self.folder / SCORER_FILE, about | dict(self.about.facts))

    def _path(self, index: int) -> Path:
        return self.folder / f"{self.output.source.shards[index].sha256[:32]}.npy"

    def _open(self, index: int) -> np.ndarray:
        return np.lib.format.open_memmap(self._path(index), "r+")

    def _make(self, index: int) -> None:
        """Puts an empty file in place, unless another process does."""
        path = self._path(index)
        with locked(self.folder / "lock", wait=True):
            if path.exists():
                return
            partial = path.with_name(path.name + ".tmp")
            records = self.output.source.shards[index].records
            np.lib.format.open_memmap(partial, "w+", self.dtype, (records,)).flush()
            partial.replace(path)

    def _absent(self, numbers: np.ndarray | None) -> Iterator[np.ndarray]:
        """The missing records, shard by shard."""
        for shard, inside in self._by_shard(numbers):
            rows = self.shard(shard)
            absent = inside if rows is None else inside[~rows[SCORED][inside]]
            yield self._first(shard) + absent

    def _first(self, index: int) -> int:
        source = self.output.source
        return source.ends[index] - source.shards[index].records

    def _by_shard(self, numbers: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
        """Ascending numbers, shard by shard, as numbers in the shard."""
        for index, end in enumerate(self.output.source.ends):
            first = self._first(index)
            if numbers is None:
                yield index, np.arange(end - first)
                continue
            start, stop = np.searchsorted(numbers, [first, end])
            if stop > start:
                yield index, numbers[start:stop] - first


def fill(output: Output, scorer: Scorer, numbers: np.ndarray | None = None) -> Scores:
    """Scores what has no row yet.

    Args:
        output: whose records.
        scorer: gives the rows.
        numbers: which records, int64 [n], ascending; None for all.

    Raises:
        RefineError: a record can't be read, or the scorer gave up.
    """
    scores = Scores(output, scorer.about)
    left = scores.count_missing(numbers)
    if left:
        scores.describe()
        records = ((number, output.record(number)) for number in scores.missing(numbers))
        with progress(
            f"scoring {output.directory.name}: {scorer.about.name}", left, "records"
        ) as bar:
            for number, values in scorer.score(records):
                scores.put(number, values)
                bar.advance(1)
    return scores


def texts_of(record: Record) -> dict[str, str]:
    """A record's texts that are not empty; lists joined as training joins them by default."""
    joined = {name: ", ".join(getattr(record, name)) for name in TEXTS[1:]}
    return {name: text for name, text in {"caption": record.caption, **joined}.items() if text}


def clip_rows(
    batch: Sequence[tuple[int, Record]],
    zimg: np.ndarray,
    embed: Callable[[list[str]], np.ndarray],
    length: Callable[[str], int],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of `CLIP_COLUMNS`: 100 times the cosine of picture and text, and the text's tokens.

    Args:
        batch: n numbered records.
        zimg: unit vectors of their pictures, f32 [n, D]; NaN where one does not decode.
        embed: texts to unit vectors, f32 [m, D].
        length: tokens of a text, uncut, start and end among them.
    """
    texts = [texts_of(record) for _, record in batch]
    flat = [text for each in texts for text in each.values()]
    ztxt = iter(embed(flat) if flat else ())
    for (number, _), z, each in zip(batch, zimg, texts):
        row = dict.fromkeys(CLIP_COLUMNS, np.nan)
        for name, text in each.items():
            row[name] = 100 * float(z @ next(ztxt))
            row[f"{name}_tokens"] = length(text)
        yield number, row


def ahead(
    function: Callable[[T], R], items: Iterable[T], depth: int, threads: int | None = None
) -> Iterator[tuple[T, R]]:
    """Yields (item, function(item)) in order, computed in threads, at most `depth` items ahead."""
    waiting: deque = deque()
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > depth:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.")[:60] or "unnamed"


def digest_of(folder: Path) -> str:
    """12 hex digits of all that a folder's files hold and are called."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\t{sha256(path)}\n".encode())
    return digest.hexdigest()[:12]
