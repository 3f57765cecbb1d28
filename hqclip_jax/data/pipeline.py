"""From shards to batches: what is made of the record at each position of the global stream.

A host's part of batch s is the slice [s·B + h·b, s·B + (h+1)·b) of the stream that `order.Mixture`
defines, so nothing here has a state of its own.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from hqclip_jax import config as config_lib
from hqclip_jax.config import Config
from hqclip_jax.data.image import ImageError, TooManyPixels, load_crop
from hqclip_jax.data.order import HostBatches, Mixture, Place, Shuffle
from hqclip_jax.data.record import (
    REPLACED,
    DatasetError,
    Record,
    RecordError,
    decode,
)
from hqclip_jax.data.shard_cache import ShardCache
from hqclip_jax.data.shards import ShardSource, open_source
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.text import TextChoice
from hqclip_jax.data.tokenizer import Tokenizer

NumpyBatch = dict[str, np.ndarray]

MOST_NAMED = 100_000
ATTEMPTS = 100
ROWS = 16  # that a thread makes at a time


class ReplacedLog:
    """Names each replaced record in a file, one JSON object a line, up to `MOST_NAMED` a process.

    A run that is killed reads the records since its last checkpoint again, and names them again.

    Args:
        path: of the file; None writes none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.written = 0

    def write(self, **fields: object) -> None:
        if self.path is None or self.written >= MOST_NAMED:  # threads may step over it
            return
        self.written += 1
        if self.written >= MOST_NAMED:
            fields = {"reason": f"after {MOST_NAMED:,} lines of this process no more are named"}
        # One write of a short line to a file that is opened for appending never mixes with others.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(fields) + "\n").encode())
        finally:
            os.close(file)


class Row(NamedTuple):
    """A row of a batch before its picture is decoded.

    Attributes:
        replaced: 0, or the number in `REPLACED` of why its own record was not taken.
        attempt: how many records were tried before.
    """

    position: int
    place: Place
    record: Record
    rng: np.random.Generator
    positive: str
    negative: str
    replaced: int
    attempt: int


