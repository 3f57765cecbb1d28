"""Suites: which sets to evaluate on, by name, by file, or the one set in a folder."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from hqclip_jax.evals.compositional import HardNegatives
from hqclip_jax.evals.datasets import Example
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.outcome import Outcome, Skips
from hqclip_jax.evals.retrieval import Retrieval
from hqclip_jax.evals.zeroshot import ZeroShot

TASKS = {"zeroshot": ZeroShot, "retrieval": Retrieval, "hard_negatives": HardNegatives}
FIELDS = {"task", "name", "path", "images"}
KNOWN_FILE = Path(__file__).with_name("suites.json")


class SuiteError(ValueError):
    """A suite that can't be understood; the message names the entry and the mend."""


class Evaluator(Protocol):
    """One set and how it is scored."""

    name: str

    def check(self) -> None:
        """Raises `EvalDataError` where files are missing; reads no images."""

    def examples(self, skips: Skips) -> Iterable[Example]:
        """The images, in order; what the set has wrong is counted."""

    def run(self, embedder: Embedder) -> Outcome:
        """Raises `EvalDataError` where nothing can be scored."""


def known_suites() -> dict[str, dict]:
    """The packaged suites: name to `{"sets": [...]}`, with paths under `--data`."""
    return json.loads(KNOWN_FILE.read_text())


def load_suite(spec: str, data: str | Path | None = None) -> list[Evaluator]:
    """The evaluators of a suite. Their files need not be there yet: see `Evaluator.check`.

    Args:
        spec: a folder in CLIP_benchmark's layout, a JSON file `{"sets": [...]}`, or a known name.
        data: the folder under which the sets lie; by default the suite file's own.

    Raises:
        SuiteError: an unknown name, a file that is no suite, a known name without `data`.
    """
    path = Path(spec)
    if path.is_dir():
        return [_folder(path)]
    if path.is_file():
        return _evaluators(_read(path), Path(data or path.parent), str(path))
    known = known_suites()
    if spec not in known:
        near = difflib.get_close_matches(spec, known, 1)
        raise SuiteError(
            f"--suite={spec} is no folder, no file and no known suite"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(known)}. Or name a folder with classnames.txt and test/0.tar, "
            "or a JSON file that lists sets (see --help)"
        )
    if data is None:
        paths = ", ".join(s["path"] for s in known[spec]["sets"])
        raise SuiteError(f"--suite={spec} needs --data=ROOT, the folder that holds {paths}")
    return _evaluators(known[spec], Path(data), str(KNOWN_FILE))


def _folder(path: Path) -> Evaluator:
    path = path.absolute()
    kind = path / "dataset_type.txt"
    if kind.exists() and kind.read_text().strip() == "retrieval":
        return Retrieval(path.name, path)
    return ZeroShot(path.name, path)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise SuiteError(f"suite file {path} is not JSON: {e}") from e


def _evaluators(suite: dict, root: Path, source: str) -> list[Evaluator]:
    entries = suite.get("sets") if isinstance(suite, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SuiteError(f'{source}: write {{"sets": [{{"task": ..., "name": ..., "path": ...}}]}}')
    evaluators = [_evaluator(entry, root, source) for entry in entries]
    names = [e.name for e in evaluators]
    if twice := {n for n in names if names.count(n) > 1}:
        raise SuiteError(f"{source}: two sets are named {', '.join(sorted(twice))}")
    return evaluators


def _evaluator(entry: dict, root: Path, source: str) -> Evaluator:
    if not isinstance(entry, dict) or not {"task", "name", "path"} <= entry.keys() <= FIELDS:
        raise SuiteError(
            f"{source}: {json.dumps(entry)} must have task, name and path, and may have images"
        )
    task = entry["task"]
    if task not in TASKS:
        raise SuiteError(f"{source}: task {task!r} is not one of {', '.join(TASKS)}")
    if "images" not in entry:
        return TASKS[task](entry["name"], root / entry["path"])
    if task != "hard_negatives":
        raise SuiteError(f"{source}: only hard_negatives take `images`, {entry['name']!r} does not")
    return HardNegatives(entry["name"], root / entry["path"], root / entry["images"])
