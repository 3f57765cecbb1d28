"""Two evaluations of the same sets, answer by answer: paired differences and their intervals."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hqclip_jax.evals.bootstrap import RESAMPLES, percentiles, resampled
from hqclip_jax.evals.cards import pick
from hqclip_jax.evals.outcome import Items
from hqclip_jax.evals.published import column_means, of_column
from hqclip_jax.evals.results import ResultsError, Stored, named_scores

FEWEST_CHANGED = 6  # 2 · 0.5⁶ < 0.05: of fewer changed answers no sign test tells two models apart


@dataclass(frozen=True)
class Estimate:
    """A difference, B less A.

    Attributes:
        value: the difference itself.
        low, high: ends of its 95% interval.
        below: the share of the resamples below 0, of those at 0 one half: near 0 B is better, near
            1 worse. Of one comparison, one-sided, it reads as a p-value does.
        enough: whether so many answers changed that a difference could be told at all.
    """

    value: float
    low: float
    high: float
    below: float
    enough: bool = True

    @property
    def verdict(self) -> str:
        if self.enough and self.low > 0:
            return "better"
        if self.enough and self.high < 0:
            return "worse"
        return "unclear"


def estimate(value: float, resamples: np.ndarray, enough: bool = True) -> Estimate:
    ends = percentiles(resamples)
    below = float((resamples < 0).mean() + (resamples == 0).mean() / 2)
    return Estimate(value, ends.low, ends.high, below, enough)


@dataclass(frozen=True)
class Paired:
    """The answers that two evaluations have in common.

    Attributes:
        a, b: the answers, in one order.
        only_a, only_b: how many one of them alone has.
        relative: whether keys were joined without the folder in which their set lay.
    """

    a: Items
    b: Items
    only_a: int
    only_b: int
    relative: bool

    @property
    def difference(self) -> Items:
        return Items(self.a.keys, self.b.values - self.a.values, self.a.groups, self.a.clusters)

    def changed(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the answers that B won, and of those it lost."""
        difference = self.difference.values
        return np.flatnonzero(difference > 0), np.flatnonzero(difference < 0)


def changed_sample(paired: Paired, count: int) -> tuple[list[int], list[int]]:
    """Places of up to `count` answers that B won, and that it lost, chosen as cards are."""
    difference = paired.difference.values
    return pick(difference > 0, count), pick(difference < 0, count)


def pair(a: Items, b: Items) -> Paired:
    """Joins by key. Where a set lay in another folder the keys are joined without it.

    Raises:
        ResultsError: nothing in common, or another class or picture under the same key.
    """
    exact = np.intersect1d(a.keys, b.keys, True, True)[1:]
    relative = False
    if len(exact[0]) < min(len(a.keys), len(b.keys)):
        bare = np.intersect1d(bare_keys(a.keys), bare_keys(b.keys), True, True)[1:]
        relative = len(bare[0]) > len(exact[0])
        exact = bare if relative else exact
    at_a, at_b = exact
    if not len(at_a):
        raise ResultsError(
            f"no answer in common: {a.keys[0]} and {b.keys[0]}, for two: were these the same sets?"
        )
    at_b = at_b[np.argsort(at_a, kind="stable")]
    at_a = np.sort(at_a)
    left, right = _at(a, at_a), _at(b, at_b)
    if (left.groups is None) != (right.groups is None) or (
        left.groups is not None and not _same_groups(left.groups, right.groups)
    ):
        raise ResultsError("the same keys are of other classes in the two: is this the same set?")
    return Paired(left, right, len(a.keys) - len(at_a), len(b.keys) - len(at_b), relative)


def _same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    """Whatever their numbers: a group that one of the two lacks shifts those behind it."""
    return np.array_equal(*(np.unique(x, return_inverse=True)[1] for x in (a, b)))


def _at(items: Items, places: np.ndarray) -> Items:
    parts = (items.keys, items.values, items.groups, items.clusters)
    return Items(*(None if part is None else part[places] for part in parts))


def bare_keys(keys: np.ndarray) -> np.ndarray:
    """Keys without the folder that all of them lie in."""
    first, last = min(keys.tolist()), max(keys.tolist())
    same = next((i for i, (x, y) in enumerate(zip(first, last)) if x != y), len(first))
    cut = first.rfind("/", 0, same) + 1
    return np.array([key[cut:] for key in keys.tolist()])


