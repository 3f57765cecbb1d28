"""What a check found: counted, added up, and told to people and programs."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from hqclip_jax.data.record import Record
from hqclip_jax.data.shards import ShardSource
from hqclip_jax.data.tags import normalise

EXAMPLES = 5  # named per reason
SIDES = (64, 128, 224, 448, 896)  # pixels of the shorter side that end a row of the table


@dataclass
class Report:
    """What was found; reports of parts add up.

    Attributes:
        defects: what is wrong, shards and records by reason.
        examples: for each reason the first few, by file and number.
        lacking: sound records that lack a text some loss would use.
        formats: pictures by encoding.
        sides: pictures by their shorter side.
        records: entries read, sound or not.
        bytes: of the sound entries.
    """

    defects: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lacking: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    sides: Counter = field(default_factory=Counter)
    records: int = 0
    bytes: int = 0

    def add(self, other: "Report") -> None:
        for name in ("defects", "lacking", "formats", "sides"):
            getattr(self, name).update(getattr(other, name))
        for reason, named in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += named[: EXAMPLES - len(known)]
        self.records += other.records
        self.bytes += other.bytes

    def defect(self, reason: str, example: str) -> "Report":
        self.defects[reason] += 1
        self.examples.setdefault(reason, [])
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(example)
        return self

    def sound(self, found: Record, size: int, side: int, tags: Set[str]) -> None:
        """Counts a record whose picture's shorter side has `side` pixels."""
        self.bytes += size
        self.sides[next((end for end in SIDES if side < end), 0)] += 1
        self.formats[_format(found.image)] += 1
        self.lacking["caption"] += not found.caption.strip()
        self.lacking["description"] += not found.desc
        self.lacking["negatives"] += not (found.neg_desc or found.neg_tags)
        self.lacking["tags in the vocabulary"] += tags.isdisjoint(map(normalise, found.tags))


def _format(encoded: bytes) -> str:
    starts = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
    starts |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WEBP"
    return next((name for start, name in starts.items() if encoded.startswith(start)), "other")


def as_json(report: Report, source: ShardSource, complete: bool, seconds: float) -> dict:
    return {
        "path": source.folder.path,
        "complete": complete,
        "sound": complete and not report.defects,
        "shards": len(source.shards),
        "records": len(source),
        "records_read": report.records,
        "defects": dict(report.defects.most_common()),
        "examples": report.examples,
        "lacking": dict(report.lacking),
        "formats": dict(report.formats.most_common()),
        "shorter_side": {_side(end): report.sides[end] for end in (*SIDES, 0) if report.sides[end]},
        "seconds": round(seconds, 2),
        "records_per_second": round(report.records / seconds, 1),
        "megabytes_per_second": round(report.bytes / 1e6 / seconds, 2),
    }


def _side(end: int) -> str:
    if not end:
        return f"{SIDES[-1]} px and more"
    below = SIDES.index(end)
    return f"{SIDES[below - 1]}-{end - 1} px" if below else f"below {end} px"


def show(told: dict, console: Console) -> None:
    """The report for people, told as `as_json` has it."""
    sound = told["records_read"] - sum(
        n for reason, n in told["defects"].items() if not reason.startswith("shard")
    )
    table = Table(title=f"{told['path']}: what is in {sound:,} sound records", title_justify="left")
    for heading, justify in (("", "left"), ("records", "right"), ("share", "right")):
        table.add_column(heading, justify=justify)
    sections = (("without ", "lacking"), ("", "formats"), ("shorter side ", "shorter_side"))
    for prefix, section in sections:
        for name, count in told[section].items():
            table.add_row(prefix + name, f"{count:,}", f"{count / max(sound, 1):.2%}")
        table.add_section()
    console.print(table)
    for reason, count in told["defects"].items():
        console.print(f"{count:,} × {reason}", style="red", markup=False, soft_wrap=True)
        for example in told["examples"][reason]:
            console.print(f"    {example}", markup=False, soft_wrap=True)
    verdict = "sound" if told["sound"] else f"{sum(told['defects'].values()):,} defects"
    if not told["complete"]:
        verdict = f"interrupted, {verdict if told['defects'] else 'no defect'} so far"
    console.print(
        f"{told['shards']:,} shards, {told['records_read']:,} of {told['records']:,} records read "
        f"in {told['seconds']:,.1f} s ({told['records_per_second']:,.0f}/s, "
        f"{told['megabytes_per_second']:,.1f} MB/s): {verdict}",
        soft_wrap=True,
    )
