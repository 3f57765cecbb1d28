"""What a student learns from: annotated pairs as questions and answers.

The question is the one that the engines will ask, word for word and pixel for pixel; the answer is
the one form of JSON that `refine.parse` reads without mending.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from hqclip_jax.data.record import MANIFEST_FILE, Record, decode
from hqclip_jax.data.shards import ShardSource, open_source
from refine.engines import Texts
from refine.errors import RefineError
from refine.inputs.pairs import ImageError
from refine.inputs.pictures import prepared
from refine.parse import FIELDS, Rejected, parse
from refine.prompts import Prompt, fence

if TYPE_CHECKING:
    from datasets import Dataset

SKIP_PIXELS = 89_478_485


def answer_text(texts: Texts) -> str:
    """The answer that says these texts: JSON without white space, the fields in their order."""
    lists = {name: getattr(texts, name) for name in FIELDS}
    return json.dumps(lists, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Lessons:
    """The records of a data set as questions and answers, read as they are asked for.

    Attributes:
        directory: the data set.
        prompt: of the student.
        max_pixels: a picture has no more.
    """

    directory: Path
    prompt: Prompt
    max_pixels: int

    @cached_property
    def source(self) -> ShardSource:
        return open_source(self.directory)

    def record(self, number: int) -> Record:
        return decode(self.source[number])

    def question(self, record: Record) -> list[dict]:
        return self.prompt.messages(fence(record.caption))

    def picture(self, record: Record) -> Image.Image:
        """Raises:
        RefineError: it can't be decoded."""
        try:
            return prepared(record.image, SKIP_PIXELS, self.max_pixels)
        except ImageError as e:
            raise RefineError(f"{self.directory}: the picture of {record.uid}: {e}") from e

    def columns(self, numbers: Sequence[int]) -> "Dataset":
        """These records as TRL takes them, each read when it is asked for."""
        from datasets import Dataset

        def load(batch: dict[str, list[int]]) -> dict[str, list]:
            records = [self.record(number) for number in batch["number"]]
            return {
                "prompt": [self.question(r) for r in records],
                "completion": [[{"role": "assistant", "content": answer_of(r)}] for r in records],
                "images": [[self.picture(r)] for r in records],
            }

        return Dataset.from_dict({"number": list(numbers)}).with_transform(load)


def answer_of(record: Record) -> str:
    """The answer that a record's texts make, without what `refine.parse` would drop.

    Raises:
        Rejected: it would not keep them.
    """
    stored = Texts(*(getattr(record, name) for name in FIELDS))
    return answer_text(parse(answer_text(stored)).texts)


@dataclass(frozen=True)
class Split:
    """Numbers of records, by what they are for.

    Attributes:
        train: ascending.
        held_out: ascending; never trained on.
        unusable: records that teach nothing good, by reason of `refine.parse`.
    """

    train: list[int]
    held_out: list[int]
    unusable: Counter[str]


def split(lessons: Lessons, share: float) -> Split:
    """Sets records apart by their uids, so that the same are apart whatever else is in the data.

    Args:
        lessons: all records.
        share: of the records that are held out.

    Raises:
        RefineError: nothing is left to train on.
    """
    train, held_out, unusable = [], [], Counter()
    for number in range(len(lessons.source)):
        record = lessons.record(number)
        try:
            answer_of(record)
        except Rejected as e:
            unusable[e.reason] += 1
            continue
        draw = int.from_bytes(hashlib.sha256(record.uid.encode()).digest()[:8], "big") / 2**64
        (held_out if draw < share else train).append(number)
    if not train:
        raise RefineError(
            f"--data {lessons.directory} leaves nothing to train on: {len(held_out)} records are "
            f"held out, and of others these are wrong: {dict(unusable)}"
        )
    return Split(train, held_out, unusable)


def data_digest(directory: Path) -> str:
    """12 hex digits that stand for a data set's records.

    Raises:
        RefineError: it is not one.
    """
    try:
        shards = json.loads((directory / MANIFEST_FILE).read_text())["shards"]
    except (OSError, ValueError, KeyError) as e:
        raise RefineError(
            f"--data {directory} is no data set ({e}): name the --output of a finished refinement"
        ) from e
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()[:12]
