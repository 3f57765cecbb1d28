"""The same pairs in several outputs, chosen by seed; memory does not grow with the outputs.

A data set has no index by uid, so each output's uids are read once and kept as 16 bytes a record,

    OUT/scores/uids/HASH.npy    the uids of the shard of that content, in order
"""

import random
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from hqclip_jax.data.record import RecordError, decode
from hqclip_jax.data.shards import ShardSource
from refine.errors import RefineError
from refine.judging.outputs import Output
from refine.judging.scores import SCORES
from refine.parallel import ordered_map
from refine.progress import progress
from refine.uids import words

UIDS = "uids"
ROWS = 1 << 20  # uids of an output that are in memory at a time, about


def choose(outputs: Sequence[Output], limit: int, seed: int, workers: int = 1) -> list[np.ndarray]:
    """Up to `limit` pairs that all outputs have, at random.

    The choice depends on the seed and on the uids alone, not on the order of records or outputs;
    of a single output it is a choice of its records.

    Returns:
        for each output the numbers of the records, int64 [n]; the k-th of all is the same pair.
    """
    if len(outputs) == 1:
        numbers = range(len(outputs[0]))
        drawn = random.Random(seed).sample(numbers, min(limit, len(numbers)))
        return [np.array(sorted(drawn), np.int64)]
    for output in outputs:
        _index(output, workers)
    ranges = max(1, max(map(len, outputs)) // ROWS)
    found: list[list[np.ndarray]] = []
    for number in range(ranges):
        found.append(_within(outputs, seed, number, ranges))
        if sum(len(columns[0]) for columns in found) >= limit:
            break
    return [np.concatenate(column)[:limit] for column in zip(*found)]


def _within(outputs: Sequence[Output], seed: int, number: int, ranges: int) -> list[np.ndarray]:
    """The numbers of all common pairs whose mixed uid lies in one of `ranges`, by mixed uid."""
    columns = [_select(output, seed, number, ranges) for output in outputs]
    shared = reduce(np.intersect1d, (uids for uids, _ in columns))
    shared = shared[np.argsort(_mixed(shared, seed), kind="stable")]
    numbers = []
    for uids, places in columns:
        order = np.argsort(uids, kind="stable")
        numbers.append(places[order[np.searchsorted(uids[order], shared)]])
    return numbers


def _select(output: Output, seed: int, number: int, ranges: int) -> tuple[np.ndarray, np.ndarray]:
    """An output's uids in one range, S16 [m], and the numbers of their records, int64 [m]."""
    uids, places = [], []
    for first, of_shard in _uids(output):
        share = (_mixed(of_shard, seed) >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)
        inside = np.flatnonzero(share == number)
        uids.append(of_shard[inside])
        places.append(first + inside)
    return np.concatenate(uids), np.concatenate(places)


def _mixed(uids: np.ndarray, seed: int) -> np.ndarray:
    """Numbers uint64 [n] that a seed makes of S16 [n]: all bits of a uid reach all bits."""
    high, low = words(uids).T
    mixed = high ^ (low * np.uint64(0xD1B54A32D192ED03))
    mixed ^= np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _uids(output: Output) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each shard's first record, and its uids, S16 [m]."""
    source = output.source
    for index, (end, shard) in enumerate(zip(source.ends, source.shards)):
        yield end - shard.records, np.load(_path(output, index), allow_pickle=False)


def _path(output: Output, index: int) -> Path:
    digest = output.source.shards[index].sha256[:32]
    return output.directory / SCORES / UIDS / f"{digest}.npy"


def _index(output: Output, workers: int) -> None:
    """Writes the uids of those shards that have none yet."""
    paths = [_path(output, index) for index in range(len(output.source.shards))]
    jobs = [(output.source, i, path) for i, path in enumerate(paths) if not path.exists()]
    if not jobs:
        return
    jobs[0][2].parent.mkdir(parents=True, exist_ok=True)
    with progress(f"reading uids of {output.directory.name}", len(jobs), "shards") as bar:
        for _ in ordered_map(_read, jobs, workers):
            bar.advance(1)


def _read(_: None, job: tuple[ShardSource, int, Path]) -> None:
    source, index, path = job
    last, uids = source.ends[index], bytearray()
    try:
        for number in range(last - source.shards[index].records, last):
            uids += bytes.fromhex(decode(source[number], ("uid", "image")).uid)
    except RecordError as e:
        raise RefineError(f"{source.files[index]}: {e}; refine its source again") from e
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        np.save(file, np.frombuffer(uids, "S16"))
    partial.replace(path)
