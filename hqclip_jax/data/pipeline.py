"""From shards to batches: which record stands at which position, and what is made of it.

The global stream of records is a pure function of (seed, position). A host's part of batch s is the
slice [s·B + h·b, s·B + (h+1)·b) of it, so the state of the data is one number, the records consumed
globally, and hosts, threads and devices may change at a restart.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import grain
import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jax.sharding import NamedSharding

from hqclip_jax.config import Config
from hqclip_jax.data.image import ImageError, decode_fast, random_resized_crop
from hqclip_jax.data.record import DatasetError, Record, RecordError, decode, open_shards
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.text import TextChoice
from hqclip_jax.data.tokenizer import ClipTokenizer

log = logging.getLogger(__name__)

NumpyBatch = dict[str, np.ndarray]


class Place(NamedTuple):
    """A position of the global stream, and the epoch and record it stands for."""

    position: int
    epoch: int
    record: int


@dataclass(frozen=True)
class Order:
    """The global shuffle: a permutation per epoch, computed place by place.

    A pseudo-random permutation needs no memory, whatever the number of records.
    """

    records: int
    seed: int

    def __call__(self, position: int) -> Place:
        epoch, index = divmod(position, self.records)
        key = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        record = grain.experimental.index_shuffle(index, self.records - 1, key, 4)
        return Place(position, epoch, int(record))


@dataclass(frozen=True)
class HostPositions:
    """The positions that one host reads, in order, from `start` records on.

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
        return 2**62  # endless, so that no host runs out before another

    def __getitem__(self, index: int) -> int:
        local = self.batch // self.hosts
        step, row = divmod(int(index), local)
        return self.start + step * self.batch + self.host * local + row


@dataclass
class Replacements:
    """Counts the records that could not be read and were replaced, and stops a run with too many.

    Attributes:
        limit: share of the records read, above which the data set is refused.
    """

    limit: float
    read: int = 0
    reasons: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count_read(self) -> None:
        with self._lock:
            self.read += 1

    def count_replaced(self, place: Place, reason: str) -> None:
        """Raises:
        DatasetError: more than `limit` of the records read, and more than ten.
        """
        with self._lock:
            self.reasons[reason.split(":")[0]] += 1
            total = self.reasons.total()
            if len(self.examples) < 20:
                self.examples.append(f"record {place.record}: {reason}")
        log.warning("record %d of epoch %d is replaced: %s", place.record, place.epoch, reason)
        if total > max(10, self.limit * self.read):
            raise DatasetError(
                f"{total} of {self.read} records could not be read, more than data.max_replaced="
                f"{self.limit}: {'; '.join(self.examples)}"
            )


class LoadExample(grain.transforms.Map):
    """Position → one example of the batch, as numpy arrays.

    Crop and texts are drawn from a generator seeded by (seed, epoch, record). A record that can't
    be read is replaced by one drawn from (seed, epoch, position).
    """

    def __init__(
        self,
        config: Config,
        source: ArrayRecordDataSource,
        tokenizer: ClipTokenizer,
        tags: TagVocabulary | None,
        replacements: Replacements,
    ) -> None:
        self.config = config
        self.source = source
        self.order = Order(len(source), config.seed)
        self.tokenizer = tokenizer
        self.tags = tags
        self.replacements = replacements
        data = config.data
        self.choice = TextChoice(data.p_desc, data.p_neg_desc, data.list_form)

    def map(self, position: int) -> NumpyBatch:
        self.replacements.count_read()
        place = self.order(position)
        for attempt in range(1, 100):
            try:
                return self.example(place)
            except (RecordError, ImageError) as e:
                self.replacements.count_replaced(place, f"{type(e).__name__}: {e}")
            draw = np.random.default_rng([self.config.seed, place.epoch, position, attempt])
            place = place._replace(record=int(draw.integers(len(self.source))))
        raise DatasetError(f"100 records in a row could not be read, the last {place.record}")

    def example(self, place: Place) -> NumpyBatch:
        """Raises RecordError or ImageError where the record or its picture can't be read."""
        config = self.config
        record = decode(self.source[place.record])
        rng = np.random.default_rng([config.seed, place.epoch, place.record])
        positive, negative = self.texts(record, rng)
        out = {
            "uid": np.array(record.uid.encode(), "S32"),
            "image": random_resized_crop(
                decode_fast(record.image), config.model.image_size, config.data.crop_scale, rng
            ),
        }
        if config.loss.hni:
            out["text"], out["neg_text"] = self.tokenizer([positive, negative])
            # After the cut a long negative may read like its positive: nothing to tell apart.
            differs = not np.array_equal(out["text"], out["neg_text"])
            out["neg_mask"] = np.float32(bool(negative) and differs)
        else:
            (out["text"],) = self.tokenizer([positive])
        if self.tags is not None:
            out["tag_ids"] = self.tags.ids(record.tags, config.data.max_tags)
        return out

    def texts(self, record: Record, rng: np.random.Generator) -> tuple[str, str]:
        positive = self.choice.positive(record.caption, record.desc, rng)
        return positive, self.choice.negative(record.neg_desc, record.neg_tags, rng)


class Pipeline:
    """The training data of one host: opened once, iterated from any position.

    Attributes:
        records: size of the data set.
        replacements: what could not be read so far.
    """

    def __init__(
        self, config: Config, tokenizer: ClipTokenizer, tags: TagVocabulary | None
    ) -> None:
        """Raises DatasetError where a shard is missing or cut short."""
        self.config = config
        self.source = ArrayRecordDataSource(open_shards(config.data.path))
        self.records = len(self.source)
        self.replacements = Replacements(config.data.max_replaced)
        self._load = LoadExample(config, self.source, tokenizer, tags, self.replacements)

    def batches(self, start: int, host: int = 0, hosts: int = 1) -> Iterator[NumpyBatch]:
        """This host's rows of every batch from `start` consumed records on, without end.

        Args:
            host: which of the `hosts` shares of a batch, as `sharding.reader` has them.

        Yields:
            `uid` S32 [b], `image` uint8 [b, s, s, 3], `text` int32 [b, L]; with HNI `neg_text`
            int32 [b, L] and `neg_mask` f32 [b]; with a vocabulary `tag_ids` int32 [b, T].
        """
        config = self.config
        positions = HostPositions(start, config.optim.batch, host, hosts)
        read = grain.ReadOptions(config.data.threads, config.data.prefetch)
        examples = grain.MapDataset.source(positions).map(self._load).to_iter_dataset(read)
        batches = examples.batch(config.optim.batch // hosts)
        # One more thread collates, so that the training loop only takes what lies ready.
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))

    def truncation(self, sample: int = 1000) -> dict[str, float]:
        """Share of texts longer than the context, over the first records of the stream."""
        long: Counter = Counter()
        seen: Counter = Counter()
        for position in range(min(sample, self.records)):
            try:
                record = decode(self.source[self._load.order(position).record])
            except RecordError:
                continue
            for name in ("caption", "desc", "neg_desc"):
                text = getattr(record, name)
                text = text if isinstance(text, str) else ", ".join(text)
                seen[name] += bool(text)
                too_long = self._load.tokenizer.length(text) > self.config.model.context_length
                long[name] += bool(text) and too_long
        return {name: long[name] / max(seen[name], 1) for name in seen}


def to_device(batch: NumpyBatch, sharding: NamedSharding, rows: int) -> dict[str, jax.Array]:
    """This host's rows as part of global arrays of `rows`; uids stay on the host."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))
        for name, array in batch.items()
        if name != "uid"
    }
