"""Finished outputs, written without a refinement."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hqclip_jax.data.record import Record, encode, shard_name, write_metadata
from hqclip_jax.data.tags import write_counts
from refine.sink import ShardWriter, record_tags

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 210)}


def make_record(number: int, **fields) -> Record:
    """A noisy picture of one colour, and texts that name it."""
    colour = list(COLOURS)[number % 3]
    other = list(COLOURS)[(number + 1) % 3]
    rng = np.random.default_rng(number)
    pixels = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 20, (24, 32, 3)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
    made = {
        "uid": hashlib.md5(str(number).encode()).hexdigest(),
        "image": buffer.getvalue(),
        "caption": f"{colour} picture number {number}",
        "desc": (f"the picture is {colour}.", "it is plain."),
        "neg_desc": (f"the picture is {other}.",),
        "tags": (colour, "picture"),
        "neg_tags": (other,),
        "width": 32,
        "height": 24,
        "source": "0.tar",
        "refiner": "test:model:0123456789ab",
    }
    return Record(**made | fields)


def write_output(
    directory: Path, shards: Sequence[Sequence[Record]], rejected: Iterable[dict] = (), **manifest
) -> Path:
    """A finished output; keywords become fields of its manifest."""
    directory.mkdir(parents=True)
    counts: Counter = Counter()
    written = []
    for i, records in enumerate(shards):
        writer = ShardWriter(directory / shard_name("refined", "train", i, len(shards)))
        for record in records:
            writer.write(encode(record))
            counts.update(record_tags(record))
        written.append(writer.close())
    write_counts(directory, counts, sum(map(len, shards)))
    lines = [json.dumps(pair) + "\n" for pair in rejected]
    if lines:
        (directory / "quarantine.jsonl").write_text("".join(lines))
    made = {"engine": "test", "plan": {"refiner": "test:model:0123456789ab"}}
    write_metadata(directory, "refined", "train", written, made | manifest)
    return directory
