"""The records of an output that pass rules on their scores, written as a data set of their own.

    NEW/.parts/run.json   what was asked for: a rerun must ask for the same
    NEW/.parts/NNNNNN/    what passed of one shard

A shard at a time is in memory. `.parts` goes when the data set is complete, which is when its
`manifest.json` is there; until then the same command goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from hqclip_jax.data.record import MANIFEST_FILE, Record, write_metadata
from hqclip_jax.data.tags import write_counts
from refine.errors import RefineError
from refine.finish import Losers, gather, write_shards
from refine.inputs.pairs import Skip
from refine.judging.outputs import Output
from refine.judging.scores import About, Scores
from refine.judging.scoring import CLIP
from refine.judging.verdicts import KEPT, REASONS, Rules, least_of_top
from refine.ledger import SKIPPED_FILE, Ledger
from refine.manifest import code_version
from refine.parallel import ordered_map
from refine.progress import console, progress
from refine.sink import QUARANTINE_FILE, Part, PartWriter, part_directory
from refine.storage import locked, write_json

PARTS, RUN_FILE = ".parts", "run.json"
NO_LOSERS = Losers(*(np.empty(0, kind) for kind in ("i8", "i8", "S16", "i8")), distinct=0)


@dataclass(frozen=True)
class Sieve:
    """What to keep of what, and where.

    Attributes:
        source: the output.
        target: the new data set's directory.
        rules: what stays.
        scorers: whose scores, by "clip" and "judge"; every record of the source has them.
        shard_mb: shards hold about so many megabytes (10^6 bytes).
        workers: processes.
        top: the least CLIP score that `rules.keep_top` keeps.
    """

    source: Output
    target: Path
    rules: Rules
    scorers: dict[str, About]
    shard_mb: float = 512.0
    workers: int = 1
    top: float = -np.inf

    @property
    def parts(self) -> Path:
        return self.target / PARTS

    def plan(self) -> dict:
        """What the result depends on."""
        hashes = "".join(shard.sha256 for shard in self.source.source.shards)
        return {
            "refiner": self.source.refiner,
            "source": {
                "records": len(self.source),
                "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            },
            "rules": asdict(self.rules),
            "scorers": {kind: about.name for kind, about in self.scorers.items()},
            "name": self.source.manifest["name"],
            "split": self.source.manifest["split"],
            "shard_mb": self.shard_mb,
        }

    def open(self) -> "PartSifter":
        scores = {kind: Scores(self.source, about) for kind, about in self.scorers.items()}
        return PartSifter(self, scores)


@dataclass(frozen=True)
class PartSifter:
    """A sieve with its scores opened, for the life of a process."""

    sieve: Sieve
    scores: dict[str, Scores]

    def make(self, number: int) -> None:
        """Writes what passes of a shard as a part."""
        sieve, source = self.sieve, self.sieve.source.source
        rows = {kind: scores.shard(number) for kind, scores in self.scores.items()}
        verdicts = zip(*sieve.rules.verdicts(rows, sieve.top))
        first = source.ends[number] - source.shards[number].records
        with PartWriter(sieve.parts, number, int(sieve.shard_mb * 1e6)) as part:
            for at, (why, weak_desc, weak_tags) in enumerate(verdicts):
                record = sieve.source.record(first + at)
                if why:
                    part.skip(Skip(why, record.source, uid=record.uid, detail=self._said(rows, at)))
                else:
                    part.add(_weakened(record, part.ledger, weak_desc, weak_tags))
            part.seal(source.shards[number].records)

    def _said(self, rows: Mapping[str, np.ndarray], at: int) -> str:
        said = (
            f"{kind} {row['desc'][at]:.2f}, {row['neg_desc'][at]:.2f}" for kind, row in rows.items()
        )
        return "; ".join(said)


def _weakened(record: Record, ledger: Ledger, weak_desc: bool, weak_tags: bool) -> Record:
    """The record without the negatives that fail."""
    if weak_desc:
        ledger.add("negatives_dropped", 1)
        record = replace(record, neg_desc=())
    if weak_tags:
        ledger.add("negative_tags_dropped", 1)
        record = replace(record, neg_tags=())
    return record


def make_part(sifter: PartSifter, number: int) -> None:
    """`PartSifter.make` for `ordered_map`."""
    sifter.make(number)


def sift(sieve: Sieve) -> dict[str, int]:
    """Makes the new data set, or goes on where a killed run stopped, and returns the counts.

    Raises:
        RefineError: the target holds something else or is being written, or no record passes.
    """
    manifest = sieve.target / MANIFEST_FILE
    if manifest.exists():
        stored = json.loads(manifest.read_text())
        _compare(sieve, stored.get("plan", {}))
        shutil.rmtree(sieve.parts, ignore_errors=True)
        console.print(f"{sieve.target} is complete already: nothing to do", soft_wrap=True)
        _show(stored["counts"])
        return stored["counts"]
    _claim(sieve)
    with locked(sieve.parts / "lock", wait=False):
        _resume(sieve)
        if sieve.rules.keep_top is not None:
            scores = Scores(sieve.source, sieve.scorers[CLIP])
            shards = range(len(sieve.source.source.shards))
            chunks = lambda: (scores.shard(index)["desc"] for index in shards)
            sieve = replace(sieve, top=least_of_top(chunks, sieve.rules.keep_top))
        _make_parts(sieve)
        counts = _finish(sieve)
    shutil.rmtree(sieve.parts)
    _show(counts)
    return counts


def _claim(sieve: Sieve) -> None:
    if sieve.target.exists() and not sieve.parts.exists():
        foreign = sorted(path.name for path in sieve.target.iterdir())
        if foreign:
            raise RefineError(
                f"--output {sieve.target} holds other files ({foreign[0]}): choose another"
            )
    sieve.parts.mkdir(parents=True, exist_ok=True)


def _resume(sieve: Sieve) -> None:
    """Compares with what was begun here, and clears what a killed run left unfinished."""
    path = sieve.parts / RUN_FILE
    if path.exists():
        _compare(sieve, json.loads(path.read_text()))
    for left in sieve.parts.glob("*.tmp-*"):
        shutil.rmtree(left)
    write_json(path, sieve.plan())


def _compare(sieve: Sieve, there: dict) -> None:
    now = json.loads(json.dumps(sieve.plan()))
    differing = [key for key in there | now if there.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise RefineError(
            f"{sieve.target} was begun with other arguments ({', '.join(differing)}; {key} was "
            f"{there.get(key)}, now {now.get(key)}): choose another --output, or delete it first"
        )


def _make_parts(sieve: Sieve) -> None:
    shards = range(len(sieve.source.source.shards))
    missing = [n for n in shards if not part_directory(sieve.parts, n).exists()]
    with progress("filtering", len(missing), "shards") as bar:
        for _ in ordered_map(make_part, missing, sieve.workers, sieve.open):
            bar.advance(1)


def _finish(sieve: Sieve) -> dict[str, int]:
    """Makes the data set from the parts."""
    scratch = sieve.parts / "finish"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    plan, source = sieve.plan(), sieve.source
    files = [shard.file for shard in source.source.shards]
    parts = (Part.load(part_directory(sieve.parts, n)) for n in range(len(files)))
    with Ledger(scratch / SKIPPED_FILE) as ledger:
        found = gather(parts, files, NO_LOSERS, ledger, scratch / QUARANTINE_FILE)
    counts = {reason: ledger.counts[reason] for reason in REASONS}
    if not counts[KEPT]:
        _show(counts)
        raise RefineError(
            f"no record passes: loosen the rules, and delete {sieve.target} before the next run"
        )
    (scratch / SKIPPED_FILE).replace(sieve.target / SKIPPED_FILE)
    size = int(sieve.shard_mb * 1e6)
    name, split = plan["name"], plan["split"]
    shards = write_shards(found.pieces, sieve.target, scratch, name, split, size, sieve.workers)
    write_counts(sieve.target, found.tags, counts[KEPT])
    manifest = {
        "engine": source.engine,
        "note": source.manifest.get("note", ""),
        "code": code_version(),
        "plan": plan,
        "filtered": {
            "directory": str(source.directory),
            "least_of_top": None if np.isinf(sieve.top) else sieve.top,
        },
        "counts": counts,
    }
    if "engine_stats" in source.manifest:
        manifest["engine_stats"] = source.manifest["engine_stats"]
    write_metadata(sieve.target, name, split, shards, manifest)
    return counts


def _show(counts: Mapping[str, int]) -> None:
    table = Table("", "count", box=None)
    table.columns[1].justify = "right"
    for reason, words in REASONS.items():
        if counts.get(reason) or reason in ("pairs", KEPT):
            table.add_row(words, f"{counts.get(reason, 0):,}")
    console.print(table)
