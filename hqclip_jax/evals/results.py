"""The files of an evaluation: `results.json`, `results.csv` and the answers, `items/SET.npz`."""

import csv
import json
import math
import urllib.parse
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.bootstrap import interval
from hqclip_jax.evals.outcome import Failure, Items, Outcome, Result
from hqclip_jax.evals.published import column_means

JSON, CSV, ITEMS = "results.json", "results.csv", "items"
RUN_FOLDER = "evals"  # of a workdir: a folder of results for each step scored in training
FIELDS = ("keys", "values", "groups", "clusters")


class ResultsError(ValueError):
    """A folder that holds no usable results; the message names the file and the mend."""


@dataclass(frozen=True)
class Score:
    """One line of `results.csv`.

    Attributes:
        main: whether it stands for the set.
        value, chance: shares; chance is None where it is not known.
        low, high: ends of the 95% interval, None where the answers are not kept.
        n: how many answers it is the mean of.
    """

    name: str
    main: bool
    value: float
    chance: float | None
    low: float | None
    high: float | None
    n: int


def queries(outcome: Outcome, score: str) -> int:
    """How many answers a score is the mean of. A mean over groups, such as that of retrieval's two
    directions, has no one number: it is the set's `n`."""
    items, scores = outcome.items.get(score), outcome.scores
    if items is not None and items.groups is None:
        return len(items.values)
    if category := score.partition("/")[2]:
        return scores.get(f"n/{category}", scores.get("n", 0))
    return scores.get("captions" if score.startswith("image_retrieval") else "n", 0)


def named_scores(scores: Mapping[str, float]) -> list[str]:
    """The scores among what is reported: not chance levels, and not counts, which are int."""
    return [k for k, v in scores.items() if isinstance(v, float) and not k.endswith("_chance")]


def scores_of(outcome: Outcome) -> list[Score]:
    """Every score, with its interval where the answers behind it are kept."""
    found = []
    for name in named_scores(outcome.scores):
        value, n = outcome.scores[name], queries(outcome, name)
        ends = None
        if name in outcome.items and len(outcome.items[name].values):
            ends = interval(outcome.items[name])
        low, high = (ends.low, ends.high) if ends else (None, None)
        chance = outcome.scores.get(f"{name}_chance")
        found.append(Score(name, name == outcome.main, value, chance, low, high, n))
    return found


def not_numbers(outcome: Outcome) -> list[str]:
    """Names of scores that are NaN or infinite."""
    return [name for name, value in outcome.scores.items() if not math.isfinite(value)]


def main_scores(results: Mapping[str, Result]) -> dict[str, float]:
    """The score that stands for each set."""
    return {
        name: result.scores[result.main]
        for name, result in results.items()
        if isinstance(result, Outcome)
    }


def to_json(result: Result) -> dict:
    """As it stands in `results.json`."""
    if isinstance(result, Failure):
        return {"error": result.error}
    told = {"main": result.main, "scores": result.scores, "left_out": result.skips.to_json()}
    return told | ({"settings": result.settings} if result.settings else {})


def write_results(
    out: Path,
    about: Mapping[str, object],
    results: Mapping[str, Result],
    scores: Mapping[str, list[Score]],
) -> Path:
    """Writes the three files; `results.json` comes last, so what it names is whole.

    Args:
        about: what was evaluated, on what.
        scores: `scores_of` each set that has some.

    Returns:
        the path of `results.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        if isinstance(result, Outcome) and result.items:
            _write_items(_items_path(out, name), result.items)
    _write_csv(out / CSV, results, scores)
    means = column_means(main_scores(results))
    columns = {column: asdict(mean) for column, mean in means.items()}
    sets = {name: to_json(result) for name, result in results.items()}
    whole = {**about, "datacomp": columns, "results": sets}
    return write_json(out / JSON, whole)


def write_json(path: Path, whole: Mapping) -> Path:
    """Whole or not at all, and never with NaN, which is no JSON."""
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def _write_csv(
    path: Path, results: Mapping[str, Result], scores: Mapping[str, list[Score]]
) -> None:
    """A line for each set and score; one with the error for a set that failed."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("set", "score", "main", "value", "chance", "low", "high", "n", "left_out", "error")
        writer.writerow(names)
        for name, result in results.items():
            if isinstance(result, Failure):
                writer.writerow((name, *[""] * 8, result.error))
                continue
            for s in scores[name]:
                numbers = (s.value, s.chance, s.low, s.high, s.n, result.skips.total)
                writer.writerow((name, s.name, int(s.main), *numbers, ""))
    partial.replace(path)


def _items_path(out: Path, name: str) -> Path:
    # A set's name is whatever a suite calls it: a slash in it is no folder.
    return out / ITEMS / f"{urllib.parse.quote(name, safe='')}.npz"


def _write_items(path: Path, items: Mapping[str, Items]) -> None:
    """`SCORE.keys`, `SCORE.values` and, where there are some, `SCORE.groups`, `SCORE.clusters`."""
    arrays = {}
    for score, each in items.items():
        for field in FIELDS:
            if (array := getattr(each, field)) is not None:
                arrays[f"{score}.{field}"] = array
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


@dataclass(frozen=True)
class Stored:
    """A folder of results, read again.

    Attributes:
        about: `results.json` without its results.
        sets: `{"main", "scores", "left_out"}` or `{"error"}` by set.
    """

    folder: Path
    about: dict
    sets: dict[str, dict]

    def items(self, name: str) -> dict[str, Items]:
        """The answers behind a set's scores.

        Raises:
            ResultsError: the file is missing or broken, or its answers are not those of
                `results.json`.
        """
        path = _items_path(self.folder, name)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {key: arrays[key] for key in arrays.files}
        except FileNotFoundError as e:
            raise ResultsError(f"{path} is missing: evaluate again to keep the answers") from e
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise ResultsError(f"{path} is broken: evaluate again ({e})") from e
        found = {}
        for key in fields:
            score, _, field = key.rpartition(".")
            if field == "keys":
                found[score] = Items(*(fields.get(f"{score}.{each}") for each in FIELDS))
                self._check(path, name, score, found[score])
        return found

    def _check(self, path: Path, name: str, score: str, items: Items) -> None:
        lengths = {len(each) for f in FIELDS if (each := getattr(items, f)) is not None}
        if items.values is None or lengths == {0} or len(lengths) > 1:
            raise ResultsError(f"{path}: {score!r} has no answers, or not one for each key")
        if len(np.unique(items.keys)) < len(items.keys):
            raise ResultsError(f"{path}: two answers of {score!r} have one key")
        told = self.sets[name]["scores"].get(score)
        if told is None or abs(told - items.score()) > 1e-5:
            raise ResultsError(
                f"{path}: its {score!r} is {items.score():.5f}, in {JSON} it is {told}: the two "
                "are of different evaluations; evaluate again"
            )


def read_results(folder: str | Path) -> Stored:
    """Raises ResultsError where the folder holds no results, or ones of another form."""
    path = Path(folder) / JSON
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ResultsError(f"{path} is missing: give the --out folder of an evaluation") from e
    except ValueError as e:
        raise ResultsError(f"{path} is not JSON: {e}") from e
    sets = whole.pop("results", None) if isinstance(whole, dict) else None
    known = ({"error"}, {"main", "scores", "left_out"})
    if not isinstance(sets, dict) or not all(
        isinstance(s, dict) and any(k <= s.keys() for k in known) for s in sets.values()
    ):
        raise ResultsError(f"{path} is of another version: evaluate again")
    return Stored(Path(folder), whole, sets)
