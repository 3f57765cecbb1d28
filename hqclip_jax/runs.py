"""Runs as their workdirs tell of them: names that tell them apart, metrics, configuration."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.sinks import METRICS_FILE
from hqclip_jax.telemetry import read_metrics

log = logging.getLogger(__name__)

AXES = ("step", "samples", "seconds")


class RunError(ValueError):
    """Runs that can't be shown; the message says which, and what would do."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: short, and no other run's.
        rows: its reports; a value that is no number is nan.
        config: fields by dotted name, as text; empty where `config.json` is missing.
    """

    name: str
    rows: Sequence[Mapping[str, float]]
    config: Mapping[str, str]

    def metrics(self) -> set[str]:
        return {name for row in self.rows for name in row} - {"step", "time", "resumed_from"}

    def series(self, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """f64 [n], f64 [n]: `x` and `metric` of the rows that have both."""
        points = [(row[x], row[metric]) for row in self.rows if x in row and metric in row]
        xs, ys = np.array(points, float).reshape(-1, 2).T
        return xs, ys

    def restarts(self, x: str) -> list[float]:
        """Where on the axis `x` the run went on from a checkpoint after it had ended."""
        marks = [row["resumed_from"] for row in self.rows if "resumed_from" in row]
        steps, xs = self.series("step", x)[::-1]
        return list(np.interp(marks, steps, xs)) if len(steps) else []

    def last(self, metric: str) -> float | None:
        """Its value in the last row that has it."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def broken(self, metric: str) -> int:
        """How many of its values are no number."""
        return sum(not math.isfinite(row[metric]) for row in self.rows if metric in row)


def load(workdirs: Sequence[str | Path]) -> list[Run]:
    """The runs of these directories, in this order.

    Raises:
        RunError: no such directory, nothing reported in it, one directory given twice.
    """
    paths = [Path(w) for w in workdirs]
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such directory")
        if not (path / METRICS_FILE).is_file():
            below = sorted(str(p.parent) for p in path.glob(f"*/{METRICS_FILE}"))
            hint = f"; runs below it: {', '.join(below[:5])}" if below else ""
            raise RunError(f"{path} holds no {METRICS_FILE}: name a run's --workdir{hint}")
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise RunError(f"{path} is given twice")
    runs = [Run(n, _rows(p), _config(p)) for n, p in zip(_names(resolved), paths)]
    if not any(run.rows for run in runs):
        raise RunError(
            f"{', '.join(map(str, paths))}: no reports yet; the first comes at log.every"
        )
    return runs


def _rows(workdir: Path) -> list[dict[str, float]]:
    rows = []
    for row in read_metrics(workdir):
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        numbers = {k: v if math.isfinite(v) else math.nan for k, v in numbers.items()}
        if numbers.get("seconds") and "time/step" in numbers:
            numbers["goodput"] = numbers["time/step"] / numbers["seconds"]
        rows.append(numbers)
    return rows


def _config(workdir: Path) -> dict[str, str]:
    try:
        stored = json.loads((workdir / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        log.warning("%s is left out: %s", workdir / "config.json", e)
        return {}
    return dict(_flat(stored))


def _flat(tree: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    leaves = []
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves += _flat(value, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return leaves


def _names(paths: Sequence[Path]) -> list[str]:
    """The parts of the paths that differ: `a` and `b` of runs/a/train and runs/b/train."""
    if len(paths) == 1:
        return [paths[0].name or str(paths[0])]
    parts = [path.parts for path in paths]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(field, its value in each run) of the configuration fields that are not the same in all."""
    known = [run for run in runs if run.config]
    fields = list(dict.fromkeys(name for run in known for name in run.config))
    return [
        (name, [run.config.get(name, "–") or "(empty)" for run in runs])
        for name in fields
        if len({run.config.get(name) for run in known}) > 1
    ]
