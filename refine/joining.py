"""Shares of one run, made apart, as one data set.

Every shard is read once more and compared with its hash, uids that two shares have are counted and
dropped, and the shards get one more name: no bytes are copied where the file system knows links and
no record has to go. The shares stay as they are.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from hqclip_jax.data.record import MANIFEST_FILE, RecordError, Shard, decode, write_metadata
from hqclip_jax.data.tags import COUNTS_FILE, write_counts
from refine.errors import RefineError
from refine.finish import collect_seen, find_losers, gather, write_shards
from refine.ledger import SKIPPED_FILE, Ledger
from refine.manifest import code_version, engine_stats, ordered, summed
from refine.parallel import ordered_map
from refine.progress import progress
from refine.sink import QUARANTINE_FILE, Part
from refine.storage import sha256
from refine.uids import PACK

SCRATCH = ".merge"
READ_RECORDS = 64
OF_A_SHARE = {"input", "share", "limit"}
"""What of a plan differs between shares of one run."""


@dataclass(frozen=True)
class Share:
    """A finished output.

    Attributes:
        directory: where it lies.
        manifest: what it says of itself.
    """

    directory: Path
    manifest: dict

    @classmethod
    def load(cls, directory: Path) -> "Share":
        path = directory / MANIFEST_FILE
        try:
            manifest = json.loads(path.read_text())
            _ = manifest["plan"], manifest["counts"], manifest["shards"]
        except FileNotFoundError as e:
            raise RefineError(
                f"{directory} is not complete: it has no {MANIFEST_FILE}; run its `refine run` "
                "command to the end first"
            ) from e
        except (OSError, ValueError, KeyError) as e:
            raise RefineError(f"{path} is not of `refine run`: {e}") from e
        return cls(directory, manifest)

    @property
    def shards(self) -> list[Shard]:
        return [Shard(**stored) for stored in self.manifest["shards"]]

    def part(self) -> Part:
        """The share as a part of the whole."""
        counts = {key: count for key, count in self.manifest["counts"].items() if count}
        tags = json.loads((self.directory / COUNTS_FILE).read_text())["counts"]
        stats = self.manifest.get("engine_stats", {})
        return Part(self.directory, tuple(self.shards), counts, tuple(counts), tags, summed(stats))


def place(share: Share) -> tuple:
    """Shares in the order of their numbers, others as given."""
    number, _, total = share.manifest["plan"].get("share", "").partition("/")
    return (int(total), int(number)) if total else (0, 0)


def check(shares: Sequence[Share], partial: bool, mixed: bool) -> None:
    """Compares how the shares were made.

    Raises:
        RefineError: they differ and `mixed` is False, or some are missing and `partial` is False.
    """
    first = shares[0]
    for share in shares[1:]:
        one, other = first.manifest["plan"], share.manifest["plan"]
        differing = sorted(k for k in one | other if one.get(k) != other.get(k))
        differing = [key for key in differing if key not in OF_A_SHARE]
        if differing and not mixed:
            key = differing[0]
            raise RefineError(
                f"{share.directory} was made with other arguments than {first.directory} "
                f"({', '.join(differing)}; {key}: {other.get(key)} and {one.get(key)}): merge "
                "what belongs together, or say --mixed"
            )
    named = [share.manifest["plan"].get("share", "") for share in shares]
    if any(named) and not partial:
        total = int(next(filter(None, named)).partition("/")[2])
        missing = [i for i in range(total) if f"{i}/{total}" not in named]
        if missing:
            raise RefineError(
                f"{len(missing)} of {total} shares are missing ({', '.join(map(str, missing[:9]))}"
                f"{', …' if len(missing) > 9 else ''}): name their outputs too, or say --partial"
            )


def merge(shares: Sequence[Share], output: Path, shard_bytes: int, workers: int) -> dict[str, int]:
    """Makes the data set and returns its counts.

    Raises:
        RefineError: a shard is not what its manifest says.
    """
    scratch = output / SCRATCH / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    seen = _verify(shares, scratch, workers)
    losers = find_losers(collect_seen(seen, scratch / "seen", 1, workers))
    names = [str(share.directory) for share in shares]
    parts = (share.part() for share in shares)
    with Ledger(scratch / SKIPPED_FILE) as ledger:
        found = gather(parts, names, losers, ledger, scratch / QUARANTINE_FILE, keep=True)
    for file in (SKIPPED_FILE, QUARANTINE_FILE):
        if (scratch / file).exists():
            (scratch / file).replace(output / file)
    plan = shares[0].manifest["plan"]
    name, split = plan["name"], plan["split"]
    shards = write_shards(found.pieces, output, scratch, name, split, shard_bytes, workers)
    counts = ordered(ledger.counts)
    write_counts(output, found.tags, counts["joined"])
    manifest = {
        "engine": shares[0].manifest["engine"],
        "note": shares[0].manifest["note"],
        "code": code_version(),
        "plan": {key: value for key, value in plan.items() if key not in OF_A_SHARE},
        "merged": [
            {"output": share.directory.name, "plan": share.manifest["plan"]} for share in shares
        ],
        "counts": counts,
    }
    if found.sums:
        manifest["engine_stats"] = engine_stats(found.sums)
    write_metadata(output, name, split, shards, manifest)
    return counts


def _verify(shares: Sequence[Share], scratch: Path, workers: int) -> list[Path]:
    """Reads every shard; returns files of the uids in them, one for each shard."""
    jobs, first = [], 0
    for number, share in enumerate(shares):
        first = 0
        for shard in share.shards:
            path = scratch / f"{number:06d}-{len(jobs):06d}.seen"
            jobs.append((share.directory, shard, number, first, path))
            first += shard.records
    with progress("verifying", len(jobs), "shards") as bar:
        for _ in ordered_map(_read_uids, jobs, workers):
            bar.advance(1)
    return [path for *_, path in jobs]


def _read_uids(_: None, job: tuple[Path, Shard, int, int, Path]) -> None:
    """Compares a shard with its hash and writes an entry for each of its records."""
    directory, shard, number, first, path = job
    file = directory / shard.file
    if not file.exists() or file.stat().st_size != shard.bytes or sha256(file) != shard.sha256:
        raise RefineError(
            f"{file} is not what its manifest says (missing, cut or changed): make its share again"
        )
    reader = ArrayRecordReader(str(file))
    try:
        if reader.num_records() != shard.records:
            raise RefineError(f"{file} holds {reader.num_records()} records, not {shard.records}")
        entries = bytearray()
        for start in range(0, shard.records, READ_RECORDS):
            numbers = list(range(start, min(start + READ_RECORDS, shard.records)))
            for at, entry in zip(numbers, reader.read(numbers)):
                uid = bytes.fromhex(decode(entry, ("uid", "image")).uid)
                entries += PACK.pack(uid, number, 1, first + at)
        path.write_bytes(entries)
    except (RecordError, RuntimeError) as e:
        raise RefineError(f"{file} can't be read: {e}; make its share again") from e
    finally:
        reader.close()
