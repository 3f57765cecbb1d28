"""What an evaluator found: scores, the answers behind them, what was left out, and examples."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SHOWN = 8  # names kept of what is left out for one reason


class Skips:
    """What an evaluation had to leave out, counted by reason, the first of each reason by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, source: str) -> None:
        """Counts one.

        Args:
            reason: the same few words for all of a kind, such as "image does not decode".
            source: file and key, by which a person finds it.
        """
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < SHOWN:
            names.append(source)

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """For the end of a message: " (reason: 3, such as a.tar:7; ...)", or nothing."""
        told = [f"{r}: {n:,}, such as {self.names[r][0]}" for r, n in self.counts.items()]
        return f" ({'; '.join(told)})" if told else ""

    def to_json(self) -> dict[str, dict]:
        return {r: {"count": n, "first": self.names[r]} for r, n in self.counts.items()}


@dataclass(frozen=True)
class Items:
    """The answers of which a score is the mean: two models are compared answer by answer.

    Attributes:
        keys: one per answer, unique in the set, str [n].
        values: f32 [n].
        groups: int [n] where the score is the mean over the groups' means, else None.
        clusters: int [n] where some answers are about one picture, and so not independent; else
            None. Resampling keeps a cluster's answers together.
    """

    keys: np.ndarray
    values: np.ndarray
    groups: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def score(self) -> float:
        if self.groups is None:
            return float(self.values.mean(dtype=np.float64))
        counts = np.bincount(self.groups)
        sums = np.bincount(self.groups, weights=self.values)
        return float((sums[counts > 0] / counts[counts > 0]).mean())


@dataclass(frozen=True)
class Cell:
    """A picture, a text, or both, and how near the model found it.

    Attributes:
        source: `Example.source` of the picture; "" where there is none.
        similarity: cosine, or None.
        right: whether it is a right answer; None where it isn't one.
    """

    text: str = ""
    source: str = ""
    similarity: float | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Card:
    """One example of a report: what was asked, and what the model answered, best first.

    Attributes:
        section: the heading under which it stands, such as "Text to image".
    """

    section: str
    asked: Cell
    answers: tuple[Cell, ...]


@dataclass(frozen=True)
class Classes:
    """What each picture was taken for, of which come confusions and the accuracy by class.

    Attributes:
        names: of the classes.
        sources: `Example.source` of each picture, str [n].
        labels, predicted: class ids, int [n].
    """

    names: tuple[str, ...]
    sources: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """One set's result.

    Attributes:
        scores: by name; each `SCORE` has its chance level as `SCORE_chance` where one is known, and
            `n` is the number of images (or items) that were scored.
        main: the score that stands for the set in tables.
        items: by the name of their score.
        skips: what was left out.
        cards: a few examples, chosen by rule and not by hand.
        classes: of a classification, else None.
        settings: what was chosen on the way and is no score, such as a probe's penalty.
    """

    scores: dict[str, float]
    main: str
    items: dict[str, Items] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)
    cards: tuple[Card, ...] = ()
    classes: Classes | None = None
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A set that could not be scored."""

    error: str


Result = Outcome | Failure
