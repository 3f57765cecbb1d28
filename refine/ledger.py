"""Counts by reason, and the names behind them."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from refine.inputs.pairs import Skip

SKIPPED_FILE = "skipped.jsonl"
UNNAMED = {"not_in_subset"}  # most of the input: the list names the rest
NAMED = 1_000_000  # per reason: a run over a slice of the images lacks a billion annotations' pairs


class Ledger:
    """Counts everything and names it in a `skipped.jsonl`, up to a million of each reason.

    Args:
        path: the file, written anew.
        named: how many of each reason are named.
    """

    def __init__(self, path: Path, named: int = NAMED):
        self.counts: Counter[str] = Counter()
        self.named: Counter[str] = Counter()
        self._limit = named
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in `close`)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def skip(self, skip: Skip) -> None:
        self.add(skip.reason, 1, () if skip.reason in UNNAMED else (skip,))

    def add(self, reason: str, count: int, names: Iterable[Skip] = ()) -> None:
        """Counts `count` things, and names those that are still within the limit."""
        self.counts[reason] += count
        for skip in itertools.islice(names, self._limit - self.named[reason]):
            self.named[reason] += 1
            self._file.write(skip.line())

    def include(
        self, counts: dict[str, int], names: Iterable[Skip], reasons: Iterable[str]
    ) -> None:
        """Adds another ledger's counts and names; `reasons` are those that it names. Where all of
        these are at the limit here, `names` is not read."""
        self.counts.update(counts)
        if all(self.named[reason] >= self._limit for reason in reasons):
            return
        for skip in names:
            self.add(skip.reason, 0, (skip,))
