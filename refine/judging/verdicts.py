"""Rules on scores, and what they say of a shard's records at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from refine.judging.scoring import CLIP, JUDGE

KEPT = "joined"
REASONS = {
    "pairs": "records read",
    KEPT: "records kept",
    "no_clip_score": "no CLIP score: no description, or a picture that does not decode",
    "low_clip_score": "CLIP score of the description too low",
    "not_in_top": "not among those with the highest CLIP score",
    "no_judge_score": "no rating of the description",
    "low_judge_score": "rating of the description too low",
    "weak_negative": "negative description that fits too well",
    "negatives_dropped": "of those kept: negative descriptions dropped",
    "negative_tags_dropped": "of those kept: negative tags dropped",
}


@dataclass(frozen=True)
class Rules:
    """What a record must pass; None is no rule.

    Attributes:
        min_clip: least CLIP score of the description.
        keep_top: share of the records to keep, by CLIP score of the description.
        min_margin: how far a positive's CLIP score is above its negative's, at least.
        min_judge: least rating of the description.
        max_negative_judge: highest rating of the negative description.
        drop_record: a negative description that fails takes its record with it.
    """

    min_clip: float | None = None
    keep_top: float | None = None
    min_margin: float | None = None
    min_judge: float | None = None
    max_negative_judge: float | None = None
    drop_record: bool = False

    @property
    def by_clip(self) -> bool:
        return any(rule is not None for rule in (self.min_clip, self.keep_top, self.min_margin))

    @property
    def by_judge(self) -> bool:
        return self.min_judge is not None or self.max_negative_judge is not None

    def verdicts(
        self, rows: Mapping[str, np.ndarray], top: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Judges the records of a shard.

        Args:
            rows: [n] of "clip" and "judge", as far as rules need them.
            top: the least score of `keep_top`.

        Returns:
            why each record goes, "" if it stays, [n]; whether its negative descriptions go, bool
            [n]; whether its negative tags do, bool [n].
        """
        size = len(next(iter(rows.values())))
        why = np.full(size, "", object)
        weak_desc, weak_tags = np.zeros(size, bool), np.zeros(size, bool)

        def refuse(reason: str, failed: np.ndarray) -> None:
            why[failed & (why == "")] = reason

        if self.by_clip:
            clip = rows[CLIP]
            refuse("no_clip_score", np.isnan(clip["desc"]))
            if self.min_clip is not None:
                refuse("low_clip_score", clip["desc"] < self.min_clip)
            if self.keep_top is not None:
                refuse("not_in_top", clip["desc"] < top)
            if self.min_margin is not None:
                weak_desc |= clip["desc"] - clip["neg_desc"] < self.min_margin
                weak_tags |= clip["tags"] - clip["neg_tags"] < self.min_margin
        if self.by_judge:
            judge = rows[JUDGE]
            refuse("no_judge_score", np.isnan(judge["desc"]))
            if self.min_judge is not None:
                refuse("low_judge_score", judge["desc"] < self.min_judge)
            if self.max_negative_judge is not None:
                weak_desc |= judge["neg_desc"] > self.max_negative_judge
        if self.drop_record:
            refuse("weak_negative", weak_desc)
        return why, weak_desc, weak_tags


def least_of_top(chunks: Callable[[], Iterable[np.ndarray]], share: float) -> float:
    """The least of the highest scores, exactly, in the memory of one chunk.

    Args:
        chunks: gives all scores, f32 [n] at a time, the same ones every time; NaN is no score.
        share: how many are wanted, rounded up; those that equal the least are all in.

    Returns:
        infinity where there are no scores.
    """
    total = sum(int(np.count_nonzero(~np.isnan(scores))) for scores in chunks())
    wanted = int(np.ceil(share * total))
    if not wanted:
        return np.inf
    high = 0
    for shift in (16, 0):  # by the first half of the bits, then within it by the second
        counts = np.zeros(1 << 16, np.int64)
        for scores in chunks():
            keys = _ranks(scores[~np.isnan(scores)])
            if shift == 0:
                keys = keys[keys >> 16 == high]
            counts += np.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, wanted))
        wanted -= int(above[place] - counts[::-1][place])
        high, low = (0xFFFF - place, 0) if shift else (high, 0xFFFF - place)
    key = high << 16 | low
    bits = key ^ 0x80000000 if key & 0x80000000 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Numbers int64 [n] in the order of f32 [n]."""
    bits = np.ascontiguousarray(scores).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000)).astype(np.int64)
