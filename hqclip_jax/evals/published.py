"""DataComp's columns: a run's scores in them, beside the published ones.

`published.csv` holds tables 2 to 4 of HQ-CLIP (Wei et al., ICCV 2025): in percent, blank where the
paper is.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from hqclip_jax.evals.groups import GroupMean, group_means
from hqclip_jax.evals.suite import known_suites

T = TypeVar("T")

SOURCE = "HQ-CLIP (Wei et al., ICCV 2025), tables 2 to 4"
FILE = Path(__file__).with_name("published.csv")
COLUMNS = {
    "imagenet": "ImageNet", "v2": "V2", "a": "A", "o": "O", "r": "R", "sketch": "Sketch",
    "objectnet": "ObjectNet", "shifts": "Shifts", "vtab": "VTAB", "coco": "COCO",
    "flickr": "Flickr", "winogavil": "WinoGAViL", "retrieval": "Retrieval", "average38": "Average",
}  # fmt: skip
"""Of the tables, by their headings; a set's column holds its main score."""

_NAMED = known_suites()["datacomp"]["groups"]
GROUPS = {
    "shifts": tuple(_NAMED["ImageNet shifts"]),
    "vtab": tuple(_NAMED["VTAB"]),
    "retrieval": tuple(_NAMED["Retrieval"]),
    "average38": tuple(_NAMED["Average"]),
}
"""The sets of the columns that are means, DataComp's."""
MEMBERS = {
    "imagenet": ("imagenet1k",), "v2": ("imagenetv2",), "a": ("imagenet-a",),
    "o": ("imagenet-o",), "r": ("imagenet-r",), "sketch": ("imagenet_sketch",),
    "objectnet": ("objectnet",), "coco": ("mscoco",), "flickr": ("flickr30k",),
    "winogavil": ("winogavil",),
} | GROUPS  # fmt: skip
"""The sets of each column, of which it is the plain mean of the main scores."""
ALIASES = {"mscoco_captions": "mscoco"}
"""Other names that suites give these sets."""

SAMPLES = {"small": 12.8e6, "medium": 128e6, "large": 1.28e9, "xlarge": 12.8e9}
"""Pictures seen in training at DataComp's scales."""
TOWERS = {"ViT-B/16": "large", "ViT-L/14": "xlarge"}


@dataclass(frozen=True)
class Row:
    """A line of the paper's tables; `scores` in percent by column."""

    table: str
    scale: str
    model: str
    method: str
    data: str
    note: str
    scores: Mapping[str, float]


@cache
def published() -> tuple[Row, ...]:
    """All lines."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return tuple(
            Row(
                *(line[field] for field in ("table", "scale", "model", "method", "data", "note")),
                {column: float(line[column]) for column in COLUMNS if line[column]},
            )
            for line in csv.DictReader(file)
        )


def closest_scale(arch: str, samples: float) -> str:
    """The scale to be read beside a run: its tower's, where only one has it, or else the one whose
    number of pictures seen is nearest, as a ratio. Our rule.

    Args:
        arch: `model.arch`.
        samples: pictures seen in training.
    """
    for tower, scale in TOWERS.items():
        if arch.startswith(tower):
            return scale
    scales = ("small", "medium") if arch.startswith("ViT-B/32") else SAMPLES
    return min(scales, key=lambda s: abs(math.log(max(samples, 1) / SAMPLES[s])))


def of_column(column: str, sets: Mapping[str, T]) -> dict[str, T]:
    """Those of the sets that are a column's, by their names."""
    return {n: v for n, v in sets.items() if ALIASES.get(n, n) in MEMBERS[column]}


def column_means(scores_by_set: Mapping[str, float]) -> dict[str, GroupMean]:
    """A column's mean over the sets at hand; columns of which none is at hand are absent.

    Args:
        scores_by_set: the main score of each set, as a share.
    """
    known = {ALIASES.get(name, name): score for name, score in scores_by_set.items()}
    return group_means({column: MEMBERS[column] for column in COLUMNS}, known)
