"""WinoGAViL: which of the candidate images does a cue word associate?

Bitton et al. 2022. DataComp scores it as retrieval: the mean Jaccard index over the items that
have 10 or 12 candidates.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np

from hqclip_jax.evals.datasets import EvalDataError, Example, read_text
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.folders import read_image, utf8_name
from hqclip_jax.evals.metrics import jaccard, mean_by_group
from hqclip_jax.evals.outcome import Items, Outcome, Skips

ITEMS, IMAGES = "winogavil_dataset.csv", "winogavil_images"
MAIN = "jaccard_10_12"


@dataclass(frozen=True)
class Item:
    """`right` are places in `candidates`, which are names of images."""

    key: str
    cue: str
    candidates: tuple[str, ...]
    right: frozenset[int]


@dataclass(frozen=True)
class Named(Example):
    name: str


def read_items(file: Path) -> list[Item]:
    """The published CSV: `candidates` and `associations`, JSON lists of names, and `cue`.

    Raises:
        EvalDataError: a line that lacks one, or associates what is no candidate.
    """
    items = []
    for line, row in enumerate(csv.DictReader(io.StringIO(read_text(file))), start=2):
        try:
            candidates = tuple(json.loads(row["candidates"]))
            right = frozenset(candidates.index(name) for name in json.loads(row["associations"]))
            cue = row["cue"].strip()
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise EvalDataError(
                f"{file} line {line}: `candidates` and `associations` should be JSON lists, the "
                f"second of the first's entries, and `cue` a word: {type(e).__name__}: {e}"
            ) from e
        if not cue or not right:
            raise EvalDataError(f"{file} line {line} has no `cue` or no `associations`")
        items.append(Item(f"{file}:{row.get('ID') or line}", cue, candidates, right))
    if not items:
        raise EvalDataError(f"{file} holds no items")
    return items


def prompt(cue: str) -> str:
    """DataComp's: "A werewolf", "An eagle"."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def chosen(sims_c: np.ndarray, count: int) -> set[int]:
    """The `count` nearest of the candidates; of equally near ones the earlier."""
    return set(np.argsort(-sims_c, kind="stable")[:count].tolist())


def chance(candidates: int, right: int) -> float:
    """The expected Jaccard index of `right` candidates that are drawn at random."""
    ways = [comb(right, both) * comb(candidates - right, right - both) for both in range(right + 1)]
    return sum(w * both / (2 * right - both) for both, w in enumerate(ways)) / sum(ways)


@dataclass(frozen=True)
class WinoGAViL:
    """A folder of winogavil_dataset.csv and winogavil_images/NAME.jpg.

    These are the files of the data's repositories, the archive of images unpacked.
    """

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where items or images are not there."""
        read_items(self.path / ITEMS)
        if not (self.path / IMAGES).is_dir():
            raise EvalDataError(f"{self.path / IMAGES} is missing: unpack {IMAGES}.zip there")

    def examples(self, skips: Skips) -> Iterator[Named]:
        """Each candidate's image once, however many items show it."""
        names = dict.fromkeys(n for item in read_items(self.path / ITEMS) for n in item.candidates)
        for name in names:
            file = self.path / IMAGES / f"{name}.jpg"
            if (image := read_image(file, skips)) is not None:
                yield Named(utf8_name(file), image, name)

    def run(self, embedder: Embedder) -> Outcome:
        self.check()
        skips, zimg = Skips(), {}
        for examples, z_nxD in embedder.images(self.examples(skips), skips):
            zimg.update(zip((e.name for e in examples), z_nxD))
        whole = []
        for item in read_items(self.path / ITEMS):
            if missing := [name for name in item.candidates if name not in zimg]:
                skips.add("an item lacks a candidate's image", f"{item.key}: {missing[0]}")
            else:
                whole.append(item)
        if not whole:
            raise EvalDataError(f"{self.path} holds no whole items{skips}")
        values = []
        for item, ztxt_D in zip(whole, embedder.texts([prompt(item.cue) for item in whole])):
            sims_c = np.stack([zimg[name] for name in item.candidates]) @ ztxt_D
            values.append(jaccard(chosen(sims_c, len(item.right)), item.right))
        return _outcome(whole, np.array(values), skips)


def _outcome(whole: list[Item], value_n: np.ndarray, skips: Skips) -> Outcome:
    size_n = np.array([len(item.candidates) for item in whole])
    chance_n = np.array([chance(len(i.candidates), len(i.right)) for i in whole])
    keys = np.array([item.key for item in whole])
    scores: dict[str, float] = {}
    items: dict[str, Items] = {}
    parts = {"jaccard": size_n > 0, MAIN: size_n >= 10, "jaccard_5_6": size_n <= 6}
    for score, of_n in parts.items():
        if of_n.any():
            scores[score] = float(value_n[of_n].mean())
            scores[f"{score}_chance"] = float(chance_n[of_n].mean())
            items[score] = Items(keys[of_n], value_n[of_n].astype(np.float32))
    for size, (mean, count) in mean_by_group(value_n, size_n).items():
        scores |= {f"jaccard/candidates={size}": mean, f"n/candidates={size}": count}
    scores["n"] = len(whole)
    if MAIN not in scores:
        raise EvalDataError(f"no item has 10 or 12 candidates, which the score stands on{skips}")
    return Outcome(scores, MAIN, items, skips)
