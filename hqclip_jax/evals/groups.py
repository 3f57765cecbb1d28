"""Means over groups of sets, as papers print them: ImageNet's shifts, VTAB, retrieval, all 38."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupMean:
    """The mean over those of a group's sets that were scored.

    Attributes:
        mean: as a share.
        have: how many were scored.
        of: how many the group is made of.
        missing: the others. A mean that lacks any can't be compared with a published one.
    """

    mean: float
    have: int
    of: int
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In percent: "57.3", or "57.3 (5 of 6: no objectnet)"."""
        if not self.missing:
            return f"{100 * self.mean:.1f}"
        some = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
        return f"{100 * self.mean:.1f} ({self.have} of {self.of}: no {some})"


def group_means(
    groups: Mapping[str, Sequence[str]], scores_by_set: Mapping[str, float]
) -> dict[str, GroupMean]:
    """Each group's mean over its sets, all of one weight; a group with none scored is absent.

    Args:
        groups: the names of each group's sets.
        scores_by_set: the main score of each set that was scored, as a share.
    """
    means = {}
    for group, names in groups.items():
        if scores := [scores_by_set[n] for n in names if n in scores_by_set]:
            missing = tuple(n for n in names if n not in scores_by_set)
            means[group] = GroupMean(sum(scores) / len(scores), len(scores), len(names), missing)
    return means
