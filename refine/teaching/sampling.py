"""A sample of pairs in which every kind has its share, however many there are to draw from.

Published: the teacher annotated 10,000 web pairs. How they were drawn is not; all of this is ours.
A pair's kind is how long its alt-text is, how wide its picture and how large. A kind's share goes
by the square root of how many pairs are of it: rare ones are seen, common ones still lead. Within a
kind the inputs take turns, and within an input a hash of seed and uid decides. So the sample is a
function of the seed and of what the inputs hold, not of the order in which they are read, and one
pass over them finds it in bounded memory.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from refine.uids import to_hex

WORDS, CAPTIONS = (1, 4, 8, 16, 32), ("0", "1-3", "4-7", "8-15", "16-31", "32+")
ASPECTS, SHAPES = (3 / 4, 4 / 3), ("tall", "about square", "wide")
SIDES, SIZES = (200, 400), ("under 200", "200-399", "400+")  # pixels of the shorter side
KINDS = [(words, shape, size) for words in CAPTIONS for shape in SHAPES for size in SIZES]

ROW = np.dtype([("uid", "S16"), ("priority", "<u8"), ("source", "<u4"), ("kind", "u1")])
"""A pair that may be drawn: `source` is the number of its input."""


@dataclass(frozen=True)
class Survey:
    """What there is to draw from.

    Attributes:
        rows: ROW [n], of each kind those that come first, as many as could be drawn.
        counts: int64 [kinds], how many pairs there are.
        skips: things that are no pair or no picture, by reason.
    """

    rows: np.ndarray
    counts: np.ndarray
    skips: Counter[str]

    def choose(self, samples: int, without: Collection[str] = ()) -> np.ndarray:
        """ROW [≤ samples], the sample in an order such that any beginning of it is a random part.

        Args:
            samples: how many to draw; fewer where there are fewer.
            without: uids that turned out not to be usable.
        """
        rows = np.sort(self.rows, order=("uid", "source"))
        rows = rows[np.r_[True, rows["uid"][1:] != rows["uid"][:-1]][: len(rows)]]
        unusable = np.array([bytes.fromhex(uid) for uid in without], "S16")
        rows = rows[~np.isin(rows["uid"], unusable)]
        available = np.bincount(rows["kind"], minlength=len(KINDS))
        chosen = first(rows, shares(self.counts, available, samples))
        # Not by priority: of a large kind only those with a high one were drawn.
        again = [priority(row["priority"], to_hex(row["uid"])) for row in chosen]
        return chosen[np.argsort(np.array(again, np.uint64))]


class Pool:
    """Rows that may be drawn, of each kind those that come first; memory does not grow with what
    was added.

    Args:
        keep: how many of each kind.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._rows = np.empty(0, ROW)
        self._added: list[np.ndarray] = []
        self._waiting = 0

    def add(self, rows: np.ndarray) -> None:
        self._added.append(rows)
        self._waiting += len(rows)
        if self._waiting > max(self._keep, len(self._rows)):
            self.rows()

    def rows(self) -> np.ndarray:
        """ROW [≤ keep · kinds]."""
        self._rows = first(np.concatenate([self._rows, *self._added]), self._keep)
        self._added, self._waiting = [], 0
        return self._rows


def kind_of(caption: str, width: int, height: int) -> int:
    """The number of a pair's kind, an index into KINDS."""
    words = bisect_right(WORDS, len(caption.split()))
    shape = bisect_right(ASPECTS, width / height)
    size = bisect_right(SIDES, min(width, height))
    return (words * len(SHAPES) + shape) * len(SIZES) + size


def priority(seed: int, uid: str) -> int:
    """Who comes before whom, uniform over 64 bits."""
    digest = hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def first(rows: np.ndarray, keep: int | np.ndarray) -> np.ndarray:
    """The rows of each kind that come first: inputs take turns, and each gives them by priority.

    Who is not among the first never comes back when others join, and a row that joins later is
    placed as it would have been among all. So rows may be dropped on the way.

    Args:
        rows: ROW [n].
        keep: how many of each kind, or int [kinds].
    """
    rows = rows[np.lexsort((rows["uid"], rows["priority"], rows["source"], rows["kind"]))]
    turn = _place(rows["kind"].astype(np.int64) << 32 | rows["source"])
    rows = rows[np.lexsort((rows["priority"], turn, rows["kind"]))]
    most = np.broadcast_to(keep, len(KINDS))[rows["kind"]]
    return rows[_place(rows["kind"]) < most]


def shares(counts: np.ndarray, available: np.ndarray, samples: int) -> np.ndarray:
    """How many of each kind to draw, int64 [kinds].

    In proportion to the square root of `counts`; where there are not as many, all of them, and what
    is left over goes to the others.

    Args:
        counts: int64 [kinds], pairs of each kind.
        available: int64 [kinds], of them those that can be drawn.
        samples: how many in all, if there are as many.
    """
    left = min(samples, int(available.sum()))
    drawn = np.zeros(len(counts), np.int64)
    weights = np.sqrt(counts)
    while True:
        open_ = (available > drawn) & (weights > 0)
        share = np.where(open_, weights, 0) * (left / max(weights[open_].sum(), 1e-9))
        full = open_ & (share >= available)
        if not full.any():
            break
        drawn[full] = available[full]
        left -= int(available[full].sum())
    whole = np.floor(share).astype(np.int64)
    order = np.argsort(whole - share, kind="stable")
    whole[order[: left - whole.sum()]] += 1
    return drawn + whole


def _place(keys: np.ndarray) -> np.ndarray:
    """The number of each within its run of equal keys, int64 [n]."""
    at = np.arange(len(keys))
    starts = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    return at - np.maximum.accumulate(np.where(starts, at, 0))
