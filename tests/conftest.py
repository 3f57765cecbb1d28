"""Eight simulated devices for the whole suite, one compile cache, and a rendered data set."""

import os
import tempfile

# Before anything imports JAX; subprocesses inherit the first three flags. Tests compile much and
# compute little, so the code need not be optimised, nor come from the emitters that then take twice
# as long. Eight devices on two busy cores may keep one another waiting for longer than the 40 s
# after which XLA aborts the process; for ever where its scheduler lets them begin collectives in
# different orders, which the one for memory does not.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="hqclip-xla-"))

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from hqclip_jax.data import record, tags
from hqclip_jax.data.record import Record
from tests.real_data import real_data  # noqa: F401 (a fixture)

CPU_FLAGS = os.environ["XLA_FLAGS"]  # what every test of a worker's own process is compiled with
jax.devices()  # has read them; the TPU's compiler ends a process with the two it does not know
os.environ["XLA_FLAGS"] = CPU_FLAGS.rsplit(" ", 2)[0]

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 210)}


def make_record(index: int) -> Record:
    """A noisy one-coloured picture and texts that name the colour; every fifth has no negatives."""
    rng = np.random.default_rng(index)
    colour = list(COLOURS)[index % 3]
    other = list(COLOURS)[(index + 1) % 3]
    pixels = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 20, (24, 32, 3)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
    negatives = index % 5 > 0
    return Record(
        uid=hashlib.sha256(str(index).encode()).hexdigest()[:32],
        image=buffer.getvalue(),
        caption=f"{colour} picture number {index}",
        desc=(f"the picture is {colour}.", "it is plain."),
        neg_desc=(f"the picture is {other}.",) if negatives else (),
        tags=(colour, "picture"),
        neg_tags=(other,) if negatives else (),
        width=32,
        height=24,
        source="rendered",
        refiner="test",
    )


def write_dataset(directory: Path, shards: list[list[Record]]) -> Path:
    """A complete dataset directory, written without the refinement side."""
    directory.mkdir(parents=True)
    counts: Counter = Counter()
    written = []
    for i, records in enumerate(shards):
        path = directory / record.shard_name("rendered", "train", i, len(shards))
        writer = ArrayRecordWriter(str(path), record.WRITER_OPTIONS)
        for r in records:
            writer.write(record.encode(r))
            counts.update({tags.normalise(t) for t in r.tags})
        writer.close()
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        written.append(record.Shard(path.name, len(records), len(data), digest))
    tags.write_counts(directory, counts, sum(len(s) for s in shards))
    record.write_metadata(directory, "rendered", "train", written, {"engine": "test"})
    return directory


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 records in two uneven shards. Shared: tests that damage it copy it first."""
    records = [make_record(i) for i in range(60)]
    return write_dataset(tmp_path_factory.mktemp("data") / "rendered", [records[:25], records[25:]])


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[[list[Record]], Path]:
    """Writes a one-shard data set of given records."""
    return lambda records: write_dataset(tmp_path / "dataset", [records])
