"""A whole run: inputs checked, parts made in parallel, a data set at the end.

    OUTPUT/.parts/run.json   what was asked for: a rerun must ask for the same
    OUTPUT/.parts/NNNNNN/    one finished part per input
    OUTPUT/.parts/NNNNNN.journal/   answers of a model for a part that is not finished
    OUTPUT/.index/           the annotation index, unless --index puts it elsewhere

Both directories are removed when the data set is complete, which is when `manifest.json` is there.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hqclip_jax.data.record import MANIFEST_FILE, write_metadata
from hqclip_jax.data.tags import write_counts
from refine.engines import Engine
from refine.errors import RefineError
from refine.finish import collect_seen, find_losers, gather, write_shards
from refine.inputs.find import Input, fingerprint
from refine.inputs.tars import fingerprint as file_fingerprint
from refine.ledger import SKIPPED_FILE, Ledger
from refine.manifest import code_version, engine_stats, ordered, show
from refine.parallel import ordered_map
from refine.parts import FETCHED, Job, make_part
from refine.progress import console, progress
from refine.sink import QUARANTINE_FILE, SEEN_FILE, Part, part_directory
from refine.storage import locked, write_json
from refine.uids import Subset

PARTS, RUN_FILE, INDEX = ".parts", "run.json", ".index"
MODEL_PLAN = {"refiner", "model", "prompt", "sampling", "max_pixels"}
"""What of a plan may change on a half-finished output, where the user says so."""


class Makers(Protocol):
    """Who makes parts."""

    def make_parts(self, job: Job, missing: Sequence[int]) -> int:
        """Makes the parts that are missing; returns the pairs read now."""


@dataclass(frozen=True)
class Here:
    """Processes of this machine, each a part at a time."""

    workers: int

    def make_parts(self, job: Job, missing: Sequence[int]) -> int:
        read, started = 0, time.monotonic()
        with progress("refining", len(missing), "inputs") as bar:
            for pairs in ordered_map(make_part, missing, self.workers, job.open):
                read += pairs
                bar.advance(1, f"{read / (time.monotonic() - started):,.0f} pairs/s")
        return read


@dataclass(frozen=True)
class Run:
    """What to refine, and where to.

    Attributes:
        inputs: of pairs.
        output: the data set's directory.
        engine: how.
        uids: an .npy of the uids to keep, or None for all.
        name: of the data set, in its shards' file names.
        split: such as "train".
        shard_mb: shards hold about so many megabytes (10^6 bytes).
        limit: reads this many pairs, or all if None.
        skip_pixels: larger images are skipped.
        workers: processes that read, sort and write.
        makers: who makes the parts.
        share: of the inputs, such as "3/16": said in the plan, where the inputs are those of it.
        allow_change: goes on with another model, prompt or sampling than the run began with.
    """

    inputs: tuple[Input, ...]
    output: Path
    engine: Engine
    uids: Path | None = None
    name: str = "refined"
    split: str = "train"
    shard_mb: float = 512.0
    limit: int | None = None
    skip_pixels: int = 89_478_485
    workers: int = 1
    makers: Makers = field(default_factory=lambda: Here(1))
    share: str = ""
    allow_change: bool = False

    @property
    def parts(self) -> Path:
        return self.output / PARTS

    def plan(self, times: bool = False) -> dict:
        """What the result depends on; with `times`, the modification times of all inputs too."""
        return {
            "refiner": self.engine.refiner,
            "input": fingerprint(self.inputs, times),
            **self.engine.plan(times),
            "uids": self.uids and file_fingerprint([self.uids], times),
            "name": self.name,
            "split": self.split,
            "shard_mb": self.shard_mb,
            "limit": self.limit,
            "skip_pixels": self.skip_pixels,
            "share": self.share,
        }


def run(asked: Run) -> dict[str, int]:
    """Refines, or goes on where a killed run stopped, and returns the counts.

    A complete output is left as it is. Nothing in the result depends on the number of workers or
    on where a run was interrupted.

    Raises:
        RefineError: the output holds something else or is being written, or no record came.
    """
    started = time.monotonic()
    done = _completed(asked)
    if done is not None:
        shutil.rmtree(asked.parts, ignore_errors=True)
        shutil.rmtree(asked.output / INDEX, ignore_errors=True)
        console.print(f"{asked.output} is complete already: nothing to do", soft_wrap=True)
        show(done)
        return done
    subset = asked.uids and Subset(asked.uids)
    listed = subset.check_sorted() if subset else 0
    _claim(asked)
    with locked(asked.parts / "lock", wait=False):
        _resume(asked)
        asked.engine.prepare(asked.workers)
        read = _make_parts(asked)
        counts = _finish(asked, subset, listed)
    shutil.rmtree(asked.parts)
    shutil.rmtree(asked.output / INDEX, ignore_errors=True)
    seconds = time.monotonic() - started
    show(counts)
    console.print(
        f"{asked.output}: {counts['joined']:,} records; {read:,} pairs read in {seconds:,.1f} s "
        f"({read / seconds:,.0f}/s)",
        soft_wrap=True,
    )
    return counts


def _completed(asked: Run) -> dict[str, int] | None:
    path = asked.output / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        plan, counts = stored["plan"], stored["counts"]
    except (ValueError, KeyError) as e:
        raise RefineError(f"{path} is not of `refine run`: choose another --output") from e
    _compare(asked.output, plan, asked.plan())
    return counts


def _compare(output: Path, there: dict, now: dict, allow_change: bool = False) -> bool:
    """Whether two plans are the same but for the model's part, where that may change.

    Raises:
        RefineError: they differ.
    """
    differing = [key for key in there | now if there.get(key) != now.get(key)]
    of_model = set(differing) <= MODEL_PLAN
    if differing and not (of_model and allow_change):
        key = differing[0]
        mend = ", or go on with --allow-change" if of_model else ""
        raise RefineError(
            f"{output} was begun with other arguments ({', '.join(differing)}; {key} was "
            f"{there.get(key)}, now {now.get(key)}): choose another --output, or delete it first"
            f"{mend}"
        )
    return not differing


def _claim(asked: Run) -> None:
    output = asked.output
    try:
        if output.exists() and not asked.parts.exists():
            foreign = sorted(p.name for p in output.iterdir())
            if foreign:
                raise RefineError(
                    f"--output {output} holds other files ({foreign[0]}): choose another --output"
                )
        asked.parts.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RefineError(f"--output {output} can't be written: {e.strerror}") from e


def _resume(asked: Run) -> None:
    """Compares with what was begun here, and clears what a killed run left unfinished."""
    path = asked.parts / RUN_FILE
    plan = asked.plan(times=True)
    if path.exists():
        begun = json.loads(path.read_text())
        if not _compare(asked.output, begun, json.loads(json.dumps(plan)), asked.allow_change):
            console.print(f"going on as {plan['refiner']}; it was {begun['refiner']}")
    for left in asked.parts.glob("*.tmp-*"):
        shutil.rmtree(left)
    write_json(path, plan)


def _make_parts(asked: Run) -> int:
    """Makes the parts that are missing; returns the pairs read now."""
    limits = _limits(asked)
    job = Job(
        inputs=asked.inputs,
        limits=limits,
        parts=asked.parts,
        engine=asked.engine,
        uids=asked.uids,
        skip_pixels=asked.skip_pixels,
        shard_bytes=int(asked.shard_mb * 1e6),
    )
    numbers = [n for n in range(len(job.inputs)) if limits.get(n) != 0]
    missing = [n for n in numbers if not part_directory(job.parts, n).exists()]
    if len(missing) < len(numbers):
        console.print(f"going on: {len(numbers) - len(missing):,} inputs are finished")
    read = asked.makers.make_parts(job, missing)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return read


def _limits(asked: Run) -> dict[int, int]:
    """How many pairs each input gives, where the whole is limited; 0 behind the limit."""
    if asked.limit is None:
        return {}
    left, limits = asked.limit, {}
    for number, each in enumerate(asked.inputs):
        limits[number] = each.local(asked.parts / FETCHED).count(left) if left else 0
        left -= limits[number]
    return limits


def _finish(asked: Run, subset: Subset | None, listed: int) -> dict[str, int]:
    """Makes the data set from the parts; `listed` is how many different uids were asked for."""
    scratch = asked.parts / "finish"
    shutil.rmtree(scratch, ignore_errors=True)
    directories = (part_directory(asked.parts, n) for n in range(len(asked.inputs)))
    parts = [directory for directory in directories if directory.exists()]
    files = [part / SEEN_FILE for part in parts]
    seen = collect_seen(files, scratch / "seen", asked.engine.buckets, asked.workers)
    losers = find_losers(seen)
    whole = asked.limit is None
    with Ledger(scratch / SKIPPED_FILE) as ledger:
        names = [each.name for each in asked.inputs]
        loaded = map(Part.load, parts)
        found = gather(loaded, names, losers, ledger, scratch / QUARANTINE_FILE)
        asked.engine.settle(ledger, seen, subset, whole)
        if subset and whole:
            ledger.add("uids_without_pair", listed - losers.distinct)
    for file in (SKIPPED_FILE, QUARANTINE_FILE):
        if (scratch / file).exists():
            (scratch / file).replace(asked.output / file)
    counts = ordered(ledger.counts)
    if not counts["joined"]:
        show(counts)
        raise RefineError(
            f"no pair became a record: {asked.output / SKIPPED_FILE} says why; delete "
            f"{asked.output} before the next run"
        )
    shards = write_shards(
        found.pieces,
        asked.output,
        scratch,
        asked.name,
        asked.split,
        int(asked.shard_mb * 1e6),
        asked.workers,
    )
    write_counts(asked.output, found.tags, counts["joined"])
    manifest = {
        "engine": asked.engine.refiner.partition(":")[0],
        "note": asked.engine.note,
        "code": code_version(),
        "plan": asked.plan(),
        "counts": counts,
    }
    if found.sums:
        manifest["engine_stats"] = engine_stats(found.sums)
    write_metadata(asked.output, asked.name, asked.split, shards, manifest)
    return counts