class LoadBatch(grain.transforms.Map):
    """A host's positions of a batch → their rows, as numpy arrays.

    Threads share the rows, some consecutive ones at a time: what is cheap costs three times as much
    when the decoding of a picture has emptied the caches in between. All write into the same
    arrays, so nothing is put together afterwards.
    """

    def __init__(
        self,
        config: Config,
        mixture: Mixture,
        sources: list[ShardSource],
        tokenizer: Tokenizer,
        tags: TagVocabulary | None,
        log: ReplacedLog,
    ) -> None:
        self.config = config
        self.mixture = mixture
        self.sources = sources
        self.tokenizer = tokenizer
        self.tags = tags
        self.log = log
        data = config.data
        self.choice = TextChoice(data.p_desc, data.p_neg_desc, data.list_form)
        self.fields = ["uid", "image", "caption", "desc"]
        self.fields += ["neg_desc", "neg_tags"] * bool(config.loss.hni) + ["tags"] * (
            tags is not None
        )

    def map(self, positions: range) -> NumpyBatch:
        batch = self._empty(len(positions))
        places = self.mixture(positions)

        def fill(rows: slice) -> None:
            out = {name: array[rows] for name, array in batch.items()}
            self._fill(positions[rows], places[rows], out)

        shares = [slice(first, first + ROWS) for first in range(0, len(positions), ROWS)]
        deque(_decoders(self.config.data.threads).map(fill, shares), maxlen=0)  # raises theirs
        return batch

    def _empty(self, rows: int) -> NumpyBatch:
        size, context = self.config.model.image_size, self.config.model.context_length
        batch = {
            "uid": np.empty(rows, "S32"),
            "image": np.empty((rows, size, size, 3), np.uint8),
            "text": np.empty((rows, context), np.int32),
            "text_cut": np.empty(rows, np.float32),
            "replaced": np.empty(rows, np.int32),
        }
        if self.config.loss.hni:
            batch["neg_text"] = np.empty((rows, context), np.int32)
            batch["neg_mask"] = np.empty(rows, np.float32)
        if self.tags is not None:
            batch["tag_ids"] = np.empty((rows, self.config.data.max_tags), np.int32)
        return batch

    def _fill(self, positions: range, places: list[Place], out: NumpyBatch) -> None:
        rows = [self.row(*found) for found in zip(positions, places)]
        for i, row in enumerate(rows):
            rows[i] = self.picture(row, out["image"][i])
        out["uid"][:] = [row.record.uid.encode() for row in rows]
        out["replaced"][:] = [row.replaced for row in rows]
        texts = [row.positive for row in rows]
        out["text"][:] = self.tokenizer(texts)
        out["text_cut"][:] = [self.tokenizer.cuts(*cut) for cut in zip(texts, out["text"])]
        if self.config.loss.hni:
            out["neg_text"][:] = self.tokenizer([row.negative for row in rows])
            # After the cut a long negative may read like its positive: nothing to tell apart.
            differs = (out["text"] != out["neg_text"]).any(axis=1)
            out["neg_mask"][:] = differs & [bool(row.negative) for row in rows]
        if self.tags is not None:
            for ids, row in zip(out["tag_ids"], rows):
                ids[:] = self.tags.ids(row.record.tags, len(ids))

    def row(self, position: int, place: Place, replaced: int = 0, attempt: int = 0) -> Row:
        """The record that stands at a position, or one in its place.

        Raises:
            DatasetError: as many as `ATTEMPTS` could not be read.
        """
        shuffle = self.mixture.shuffles[place.source]
        for tried in range(attempt, ATTEMPTS):
            if tried:
                record = shuffle.stand_in(place.epoch, place.index, tried)
                place = place._replace(record=record)
            try:
                record = decode(self.sources[place.source][place.record], self.fields)
            except RecordError as e:
                replaced = self._count(position, place, e, replaced)
                continue
            rng = shuffle.rng(place.epoch, place.record)
            texts = self.texts(record, rng)
            return Row(position, place, record, rng, *texts, replaced, tried)
        raise DatasetError(
            f"{ATTEMPTS} records in a row could not be read, the first of them record "
            f"{self.mixture(range(position, position + 1))[0].record} of source {shuffle.name!r}: "
            "`python -m hqclip_jax.data.check` says what is wrong with a data set"
        )

    def picture(self, row: Row, out: np.ndarray) -> Row:
        """Puts the row's picture into `out`, uint8 [size, size, 3]; returns the row, or the one in
        its place where it has no picture that can be decoded."""
        data = self.config.data
        while True:
            try:
                size, encoded = len(out), row.record.image
                load_crop(encoded, size, data.crop_scale, row.rng, data.max_pixels, out)
                return row
            except ImageError as e:
                replaced = self._count(row.position, row.place, e, row.replaced)
            row = self.row(row.position, row.place, replaced, row.attempt + 1)

    def texts(self, record: Record, rng: np.random.Generator) -> tuple[str, str]:
        positive = self.choice.positive(record.caption, record.desc, rng)
        return positive, self.choice.negative(record.neg_desc, record.neg_tags, rng)

    def _count(
        self, position: int, place: Place, error: RecordError | ImageError, replaced: int
    ) -> int:
        """Names what could not be read; the first reason is the one that counts."""
        reason = _reason(error)
        self.log.write(
            position=position, source=self.mixture.shuffles[place.source].name, epoch=place.epoch,
            record=place.record, shard=self.sources[place.source].locate(place.record),
            reason=reason, detail=str(error),
        )  # fmt: skip
        return replaced or REPLACED.index(reason) + 1


def _reason(error: RecordError | ImageError) -> str:
    if isinstance(error, RecordError):
        return "record"
    return "pixels" if isinstance(error, TooManyPixels) else "image"


