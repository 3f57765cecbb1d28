"""Which record stands where: the global order of a mixture, a pure function of seed and counts.

The state of the data is one number per source, the records consumed of it globally. From these
numbers, the seed and the weights follows every later record, whatever reads it: hosts, threads and
devices may change at a restart, and so may the weights.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from hqclip_jax.data.record import DatasetError

# Positions after which the pattern of sources repeats: weights have this precision.
PERIOD = 1 << 16
ROUNDS = 6
_GOLDEN, _ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # that mix bits well


class Place(NamedTuple):
    """What stands at a position of the global stream.

    Attributes:
        source: number of the source.
        index: place in that source's own endless stream; all that chance decides depends on it.
        epoch: how often the source was gone through before.
        record: number of the record in the source.
    """

    source: int
    index: int
    epoch: int
    record: int


@dataclass(frozen=True)
class Shuffle:
    """One source's endless stream: a new permutation every epoch, computed place by place.

    A pseudo-random permutation needs no memory, whatever the number of records.

    Attributes:
        name: of the source; two sources of one size are shuffled differently.
        records: its size.
        seed: of the run.
    """

    name: str
    records: int
    seed: int

    def __call__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and records at places of the stream, int64 [n]."""
        epoch, place = np.divmod(index, self.records)
        record = np.empty_like(place)
        for number in np.unique(epoch):
            own = epoch == number
            record[own] = _permuted(place[own], self.records, self._keys(int(number))[0])
        return epoch, record

    def rng(self, epoch: int, record: int) -> np.random.Generator:
        """What decides crop and texts: a function of (seed, source, epoch, record)."""
        return _stream(self._keys(epoch)[1], record)

    def stand_in(self, epoch: int, index: int, attempt: int) -> int:
        """The record in place of one that can't be read: a function of (seed, source, epoch, index)
        and of how many were tried."""
        rng = _stream(self._keys(epoch)[2], index)
        return int(rng.integers(self.records, size=attempt)[-1])

    def _keys(self, epoch: int) -> tuple[int, ...]:
        return _epoch_keys(self.seed, zlib.crc32(self.name.encode()), epoch)


@lru_cache(maxsize=256)
def _epoch_keys(*seeds: int) -> tuple[int, ...]:
    """Seeds of the permutation, of crops and texts, and of stand-ins."""
    return tuple(map(int, np.random.SeedSequence(seeds).generate_state(3, np.uint64)))


