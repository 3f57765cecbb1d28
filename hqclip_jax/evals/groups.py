"""Means over groups of sets, as papers print them: ImageNet's shifts, VTAB, retrieval, all 38."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hqclip_jax.evals.outcome import Outcome, Result


@dataclass(frozen=True)
class GroupMean:
    """The mean of the sets' main scores.

    Attributes:
        mean: over the sets that have a score; None where none has.
        scored: how many have.
        missing: the others. A mean with any can't be compared with a published one.
    """

    mean: float | None
    scored: int
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        """In percent: "57.3", or "57.3 (5 of 6: no ObjectNet)"."""
        value = "-" if self.mean is None else f"{100 * self.mean:.1f}"
        if self.complete:
            return value
        some = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
        return f"{value} ({self.scored} of {self.scored + len(self.missing)}: no {some})"


def group_means(
    groups: Mapping[str, Sequence[str]], results: Mapping[str, Result]
) -> dict[str, GroupMean]:
    """Each group's mean over its sets, all of one weight.

    Args:
        groups: the names of each group's sets.
        results: by the set's name. A `Failure` counts as missing.
    """
    means = {}
    for group, names in groups.items():
        there = {n: r for n in names if isinstance(r := results.get(n), Outcome)}
        scores = [r.scores[r.main] for r in there.values()]
        missing = tuple(n for n in names if n not in there)
        mean = sum(scores) / len(scores) if scores else None
        means[group] = GroupMean(mean, len(scores), missing)
    return means
