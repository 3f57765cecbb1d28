"""What a manifest says of a run: counts with words for them, rates, the version of the code."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from refine.parse import REASONS
from refine.progress import console

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
    "broken_parquet": "broken Parquet file or row group",
    "malformed_row": "malformed row of a listing",
    "not_asked": "picture that changed while a model was asked about it",
    "truncated": "answer cut at its limit",
    "refused_by_server": "refused by the server",
    "no_answer": "no answer from the server in many tries",
    "refused_by_engine": "refused by the engine",
    **REASONS,
    "annotations": "annotations (different uids)",
    "annotation_without_pair": "missing image (annotation whose pair never came)",
    "duplicate_annotation": "duplicate annotation",
    "annotation_without_uid": "annotation file without a uid for a name",
    "broken_annotation_tar": "broken or truncated annotation tar",
    "uids_without_pair": "uid of the subset whose pair never came",
}
ALWAYS = ("pairs", "joined", "duplicate_uid", "missing_image", "corrupt_image")
ALWAYS_JOINED = ("missing_annotation", "malformed_annotation", "annotation_without_pair")


def ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of `COUNTS`, those that it does not know at the end."""
    return {key: counts.get(key, 0) for key in [*COUNTS, *sorted(counts.keys() - COUNTS)]}


def show(counts: dict[str, int]) -> None:
    """Prints the counts, zeros left out where they are expected."""
    table = Table("", "count", box=None)
    table.columns[1].justify = "right"
    shown = ALWAYS + (ALWAYS_JOINED if counts["annotations"] else ())
    for key, count in counts.items():
        if count or key in shown:
            table.add_row(COUNTS.get(key, key), f"{count:,}")
    console.print(table)


RATES = ("images_per_second", "tokens_per_second", "busy_share")


def summed(stats: Mapping[str, float]) -> dict[str, float]:
    """The sums that `engine_stats` was made of."""
    return {name: value for name, value in stats.items() if name not in RATES}


def engine_stats(sums: Mapping[str, float]) -> dict[str, float]:
    """What a model's work adds up to over all engines, and the rates that follow from it.

    `seconds` are those in which engines ran, one after another; `busy_share` is the share of them
    in which an engine had as many requests as it can run, or all that were left.
    """
    seconds = sums.get("seconds", 0.0)
    if not seconds:
        return dict(sums)
    return {name: round(value, 3) for name, value in sums.items()} | {
        "images_per_second": round(sums.get("answers", 0) / seconds, 3),
        "tokens_per_second": round(sums.get("output_tokens", 0) / seconds, 1),
        "busy_share": round(1 - sums.get("starved_seconds", 0) / seconds, 4),
    }


def code_version() -> str:
    """A digest of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