class _PhiloxKey(ISeedSequence):
    """Two words as they are: Philox given its `key` outright asks the system for entropy as well,
    which takes three times as long."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return np.array(self._words, dtype)


def _stream(key: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(_PhiloxKey(number, key)))


def _permuted(place: np.ndarray, records: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of `range(records)` takes places, int64 [n].

    A number is written as two digits of bases whose product is hardly more than `records`; by turns
    each is moved by a hash of the other, which can be undone, and so no two numbers meet: Black and
    Rogaway's generalized Feistel network (2002). What ends outside goes round again.
    """
    base = math.isqrt(records - 1) + 1
    bases = np.uint64(-(-records // base)), np.uint64(base)
    keys = np.uint64(key) + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)

    def moved(number: np.ndarray) -> np.ndarray:
        digits = list(np.divmod(number, bases[1]))
        for turn, key in enumerate(keys):
            mixed = (digits[1 - turn % 2] ^ key) * _ODD
            mixed = (mixed ^ (mixed >> 32)) * _ODD
            digits[turn % 2] = (digits[turn % 2] + (mixed >> 33)) % bases[turn % 2]
        return digits[0] * bases[1] + digits[1]

    found = moved(place.astype(np.uint64))
    while (outside := found >= records).any():
        found[outside] = moved(found[outside])
    return found.astype(np.int64)


def _pattern(weights: Sequence[float]) -> np.ndarray:
    """The source of each of `PERIOD` positions, int64: each source as often as its weight says and
    spread evenly, so that any stretch of the stream holds its share to within a record or two."""
    shares = np.asarray(weights, float) / sum(weights) * PERIOD
    quota = np.floor(shares).astype(int)
    quota[np.argsort(quota - shares, kind="stable")[: PERIOD - quota.sum()]] += 1
    places = [(np.arange(n) + 0.5) / n for n in quota]
    source = np.repeat(np.arange(len(quota)), quota)
    return source[np.argsort(np.concatenate(places), kind="stable")]


@dataclass(frozen=True)
class Mixture:
    """The global stream: at every position a record of one of the sources.

    Attributes:
        shuffles: the sources.
        weights: their shares; they need not add up to 1.
        consumed: records of each that were consumed before `start`.
        start: records consumed in all; of sources that are no longer there, too.

    Raises:
        DatasetError: a source whose share is too small to be drawn.
    """

    shuffles: tuple[Shuffle, ...]
    weights: tuple[float, ...]
    consumed: tuple[int, ...]
    start: int
    _source: np.ndarray = field(init=False, repr=False, compare=False)
    _before: np.ndarray = field(init=False, repr=False, compare=False)
    _first: np.ndarray = field(
        init=False, repr=False, compare=False
    )  # index at the pattern's first

    def __post_init__(self) -> None:
        pattern = _pattern(self.weights)
        for number, shuffle in enumerate(self.shuffles):
            if number not in pattern:
                share = self.weights[number] / sum(self.weights)
                raise DatasetError(
                    f"source {shuffle.name!r} has {share:.2g} of the samples, and below "
                    f"{1 / PERIOD:.2g} none is ever read: give it a greater weight in data.path"
                )
        drawn = pattern[:, None] == np.arange(len(self.weights))
        before = np.concatenate([np.zeros((1, len(self.weights)), int), np.cumsum(drawn, axis=0)])
        object.__setattr__(self, "_source", pattern)
        object.__setattr__(self, "_before", before)
        object.__setattr__(self, "_first", self.consumed - self._drawn(self.start))

    @classmethod
    def resume(
        cls, shuffles: Sequence[Shuffle], weights: Sequence[float], position: Mapping[str, int]
    ) -> "Mixture":
        """Goes on where `position`, records consumed by the names of their sources, left off."""
        consumed = tuple(position.get(shuffle.name, 0) for shuffle in shuffles)
        return cls(tuple(shuffles), tuple(weights), consumed, sum(position.values()))

    def _drawn(self, position: int) -> np.ndarray:
        """How often the pattern has drawn each source before `position`, int64 [sources]."""
        periods, rest = divmod(position, PERIOD)
        return periods * self._before[-1] + self._before[rest]

    def consumed_at(self, position: int) -> dict[str, int]:
        """Records of each source consumed when the stream has reached `position`."""
        counts = self.consumed + self._drawn(position) - self._drawn(self.start)
        return {shuffle.name: int(n) for shuffle, n in zip(self.shuffles, counts)}

    def __call__(self, positions: range) -> list[Place]:
        """What stands at consecutive positions; at many together it costs the least."""
        periods, rest = np.divmod(np.arange(positions.start, positions.stop), PERIOD)
        source = self._source[rest]
        index = (
            self._first[source] + periods * self._before[-1, source] + self._before[rest, source]
        )
        epoch, record = np.empty_like(index), np.empty_like(index)
        for number in np.unique(source):
            own = source == number
            epoch[own], record[own] = self.shuffles[number](index[own])
        return list(map(Place, *(a.tolist() for a in (source, index, epoch, record))))


@dataclass(frozen=True)
class HostBatches:
    """The positions that one host reads: its part of every batch, in order and without end.

    Attributes:
        start: records consumed globally before.
        batch: global batch.
        host: this host's index.
        hosts: hosts in all; each reads batch/hosts consecutive positions of every batch.
    """

    start: int
    batch: int
    host: int = 0
    hosts: int = 1

    def __len__(self) -> int:
        return 2**62  # so that no host runs out before another

    def __getitem__(self, step: int) -> range:
        local = self.batch // self.hosts
        first = self.start + int(step) * self.batch + self.host * local
        return range(first, first + local)
