"""python -m hqclip_jax.data.check: is this data set whole, and what is in it?"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from hqclip_jax.config import DataConfig
from hqclip_jax.data.check_report import Report, as_json, show
from hqclip_jax.data.folder import Folder
from hqclip_jax.data.image import ImageError, open_rgb
from hqclip_jax.data.record import DatasetError, RecordError, Shard, decode
from hqclip_jax.data.shard_cache import ShardCache
from hqclip_jax.data.shards import ShardSource, find_faults, list_shards
from hqclip_jax.data.tags import TagVocabulary
from refine.parallel import end_with_parent
from refine.progress import progress

EPILOG = """\
Every shard's size, record count and SHA-256 are compared with manifest.json, then every record is
decoded, and its picture. Without a manifest there are no sizes and hashes to compare with.

examples:
  python -m hqclip_jax.data.check data/refined
  python -m hqclip_jax.data.check gs://bucket/refined --workers 64 --sample 0.01
  python -m hqclip_jax.data.check data/refined --json | jq .defects

Exit status: 0 the data set is sound; 1 it has defects; 2 it can't be checked; 130 interrupted with
no defect so far. A run replaces damaged records and goes on, up to --config.data.max_replaced; it
does not start with a shard missing or cut short: restore that from where it was copied from, or
delete the data set and refine its source again.
"""
JOB_RECORDS = 500


@dataclass(frozen=True)
class Job:
    """One shard's hash, or a range of its records."""

    shard: int
    records: range | None = None


@dataclass(frozen=True)
class Checker:
    """Does jobs; sent once to every process."""

    source: ShardSource
    tags: frozenset[str]
    sample: float

    def __call__(self, job: Job) -> Report:
        report = Report()
        shard = self.source.shards[job.shard]
        try:
            if job.records is None:
                self._hash(shard, report)
            else:
                self._records(job, report)
        except (DatasetError, OSError) as e:
            report.defect("shard that can't be read", str(e))
        return report

    def _hash(self, shard: Shard, report: Report) -> None:
        digest = sha256()
        for chunk in self.source.folder.chunks(shard.file, shard.bytes):
            digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            name = self.source.folder.file(shard.file)
            report.defect("shard with another SHA-256 than the manifest says", name)

    def _records(self, job: Job, report: Report) -> None:
        chosen = np.random.default_rng([job.shard, job.records.start]).random(len(job.records))
        for number in np.array(job.records)[chosen < self.sample].tolist():
            report.records += 1
            kind = "damaged record"
            try:
                entry = self.source[number]
                kind = "entry that is not a record"
                found = decode(entry)
                kind = "picture that does not decode"
                size = open_rgb(found.image).size
            except (RecordError, ImageError) as e:
                file, inside = self.source.locate(number)
                reason = str(e).removeprefix(f"record {inside} of {file}: ")
                report.defect(kind, f"{file} record {inside}: {reason}")
            else:
                report.sound(found, len(entry), min(size), self.tags)


_checker: Checker


def _start(checker: Checker) -> None:
    global _checker
    end_with_parent()
    _checker = checker


def _do(job: Job) -> tuple[Job, Report]:
    return job, _checker(job)


def run_jobs(checker: Checker, jobs: Iterator[Job], workers: int) -> Iterator[tuple[Job, Report]]:
    """Does the jobs in processes, a few ahead of what was taken, in any order."""
    context = multiprocessing.get_context("spawn")  # threads of the libraries do not survive a fork
    pool = ProcessPoolExecutor(workers, context, _start, (checker,))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes inherit
    under_way: set[Future] = {pool.submit(_do, job) for job in islice(jobs, workers)}
    signal.signal(signal.SIGINT, handler)
    try:
        for job in jobs:
            under_way.add(pool.submit(_do, job))
            if len(under_way) >= 4 * workers:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as e:
        raise DatasetError(
            "a process of the check died, perhaps for want of memory: take fewer --workers"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def jobs_of(source: ShardSource, faults: dict[str, str]) -> Iterator[Job]:
    """Shard by shard; what is known to be faulty holds nothing to look at."""
    for number, shard in enumerate(source.shards):
        if shard.file in faults:
            continue
        if shard.sha256:
            yield Job(number)
        end = source.ends[number]
        for first in range(end - shard.records, end, JOB_RECORDS):
            yield Job(number, range(first, min(first + JOB_RECORDS, end)))


def check(source: ShardSource, sample: float, workers: int) -> tuple[Report, bool]:
    """The report, and whether it is complete: an interrupt ends it with what it has."""
    report = Report()
    try:
        for part in _parts(source, sample, workers):
            report.add(part)
    except KeyboardInterrupt:
        return report, False
    return report, True


def _parts(source: ShardSource, sample: float, workers: int) -> Iterator[Report]:
    faults = find_faults(source)
    for file, fault in faults.items():
        kind = "shard that is missing" if fault == "is missing" else "shard that was cut or changed"
        yield Report().defect(kind, f"{source.folder.file(file)} {fault}")
    try:
        vocabulary = TagVocabulary.from_datasets([source.folder.path], DataConfig().tag_vocabulary)
    except FileNotFoundError:
        vocabulary = TagVocabulary((), (), 0)
    checker = Checker(source, frozenset(vocabulary.tags), sample)
    reachable = sum(s.records for s in source.shards if s.file not in faults)
    defects = len(faults)
    with progress("checking", reachable, "records") as shown:
        for job, part in run_jobs(checker, jobs_of(source, faults), workers):
            yield part
            defects += part.defects.total()
            shown.advance(len(job.records or ()), f"{defects:,} defects" if defects else "")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    began = time.monotonic()
    try:
        folder = Folder(args.directory)
        cached = ShardCache(args.cache, args.cache_gb) if folder.scheme == "s3" else None
        source = ShardSource(folder, list_shards(folder), cached, patient=False)
        report, complete = check(source, args.sample, args.workers)
    except (DatasetError, OSError) as e:
        Console(stderr=True).print(f"error: {e}", style="red", markup=False, soft_wrap=True)
        return 2
    told = as_json(report, source, complete, time.monotonic() - began)
    if args.json:
        print(json.dumps(told, indent=1))
    else:
        show(told, Console(highlight=False))
    if report.defects:
        return 1
    return 0 if complete else 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = DataConfig()
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.data.check",
        description="Checks a data set that `python -m refine run` or TFDS wrote, all of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIR", help="local, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    add("--workers", type=_positive, default=os.cpu_count(), help="processes; default: one a core")
    add(
        "--sample",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="share of the records to decode, such as 0.01, the same ones every time; sizes and "
        "hashes are always checked whole; default: 1",
    )
    add("--json", action="store_true", help="print the report as one JSON object")
    add(
        "--cache",
        type=Path,
        default=default.cache,
        help="for shards from s3://; default: %(default)s",
    )
    add("--cache-gb", type=float, default=default.cache_gb, help="its size; default: %(default)g")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number above 0, up to 1")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
