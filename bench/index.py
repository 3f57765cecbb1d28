"""What do open shards cost in memory and descriptors, and what does leaving the index in the file?

    python -m bench.index [--records=45667] [--size=20000]

Writes one shard of that many records of random bytes, a thirty-thousandth of 1.37 billion records,
and opens it many times over in a process of its own for either place of the index. Reads are at
random, in one thread, from the page cache. Prints, last, one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from hqclip_jax.data.record import WRITER_OPTIONS

RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"
PLACES = {
    "in_memory": RANDOM_ACCESS,
    "offloaded": f"{RANDOM_ACCESS},index_storage_option:offloaded",
}
READERS = 200
RECORDS = 1_370_000_000
SHARDS = 30_000


def write(path: Path, records: int, size: int) -> None:
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for _ in range(records):
        writer.write(os.urandom(size))
    writer.close()


def private_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.partition("Private_Dirty:")[2].split()[0]) * 1024


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def measure(path: str, options: str, records: int) -> dict[str, float]:
    """Figures of one place of the index; runs in a fresh process."""

    def reader() -> ArrayRecordReader:
        return ArrayRecordReader(path, options=options, file_reader_buffer_size=32_768)

    reader().read([0])  # the library's own threads and buffers
    bytes_before, descriptors_before = private_bytes(), descriptors()
    began = time.perf_counter()
    opened = [reader() for _ in range(READERS)]
    opening = time.perf_counter() - began
    rng = np.random.default_rng(0)
    for each in opened:
        each.read([int(rng.integers(records))])
    held = private_bytes() - bytes_before
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 5:
        opened[rng.integers(READERS)].read([int(rng.integers(records))])
        count += 1
    return {
        "bytes_per_reader": held / READERS,
        "descriptors": (descriptors() - descriptors_before) / READERS,
        "reads_per_second": count / (time.perf_counter() - began),
        "open_ms": 1e3 * opening / READERS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=45_667, help="in the shard")
    parser.add_argument("--size", type=int, default=20_000, help="bytes of a record")
    args = parser.parse_args()
    found = {}
    with (
        TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        small, large = Path(folder, "small"), Path(folder, "large")
        write(small, 100, args.size)
        write(large, args.records, args.size)
        for place, options in PLACES.items():
            found[place] = pool.apply(measure, (str(large), options, args.records))
            empty = pool.apply(measure, (str(small), options, 100))["bytes_per_reader"]
            index = max(0.0, found[place]["bytes_per_reader"] - empty)
            found[place] |= {"bytes_per_record": index / args.records, "bytes_beside": empty}
            print(place, found[place])
    memory, offloaded = found["in_memory"], found["offloaded"]
    figures = {
        "records": args.records,
        "record_bytes": args.size,
        "bytes_per_record_in_memory": memory["bytes_per_record"],
        "bytes_per_record_offloaded": offloaded["bytes_per_record"],
        "bytes_per_open_reader": memory["bytes_beside"],
        "descriptors_per_reader": memory["descriptors"],
        "reads_per_second_in_memory": memory["reads_per_second"],
        "reads_per_second_offloaded": offloaded["reads_per_second"],
        "open_ms_in_memory": memory["open_ms"],
        "open_ms_offloaded": offloaded["open_ms"],
        "projection_gib_at_1.37B": {
            place: (RECORDS * f["bytes_per_record"] + SHARDS * f["bytes_beside"]) / 2**30
            for place, f in found.items()
        },
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
