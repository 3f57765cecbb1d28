"""Outputs side by side: the same pictures of each, scored and measured."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refine.errors import RefineError
from refine.judging.common import choose
from refine.judging.estimates import Estimate, estimate
from refine.judging.measures import Vocabulary, diversity, of_clip, of_judge, of_texts, words
from refine.judging.outputs import Output
from refine.judging.scores import Scores
from refine.judging.scoring import CLIP, JUDGE, score
from refine.progress import progress

MOST_WORDS = 20_000  # of which the ratio of different words is taken


@dataclass(frozen=True)
class Prices:
    """What one output was paid with, dollars.

    Attributes:
        taken: for a million tokens of prompts.
        said: for a million tokens of answers.
        hour: for an hour of what one engine runs on.
    """

    taken: float | None = None
    said: float | None = None
    hour: float | None = None

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        tokens: Sequence[tuple[str, tuple[float, float]]],
        hours: Sequence[tuple[str, float]],
    ) -> "dict[str, Prices]":
        """Each output's, from what is said for a label or, under "", for all.

        Raises:
            RefineError: a price is for no output.
        """
        for name in [name for name, _ in (*tokens, *hours) if name and name not in labels]:
            raise RefineError(f"there is no output {name!r} to price: they are {', '.join(labels)}")
        by_token, by_hour = dict(tokens), dict(hours)
        found = {}
        for label in labels:
            taken, said = by_token.get(label, by_token.get("", (None, None)))
            found[label] = cls(taken, said, by_hour.get(label, by_hour.get("")))
        return found

    def per_thousand(self, stats: Mapping[str, float]) -> float:
        """Dollars for 1,000 pictures, by an output's `engine_stats`; NaN where none can be told.

        What a server's bill added up to while it ran counts, unless a price is given.
        """
        answers = stats.get("answers", 0)
        if not answers:
            return np.nan
        spent = []
        if self.taken is not None:
            tokens = stats.get("prompt_tokens", 0), stats.get("output_tokens", 0)
            spent.append((tokens[0] * self.taken + tokens[1] * self.said) / 1e6)
        if self.hour is not None:
            spent.append(stats.get("seconds", np.nan) / 3600 * self.hour)
        if not spent and stats.get("cost_usd"):
            spent.append(stats["cost_usd"])
        return 1000 * sum(spent) / answers if spent else np.nan


@dataclass(frozen=True)
class Compared:
    """An output, measured.

    Attributes:
        label: what it is called.
        output: itself.
        columns: by measure, f64 [n], NaN where a record has none.
        facts: of all its texts, its manifest and its bill.
    """

    label: str
    output: Output
    columns: dict[str, np.ndarray]
    facts: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Outputs on the same pictures.

    Attributes:
        compared: in the order given.
        pictures: how many.
        seed: of their choice.
        estimates: by measure, one an output.
        scorers: names of what scored, by "clip" and "judge".
        words: of how many words the ratio of different ones is.
    """

    compared: list[Compared]
    pictures: int
    seed: int
    estimates: dict[str, list[Estimate]]
    scorers: dict[str, str]
    words: int


def label(directories: Sequence[Path]) -> list[str]:
    """Short names: each folder's own, or its path where two have the same."""
    names = [Path(os.path.abspath(directory)).name for directory in directories]
    whole = [os.path.abspath(directory) for directory in directories]
    if len(set(whole)) < len(whole):
        raise RefineError(f"an output is named twice: {', '.join(map(str, directories))}")
    return [name if names.count(name) == 1 else path for name, path in zip(names, whole)]


def compare(
    outputs: Sequence[Output],
    labels: Sequence[str],
    prices: Mapping[str, Prices],
    args: argparse.Namespace,
) -> Comparison:
    """Chooses pictures that all outputs have, scores and measures them.

    Args:
        outputs: in the order in which they are told.
        labels: their names.
        prices: of each, by name.
        args: `limit`, `seed`, `workers`, and the options of `refine.judging.scoring`.

    Raises:
        RefineError: they have no pair in common, or a scorer gave up.
    """
    numbers = choose(outputs, args.limit, args.seed, args.workers)
    pictures = len(numbers[0])
    if not pictures:
        raise RefineError(f"no uid is in all of {', '.join(labels)}: refine the same pairs")
    scores = score(args, outputs, [np.sort(chosen) for chosen in numbers])
    texts = [_texts(output, chosen) for output, chosen in zip(outputs, numbers)]
    fewest = min(MOST_WORDS, *(sum(map(len, tokens)) for _, tokens, _ in texts))
    compared = []
    for output, name, chosen, scored, (columns, tokens, tags) in zip(
        outputs, labels, numbers, scores, texts
    ):
        facts = _facts(output, prices[name], tags) | diversity(tokens, fewest)
        compared.append(Compared(name, output, columns | _scored(scored, chosen), facts))
    estimates = estimate([each.columns for each in compared], args.seed)
    scorers = {kind: found.about.name for kind, found in scores[0].items()}
    return Comparison(compared, pictures, args.seed, estimates, scorers, fewest)


def _texts(
    output: Output, numbers: np.ndarray
) -> tuple[dict[str, np.ndarray], list[list[str]], Vocabulary]:
    """The measures of an output's texts, the words of its descriptions, its tags."""
    tags = Vocabulary.of(output)
    rows, tokens = [], []
    with progress(f"reading {output.directory.name}", len(numbers), "records") as bar:
        for number in numbers.tolist():
            record = output.record(number)
            rows.append(of_texts(record, tags.known))
            tokens.append(words(" ".join(record.desc)))
            bar.advance(1)
    return {key: np.array([row[key] for row in rows], float) for key in rows[0]}, tokens, tags


def _scored(scores: Mapping[str, Scores], numbers: np.ndarray) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    if CLIP in scores:
        context = int(scores[CLIP].about.facts["context"])
        columns |= of_clip(scores[CLIP].rows(numbers), context)
    if JUDGE in scores:
        columns |= of_judge(scores[JUDGE].rows(numbers))
    return columns


def _facts(output: Output, prices: Prices, tags: Vocabulary) -> dict[str, float]:
    rejected = sum(output.quarantined.values())
    stats = output.manifest.get("engine_stats", {})
    answers = stats.get("answers", 0)

    def each(name: str) -> float:
        return stats.get(name, np.nan) / answers if answers else np.nan

    return {
        "records": len(output),
        "quarantined": rejected,
        "validity": len(output) / (len(output) + rejected),
        "distinct_tags": tags.distinct,
        "covered_tags": tags.covered,
        "images_per_second": stats.get("images_per_second", np.nan),
        "prompt_tokens": each("prompt_tokens"),
        "output_tokens": each("output_tokens"),
        "usd_per_thousand": prices.per_thousand(stats),
    }
