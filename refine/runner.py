"""A whole run: inputs checked, parts made in parallel, a data set at the end.

    OUTPUT/.parts/run.json   what was asked for: a rerun must ask for the same
    OUTPUT/.parts/NNNNNN/    one finished part per input tar
    OUTPUT/.index/           the annotation index, unless --index puts it elsewhere

Both directories are removed when the data set is complete, which is when `manifest.json` is there.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from hqclip_jax.data.record import MANIFEST_FILE, write_metadata
from hqclip_jax.data.tags import write_counts
from refine.engines import Engine
from refine.errors import RefineError
from refine.finish import collect_seen, find_losers, gather, write_shards
from refine.ledger import SKIPPED_FILE, Ledger
from refine.parallel import ordered_map
from refine.parts import Job, make_part
from refine.progress import console, progress
from refine.sink import Part, part_directory
from refine.storage import locked, write_json
from refine.tars import fingerprint, short_names
from refine.uids import Subset

PARTS, RUN_FILE, INDEX = ".parts", "run.json", ".index"
COUNTS = {
    "pairs": "pairs read",
    "joined": "records written",
    "duplicate_uid": "duplicate uid",
    "not_in_subset": "not in the uid subset",
    "missing_annotation": "missing annotation",
    "malformed_annotation": "malformed annotation",
    "no_caption": "no caption",
    "missing_image": "missing image (pair without an image file)",
    "corrupt_image": "corrupt image",
    "image_too_large": "image too large",
    "malformed_json": "malformed JSON",
    "no_uid": "no uid",
    "broken_tar": "broken or truncated tar",
    "annotations": "annotations (different uids)",
    "annotation_without_pair": "missing image (annotation whose pair never came)",
    "duplicate_annotation": "duplicate annotation",
    "annotation_without_uid": "annotation file without a uid for a name",
    "broken_annotation_tar": "broken or truncated annotation tar",
    "uids_without_pair": "uid of the subset whose pair never came",
}
ALWAYS = ("pairs", "joined", "duplicate_uid", "missing_image", "corrupt_image")
ALWAYS_JOINED = ("missing_annotation", "malformed_annotation", "annotation_without_pair")


@dataclass(frozen=True)
class Run:
    """What to refine, and where to.

    Attributes:
        inputs: tars of pairs.
        output: the data set's directory.
        engine: how.
        uids: an .npy of the uids to keep, or None for all.
        name: of the data set, in its shards' file names.
        split: such as "train".
        shard_mb: shards hold about so many megabytes (10^6 bytes).
        limit: reads this many pairs, or all if None.
        max_pixels: larger images are skipped.
        workers: processes.
    """

    inputs: tuple[Path, ...]
    output: Path
    engine: Engine
    uids: Path | None = None
    name: str = "refined"
    split: str = "train"
    shard_mb: float = 512.0
    limit: int | None = None
    max_pixels: int = 89_478_485
    workers: int = 1

    @property
    def parts(self) -> Path:
        return self.output / PARTS

    def plan(self, times: bool = False) -> dict:
        """What the result depends on; with `times`, the modification times of all inputs too."""
        return {
            "refiner": self.engine.refiner,
            "input": fingerprint(self.inputs, times),
            **self.engine.plan(times),
            "uids": self.uids and fingerprint([self.uids], times),
            "name": self.name,
            "split": self.split,
            "shard_mb": self.shard_mb,
            "limit": self.limit,
            "max_pixels": self.max_pixels,
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


def show(counts: dict[str, int]) -> None:
    """Prints the counts, zeros left out where they are expected."""
    table = Table("", "count", box=None)
    table.columns[1].justify = "right"
    shown = ALWAYS + (ALWAYS_JOINED if counts["annotations"] else ())
    for key, count in counts.items():
        if count or key in shown:
            table.add_row(COUNTS.get(key, key), f"{count:,}")
    console.print(table)


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


def _compare(output: Path, there: dict, now: dict) -> None:
    differing = [key for key in there | now if there.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise RefineError(
            f"{output} was begun with other arguments ({', '.join(differing)}; {key} was "
            f"{there.get(key)}, now {now.get(key)}): choose another --output, or delete it first"
        )


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
        _compare(asked.output, json.loads(path.read_text()), json.loads(json.dumps(plan)))
    for left in asked.parts.glob("*.tmp-*"):
        shutil.rmtree(left)
    write_json(path, plan)


def _make_parts(asked: Run) -> int:
    """Makes the parts that are missing; returns the pairs read now."""
    job = Job(
        tars=asked.inputs,
        names=tuple(short_names(asked.inputs)),
        parts=asked.parts,
        engine=asked.engine,
        uids=asked.uids,
        max_pixels=asked.max_pixels,
        shard_bytes=int(asked.shard_mb * 1e6),
    )
    if asked.limit is not None:
        return _make_limited(job, asked.limit)
    missing = [n for n in range(len(job.tars)) if not part_directory(job.parts, n).exists()]
    if len(missing) < len(job.tars):
        console.print(f"going on: {len(job.tars) - len(missing):,} tars are finished")
    read, started = 0, time.monotonic()
    with progress("refining", len(missing), "tars") as bar:
        for pairs in ordered_map(make_part, missing, asked.workers, job.open):
            read += pairs
            bar.advance(1, f"{read / (time.monotonic() - started):,.0f} pairs/s")
    return read


def _make_limited(job: Job, limit: int) -> int:
    """Makes parts one after another, because where the limit falls follows from those before."""
    maker, read = job.open(), 0
    for number in range(len(job.tars)):
        directory = part_directory(job.parts, number)
        if directory.exists():
            limit -= Part.load(directory).counts["pairs"]
        elif limit > 0:
            pairs = maker.make(number, limit)
            limit -= pairs
            read += pairs
    return read


def _finish(asked: Run, subset: Subset | None, listed: int) -> dict[str, int]:
    """Makes the data set from the parts; `listed` is how many different uids were asked for."""
    scratch = asked.parts / "finish"
    shutil.rmtree(scratch, ignore_errors=True)
    directories = (part_directory(asked.parts, n) for n in range(len(asked.inputs)))
    parts = [directory for directory in directories if directory.exists()]
    seen = collect_seen(parts, scratch / "seen", asked.engine.buckets, asked.workers)
    losers = find_losers(seen)
    whole = asked.limit is None
    with Ledger(scratch / SKIPPED_FILE) as ledger:
        found, tags = gather(parts, short_names(asked.inputs), losers, ledger)
        asked.engine.settle(ledger, seen, subset, whole)
        if subset and whole:
            ledger.add("uids_without_pair", listed - losers.distinct)
    (scratch / SKIPPED_FILE).replace(asked.output / SKIPPED_FILE)
    counts = {key: ledger.counts[key] for key in [*COUNTS, *sorted(ledger.counts.keys() - COUNTS)]}
    if not counts["joined"]:
        show(counts)
        raise RefineError(
            f"no pair became a record: {asked.output / SKIPPED_FILE} says why; delete "
            f"{asked.output} before the next run"
        )
    shards = write_shards(
        found,
        asked.output,
        scratch,
        asked.name,
        asked.split,
        int(asked.shard_mb * 1e6),
        asked.workers,
    )
    write_counts(asked.output, tags, counts["joined"])
    manifest = {
        "engine": asked.engine.refiner.partition(":")[0],
        "note": asked.engine.note,
        "code": _code_version(),
        "plan": asked.plan(),
        "counts": counts,
    }
    write_metadata(asked.output, asked.name, asked.split, shards, manifest)
    return counts


def _code_version() -> str:
    """A digest of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
