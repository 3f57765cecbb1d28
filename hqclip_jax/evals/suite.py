"""Suites: which sets to evaluate on, by name, by file, or the one set in a folder."""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, get_origin

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from hqclip_jax.evals.aro import VGAttribution, VGRelation, WordOrder
from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.faces import Faces
from hqclip_jax.evals.multilabel import MultiLabel
from hqclip_jax.evals.outcome import Outcome, Skips
from hqclip_jax.evals.probe import FewShot, Probe
from hqclip_jax.evals.retrieval import Retrieval
from hqclip_jax.evals.sugarcrepe import HardNegatives, SugarCrepePlus
from hqclip_jax.evals.valse import Valse
from hqclip_jax.evals.winogavil import WinoGAViL
from hqclip_jax.evals.winoground import Winoground
from hqclip_jax.evals.zeroshot import ZeroShot

TASKS = {
    "zeroshot": ZeroShot,
    "multilabel": MultiLabel,
    "retrieval": Retrieval,
    "hard_negatives": HardNegatives,
    "winogavil": WinoGAViL,
    "faces": Faces,
    "sugarcrepe_pp": SugarCrepePlus,
    "vg_relation": VGRelation,
    "vg_attribution": VGAttribution,
    "word_order": WordOrder,
    "winoground": Winoground,
    "valse": Valse,
    "probe": Probe,
    "few_shot": FewShot,
}
"""Dataclasses of `name`, `path` and what else an entry of that task may say."""

KNOWN_FILE = Path(__file__).with_name("suites.json")
DATACOMP_FILE = Path(__file__).with_name("datacomp.json")


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


def unreadable(evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """Sets whose files are not all there, and why, by name; images are not read.

    With several processes all must call it, and what one of them lacks is unreadable for all: a set
    that only some can read would leave them waiting for the others.
    """
    why: dict[str, str] = {}
    for evaluator in evaluators:
        try:
            evaluator.check()
        except EvalDataError as e:
            why[evaluator.name] = str(e)
        except Exception as e:  # a damaged file may raise anything, and ends this set alone
            why[evaluator.name] = f"{type(e).__name__}: {e}"
    if jax.process_count() > 1 and evaluators:
        missing = process_allgather(np.array([e.name in why for e in evaluators])).any(axis=0)
        for evaluator in (e for e, gone in zip(evaluators, missing) if gone):
            why.setdefault(evaluator.name, "another process can't read it, and says why")
    return why


def known_suites() -> dict[str, dict]:
    """The packaged suites: name to `{"sets": [...]}`, with paths under `--data`."""
    return json.loads(KNOWN_FILE.read_text()) | {"datacomp": json.loads(DATACOMP_FILE.read_text())}


def suite_groups(spec: str) -> dict[str, list[str]]:
    """The groups whose means a suite wants, by name the names of their sets; see `groups`.

    Args:
        spec: as `load_suite` takes it.

    Raises:
        SuiteError: a file whose groups are not lists of its sets.
    """
    path = Path(spec)
    suite = {} if path.is_dir() else _read(path) if path.is_file() else known_suites().get(spec, {})
    groups = suite.get("groups", {})
    names = {entry["name"] for entry in suite.get("sets", [])}
    for group, members in groups.items():
        if not isinstance(members, list) or not names.issuperset(members):
            raise SuiteError(f"{spec}: group {group!r} must list names of its sets: {members}")
    return groups


def tasks_help() -> str:
    """A paragraph per task: what it is, and what an entry may have beside task, name and path."""
    told = []
    for task, evaluator in TASKS.items():
        about = " ".join(evaluator.__doc__.partition("\n\n")[0].split())
        keys = ", ".join(_optional(task))
        told.append(f"{task:15}{about}" + (f" May have {keys}." if keys else ""))
    indent = {"initial_indent": " " * 4, "subsequent_indent": " " * 19}
    return "\n".join(textwrap.fill(t, 100, **indent) for t in told)


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
        paths = [s["path"] for s in known[spec]["sets"]]
        some = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        raise SuiteError(f"--suite={spec} needs --data=ROOT, the folder that holds {some}")
    return _evaluators(known[spec], Path(data), str(KNOWN_FILE))


def _folder(path: Path) -> Evaluator:
    path = path.absolute()
    kind = path / "dataset_type.txt"
    by_kind = {"retrieval": Retrieval, "multilabel": MultiLabel}
    evaluator = by_kind.get(kind.read_text().strip() if kind.exists() else "", ZeroShot)
    return evaluator(path.name, path)


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
    if not isinstance(entry, dict) or not {"task", "name", "path"} <= entry.keys():
        raise SuiteError(f"{source}: {json.dumps(entry)} must have task, name and path")
    task, given = entry["task"], {k: v for k, v in entry.items() if k != "task"}
    if task not in TASKS:
        raise SuiteError(f"{source}: task {task!r} is not one of {', '.join(TASKS)}")
    fields = {f.name: f.type for f in dataclasses.fields(TASKS[task])}
    if unknown := given.keys() - fields:
        raise SuiteError(
            f"{source}: {entry['name']!r} has unknown keys {', '.join(sorted(unknown))}: {task} "
            "must have task, name and path, and may have "
            + (", ".join(_optional(task)) or "nothing more")
        )
    where = f"{source}: {entry['name']!r}"
    values = {k: _value(fields[k], v, root, f"{where}: {k}") for k, v in given.items()}
    try:
        return TASKS[task](**values)
    except ValueError as e:
        raise SuiteError(f"{where}: {e}") from e


def _optional(task: str) -> list[str]:
    return [f.name for f in dataclasses.fields(TASKS[task]) if f.name not in ("name", "path")]


def _value(kind: Any, value: Any, root: Path, where: str) -> Any:
    """A field's value from JSON: of a path what lies under `root`, of a list a tuple."""
    if kind in (Path, Path | None) and isinstance(value, str):
        return _either_name(root / value)
    texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    if get_origin(kind) is tuple and texts:
        return tuple(value)
    if get_origin(kind) is not tuple and isinstance(value, (str, int)) and isinstance(value, kind):
        return value
    raise SuiteError(f"{where} is {json.dumps(value)}, which should be {_said(kind)}")


def _said(kind: Any) -> str:
    if kind in (Path, Path | None):
        return "a path"
    return "a list of texts" if get_origin(kind) is tuple else getattr(kind, "__name__", str(kind))


def _either_name(path: Path) -> Path:
    """CLIP_benchmark's `wds_X` are called `wds_X_test` by DataComp: what is there is taken."""
    bare = path.name.removesuffix("_test")
    other = path.with_name(bare if bare != path.name else f"{path.name}_test")
    return other if bare.startswith("wds_") and not path.exists() and other.exists() else path
