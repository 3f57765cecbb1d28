"""Where each uid's annotation lies: an index of annotation tars, on disk.

147 million or 1.37 billion annotations lie in an order of their own, so each uid is looked up: one
pass over the tars' headers writes 32 bytes per annotation, sorted into memory-mapped buckets, and
a lookup is one binary search and one read at an offset.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refine.errors import RefineError
from refine.inputs.pairs import Skip, read_skips
from refine.inputs.tars import BrokenTar, fingerprint, members, open_tar, short_names
from refine.ledger import SKIPPED_FILE, Ledger
from refine.parallel import ordered_map
from refine.progress import progress
from refine.storage import locked, write_json
from refine.uids import PACK, UidTable, read_entries, repeats, to_hex

VERSION = 1
INDEX_FILE = "index.json"  # written last: an index without it is not one
TABLE, SCANS = "table", "scans"
OURS = {INDEX_FILE, TABLE, SCANS, SKIPPED_FILE, "lock"}
REASONS = ("duplicate_annotation", "annotation_without_uid", "broken_annotation_tar")
MEMBER = re.compile(r"(?:.*/)?([0-9a-fA-F]{32})\.json", re.DOTALL)
FLUSH_BYTES = 1 << 20


@dataclass(frozen=True)
class AnnotationIndex:
    """A finished index.

    Attributes:
        directory: where it lies.
        tars: the annotation tars, in the order that numbers them.
        table: uid → (number of the tar, length, offset).
        counts: "annotations" (different uids), "duplicate_annotation",
            "annotation_without_uid", "broken_annotation_tar".
    """

    directory: Path
    tars: tuple[Path, ...]
    table: UidTable
    counts: dict[str, int]

    @classmethod
    def open(cls, directory: Path, tars: Sequence[Path]) -> "AnnotationIndex":
        """The finished index in a directory, which `build` has found to be of these tars."""
        stored = json.loads((directory / INDEX_FILE).read_text())
        table = UidTable(directory / TABLE, stored["buckets"])
        return cls(directory, tuple(tars), table, stored["counts"])

    @classmethod
    def build(cls, directory: Path, tars: Sequence[Path], workers: int) -> "AnnotationIndex":
        """Opens the index, after building it unless one of the same tars (names, sizes and
        modification times) is there; two runs may ask for the same one.

        Memory does not grow with the annotations; the disk holds 64 bytes of each while the index
        is built, and 32 after.

        Raises:
            RefineError: the directory holds something else, a tar is compressed, or no tar holds an
                annotation.
        """
        directory.mkdir(parents=True, exist_ok=True)
        foreign = {p.name for p in directory.iterdir()} - OURS
        if foreign:
            raise RefineError(
                f"--index {directory} holds other files ({min(foreign)}): choose an empty directory"
            )
        with locked(directory / "lock", wait=True):
            if not _fits(directory, tars):
                (directory / INDEX_FILE).unlink(missing_ok=True)
                shutil.rmtree(directory / TABLE, ignore_errors=True)
                shutil.rmtree(directory / SCANS, ignore_errors=True)
                _build(directory, tars, workers)
        return cls.open(directory, tars)

    def read(self, uid: str) -> bytes | None:
        """The JSON of the first annotation given for a uid, as stored, or None."""
        entry = self.table.find(uid)
        if entry is None:
            return None
        with open(self.tars[entry["file"]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(entry["length"]), int(entry["offset"]))

    def skips(self) -> Iterator[Skip]:
        """What in the tars was no annotation."""
        return read_skips(self.directory / SKIPPED_FILE)


def _fits(directory: Path, tars: Sequence[Path]) -> bool:
    """Whether a finished index is of these tars: their names, sizes and modification times."""
    try:
        stored = json.loads((directory / INDEX_FILE).read_text())
    except (OSError, ValueError):
        return False
    return (stored["version"], stored["tars"]) == (VERSION, fingerprint(tars, times=True))


def _build(directory: Path, tars: Sequence[Path], workers: int) -> None:
    scans = directory / SCANS
    scans.mkdir()
    stored = {"version": VERSION, "tars": fingerprint(tars, times=True)}
    jobs = [(n, path, name, scans) for n, (path, name) in enumerate(zip(tars, short_names(tars)))]
    total = 0
    with Ledger(directory / SKIPPED_FILE) as ledger:
        with progress("indexing annotations", len(jobs), "tars") as bar:
            for number, rows in enumerate(ordered_map(_scan, jobs, workers)):
                names = scans / f"{number}.jsonl"
                for skip in read_skips(names):
                    ledger.skip(skip)
                names.unlink()
                total += rows
                bar.advance(1)
        if not total:
            raise RefineError(
                "the --annotations tars hold no annotation: expected NNNNNN/<32 hex digits>.json"
            )
        paths = [scans / f"{number}.bin" for number in range(len(jobs))]
        table = UidTable.build(directory / TABLE, _drain(paths), total, workers)
        for number in range(table.buckets):
            uids = table.bucket(number)["uid"]
            double = uids[repeats(uids)]
            names = (Skip("duplicate_annotation", uid=to_hex(uid)) for uid in double)
            ledger.add("duplicate_annotation", len(double), names)
    counts = dict.fromkeys(REASONS, 0) | ledger.counts
    counts = {"annotations": total - counts["duplicate_annotation"], **counts}
    shutil.rmtree(scans)
    write_json(directory / INDEX_FILE, stored | {"buckets": table.buckets, "counts": counts})


def _scan(_: None, job: tuple[int, Path, str, Path]) -> int:
    """Writes the entries of one tar to N.bin and what is no annotation to N.jsonl; returns the
    number of entries."""
    number, path, name, scans = job
    entries, rows = bytearray(), 0
    with (
        open_tar(path) as tar,
        open(scans / f"{number}.bin", "wb") as out,
        Ledger(scans / f"{number}.jsonl") as ledger,
    ):
        try:
            for member in members(tar):
                match = MEMBER.fullmatch(member.name)
                if not match or member.size >= 1 << 32:
                    ledger.skip(Skip("annotation_without_uid", name, member.name[:200]))
                    continue
                uid = bytes.fromhex(match[1])
                entries += PACK.pack(uid, number, member.size, member.offset)
                rows += 1
                if len(entries) >= FLUSH_BYTES:
                    out.write(entries)
                    entries.clear()
        except BrokenTar as e:
            ledger.skip(Skip("broken_annotation_tar", name, detail=str(e)))
        out.write(entries)
    return rows


def _drain(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        yield from read_entries(path)
        path.unlink()