class Pipeline:
    """The training data of a run from a position on, opened once.

    Attributes:
        records: size of each source.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        tags: TagVocabulary | None,
        position: Mapping[str, int] | None = None,
        replaced_log: Path | None = None,
    ) -> None:
        """Args:
            position: records consumed of each source; none by default.
            replaced_log: the file that names what could not be read.

        Raises:
            DatasetError: a shard is missing or cut short.
        """
        self.config = config
        self.consumed = dict(position or {})
        named = config_lib.sources(config.data.path)
        cache = ShardCache(Path(config.data.cache), config.data.cache_gb)
        sources = [open_source(source.path, cache) for source in named]
        self.records = {source.name: len(found) for source, found in zip(named, sources)}
        shuffles = [Shuffle(name, size, config.seed) for name, size in self.records.items()]
        weights = [source.weight or self.records[source.name] for source in named]
        self.mixture = Mixture.resume(shuffles, weights, self.consumed)
        log = ReplacedLog(replaced_log)
        self.load = LoadBatch(config, self.mixture, sources, tokenizer, tags, log)

    def shares(self) -> dict[str, float]:
        """Share of the samples that each source gives."""
        whole = sum(self.mixture.weights)
        return {name: w / whole for name, w in zip(self.records, self.mixture.weights)}

    def position(self, steps: int) -> dict[str, int]:
        """Records consumed of each source after `steps` more batches. A source that is no longer
        read keeps its count, so that it can be taken up again."""
        reached = self.mixture.start + steps * self.config.optim.batch
        return self.consumed | self.mixture.consumed_at(reached)

    def batches(self, host: int = 0, hosts: int = 1) -> Iterator[NumpyBatch]:
        """This host's rows of every batch, without end.

        Args:
            host: which of the `hosts` shares of a batch, as `sharding.reader` has them.

        Yields:
            `uid` S32 [b], `image` uint8 [b, s, s, 3], `text` int32 [b, L], `text_cut` f32 [b], 1
            where the text was longer than the context, `replaced` int32 [b], 0 or a number of
            `REPLACED`; with HNI `neg_text` int32 [b, L] and `neg_mask` f32 [b]; with a vocabulary
            `tag_ids` int32 [b, T].
        """
        data = self.config.data
        own = HostBatches(self.mixture.start, self.config.optim.batch, host, hosts)
        read = grain.ReadOptions(data.prefetch, data.prefetch)
        batches = grain.MapDataset.source(own).map(self.load).to_iter_dataset(read)
        if data.processes:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's processes are started through absl
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(data.processes))
        return iter(batches)

    def truncation(self, sample: int = 1000) -> dict[str, float]:
        """Share of texts longer than the context, over the first records of the stream."""
        context = self.config.model.context_length
        long: dict[str, list[bool]] = {"caption": [], "desc": [], "neg_desc": []}
        start = self.mixture.start
        for place in self.mixture(range(start, start + min(sample, sum(self.records.values())))):
            try:
                record = decode(self.load.sources[place.source][place.record])
            except RecordError:
                continue
            for name, found in long.items():
                text = getattr(record, name)
                text = text if isinstance(text, str) else ", ".join(text)
                if text:
                    found.append(self.load.tokenizer.length(text) > context)
        return {name: float(np.mean(found or [0])) for name, found in long.items()}


@cache
def _decoders(threads: int) -> ThreadPoolExecutor:
    # As long a thread that comes back from C may have to wait for Python's lock. By default it is
    # 5 ms, in which it would decode three pictures.
    sys.setswitchinterval(0.0005)
    return ThreadPoolExecutor(threads, "decoder")


def to_device(batch: NumpyBatch, sharding: NamedSharding, rows: int) -> dict[str, jax.Array]:
    """This host's rows as part of global arrays of `rows`; uids stay on the host."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))
        for name, array in batch.items()
        if name != "uid"
    }