@dataclass(frozen=True)
class Compared:
    """One score of one set.

    Attributes:
        main: whether it stands for the set.
        a, b: the scores over the answers in common.
        both: how many those are; `only_a` and `only_b` as in `Paired`.
        won, lost: answers that B has better and worse than A.
        resamples: of the difference, f64 [resamples].
    """

    set: str
    score: str
    main: bool
    a: float
    b: float
    both: int
    only_a: int
    only_b: int
    relative: bool
    won: int
    lost: int
    difference: Estimate
    resamples: np.ndarray = field(repr=False)


def compare_score(name: str, score: str, main: bool, paired: Paired, seed: int) -> Compared:
    """One paired difference with its bootstrap; draws depend on seed, set and score alone."""
    difference = paired.difference
    resamples = resampled(difference, [seed, zlib.crc32(f"{name}\n{score}".encode())], RESAMPLES)
    won, lost = paired.changed()
    changed = np.concatenate([won, lost])
    independent = changed if difference.clusters is None else difference.clusters[changed]
    a, b = paired.a.score(), paired.b.score()
    enough = len(np.unique(independent)) >= FEWEST_CHANGED
    return Compared(
        name, score, main, a, b, len(paired.a.keys), paired.only_a, paired.only_b, paired.relative,
        len(won), len(lost), estimate(b - a, resamples, enough), resamples,
    )  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One of DataComp's columns, over `have` of its `of` sets: those that both models have."""

    column: str
    a: float
    b: float
    have: int
    of: int
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Attributes:
        scores: of all sets that could be compared; main scores first within a set.
        columns: DataComp's, of those sets that both have.
        problems: why a set or a score was not compared, by its name.
        pairs: the main score's answers by set.
    """

    a: Stored
    b: Stored
    scores: list[Compared]
    columns: list[Column]
    problems: dict[str, str]
    pairs: dict[str, Paired]


def compare(a: Stored, b: Stored, seed: int = 0) -> Comparison:
    """Compares all sets of both; what can't be compared is told and left out."""
    scores: list[Compared] = []
    problems: dict[str, str] = {}
    pairs: dict[str, Paired] = {}
    for name in dict.fromkeys([*a.sets, *b.sets]):
        sides = {"the first": a.sets.get(name), "the second": b.sets.get(name)}
        if absent := [side for side, found in sides.items() if found is None]:
            problems[name] = f"{absent[0]} was not evaluated on it"
        elif failed := [side for side, found in sides.items() if "error" in found]:
            problems[name] = f"it failed in {' and '.join(failed)}"
        else:
            try:
                found = _compare_set(a, b, name, seed, problems, pairs)
                scores.extend(sorted(found, key=lambda c: not c.main))
            except ResultsError as e:
                problems[name] = str(e)
    return Comparison(a, b, scores, compare_columns(scores), problems, pairs)


def _compare_set(
    a: Stored, b: Stored, name: str, seed: int, problems: dict[str, str], pairs: dict[str, Paired]
) -> list[Compared]:
    main, other = a.sets[name]["main"], b.sets[name]["main"]
    if main != other:
        raise ResultsError(f"its main score is {main} in the first, {other} in the second")
    left, right = a.items(name), b.items(name)
    compared = []
    for score in named_scores(a.sets[name]["scores"]):
        if score not in left or score not in right:
            if score == main:
                problems[f"{name}, {score}"] = "its answers are not kept"
            continue
        try:
            paired = pair(left[score], right[score])
        except ResultsError as e:
            problems[f"{name}, {score}"] = str(e)
            continue
        if score == main:
            pairs[name] = paired
        compared.append(compare_score(name, score, score == main, paired, seed))
    return compared


def compare_columns(scores: Sequence[Compared]) -> list[Column]:
    """DataComp's columns over the sets compared. The sets are taken as given and not drawn: each is
    resampled by itself, and a column's k-th resample is the mean over its sets' k-th."""
    mains = {compared.set: compared for compared in scores if compared.main}
    a, b = (column_means({n: getattr(m, side) for n, m in mains.items()}) for side in ("a", "b"))
    columns = []
    for column, mean in a.items():
        sets = [*of_column(column, mains).values()]
        resamples = np.mean([each.resamples for each in sets], axis=0)
        enough = any(each.difference.enough for each in sets)
        difference = estimate(b[column].mean - mean.mean, resamples, enough)
        columns.append(Column(column, mean.mean, b[column].mean, mean.have, mean.of, difference))
    return columns
