"""The command `python -m hqclip_jax.evaluate compare A B`: two models on the same pictures."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hqclip_jax import report
from hqclip_jax.evals.bootstrap import RESAMPLES
from hqclip_jax.evals.compare_page import document
from hqclip_jax.evals.comparison import (
    Column,
    Compared,
    Comparison,
    Estimate,
    changed_sample,
    compare,
)
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.pictures import pictures
from hqclip_jax.evals.published import COLUMNS
from hqclip_jax.evals.results import ResultsError, read_results, write_json
from hqclip_jax.evals.suite import SuiteError, load_suite
from hqclip_jax.telemetry import setup_logging

log = logging.getLogger("hqclip_jax.evaluate")

HELP = """
A, B, ... are --out folders of evaluations (results.json and items/). Every other one is compared
with the first, answer by answer: only what both were asked counts, joined by its key, and how many
answers one of them lacks is told.

how to read it
  B - A          difference of the scores over the answers in common, in percentage points
  95%            its interval, by 10,000 resamples of the pictures (with all their captions); of a
                 mean per class, of the pictures within each class
  below 0        share of the resamples in which B is behind: near 0 B is better, near 1 worse
  better, worse  the interval leaves out 0, and at least 6 pictures' answers changed; else unclear
DataComp's means, such as that over ImageNet's shifts, are compared with each set resampled by
itself. Intervals are of each row alone: of twenty rows without any difference one is outside.
It speaks of these pictures and these two checkpoints: another seed of training moves scores too.

examples
  python -m hqclip_jax.evaluate compare runs/eval/large-imagenet-4000 runs/eval/large-imagenet-8000
  python -m hqclip_jax.evaluate compare base with-data with-losses --all --out=runs/compared
  python -m hqclip_jax.evaluate compare a b --pictures --data=/data/wds

exit status: 0 all sets compared, 1 some could not be (the others are there), 2 nothing was compared
"""
STYLES = {"better": "green", "worse": "red", "unclear": "dim"}
CHANGED = 6  # pictures of each set that a page shows as won, and as lost


def table(comparison: Comparison, names: tuple[str, str], every: bool) -> Table:
    """Main scores, or all, then DataComp's means; in percent and percentage points."""
    title = f"{escape(names[1])} (B) against {escape(names[0])} (A)"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown.add_column("set, score", overflow="fold", min_width=18)
    for heading in ("A", "B", "B - A"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("95%", justify="right", no_wrap=True)
    shown.add_column("below\n0", justify="right")
    shown.add_column("n", justify="right")
    shown.add_column("B is", no_wrap=True)
    for each in comparison.scores:
        if every or each.main:
            answers = f"{each.both:,}" + ("*" if each.only_a or each.only_b else "")
            shown.add_row(*_cells(f"{each.set}, {each.score}", each, answers))
    means = [column for column in comparison.columns if column.of > 1]
    if means:
        shown.add_section()
    for column in means:
        some = f" ({column.have} of {column.of})" if column.have < column.of else ""
        name = f"mean: {COLUMNS[column.column]}{some}"
        shown.add_row(*_cells(name, column, f"{column.have} set{'s'[: column.have > 1]}"))
    return shown


def _cells(name: str, row: Compared | Column, answers: str) -> list[str]:
    difference = row.difference
    style = STYLES[difference.verdict]
    return [
        escape(name), f"{100 * row.a:.1f}", f"{100 * row.b:.1f}",
        f"[{style}]{100 * difference.value:+.1f}[/]",
        f"{100 * difference.low:+.1f}…{100 * difference.high:+.1f}",
        f"{difference.below:.3f}", answers, f"[{style}]{difference.verdict}[/]",
    ]  # fmt: skip


def to_json(comparison: Comparison, names: tuple[str, str]) -> dict:
    """All of it but the single answers and resamples."""
    scores: dict[str, dict] = {}
    for each in comparison.scores:
        told = asdict(each)
        del told["set"], told["score"], told["resamples"]
        told["difference"] = _estimate(each.difference)
        scores.setdefault(each.set, {})[each.score] = told
    columns = {}
    for column in comparison.columns:
        told = asdict(column)
        del told["column"]
        columns[column.column] = told | {"difference": _estimate(column.difference)}
    sides = {
        side: {"name": name, "folder": str(stored.folder), **stored.about}
        for side, name, stored in zip("ab", names, (comparison.a, comparison.b))
    }
    return {
        **sides, "scores": scores, "datacomp": columns, "not_compared": comparison.problems
    }  # fmt: skip


def _estimate(estimate: Estimate) -> dict:
    return asdict(estimate) | {"verdict": estimate.verdict}


def labels(folders: Sequence[str]) -> list[str]:
    """The folders' paths without what all have in common; each is another."""
    paths = [os.path.abspath(folder) for folder in folders]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def changed_pictures(comparison: Comparison, data: str | None) -> dict[str, dict[str, str]]:
    """Pictures of the answers that changed sides, by set and key, from the sets of the second."""
    about = comparison.b.about
    try:
        evaluators = load_suite(about["suite"], data or about["data"])
    except (SuiteError, KeyError) as e:
        log.warning("no pictures: the second's suite can't be found from here: %s", e)
        return {}
    found = {}
    for evaluator in evaluators:
        if paired := comparison.pairs.get(evaluator.name):
            won, lost = changed_sample(paired, CHANGED)
            keys = paired.b.keys[won + lost].tolist()
            # A caption's key is its picture's with a number behind.
            wanted = {k: s for k in keys for s in (k, k.rpartition("/")[0])}
            sources = {*keys, *wanted.values()}
            try:
                shown = pictures(evaluator, sources)
            except EvalDataError as e:
                log.warning("%s: no pictures: %s", evaluator.name, e)
                continue
            found[evaluator.name] = {
                k: uri for k in keys if (uri := shown.get(k) or shown.get(wanted[k]))
            }
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.evaluate compare",
        description="Compares evaluations of models on the same sets, answer by answer.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--out of an evaluation")
    parser.add_argument("--out", help="folder for compare.json and compare.html [the last FOLDER]")
    parser.add_argument("--all", action="store_true", help="print all scores, not the main ones")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling [0]")
    parser.add_argument(
        "--pictures", action="store_true",
        help="show pictures whose answers changed; reads the sets of the suite again",
    )  # fmt: skip
    parser.add_argument("--data", help="where the sets lie now [where they were evaluated]")
    return parser


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, 1 if a set could not be compared, 2 if none could."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if len(arguments.folders) < 2:
        parser.error("name two folders or more")
    if len({os.path.abspath(folder) for folder in arguments.folders}) < len(arguments.folders):
        parser.error("a folder is named twice")
    console = setup_logging()
    try:
        first, *others = (read_results(folder) for folder in arguments.folders)
    except ResultsError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    names = labels(arguments.folders)
    comparisons = []
    for name, other in zip(names[1:], others):
        with console.status(f"comparing {escape(name)}"):
            comparisons.append(compare(first, other, arguments.seed))
        _tell(console, comparisons[-1], (names[0], name), arguments.all)
    if not any(comparison.scores for comparison in comparisons):
        log.error("nothing was compared")
        return 2
    out = Path(arguments.out or arguments.folders[-1])
    out.mkdir(parents=True, exist_ok=True)
    told = [to_json(c, (names[0], name)) for c, name in zip(comparisons, names[1:])]
    whole = {"seed": arguments.seed, "resamples": RESAMPLES, "comparisons": told}
    log.info("written to %s", write_json(out / "compare.json", whole))
    shown = [changed_pictures(c, arguments.data) if arguments.pictures else {} for c in comparisons]
    page = document(names, comparisons, shown, CHANGED)
    log.info("written to %s", report.write(out / "compare.html", page))
    return 1 if any(comparison.problems for comparison in comparisons) else 0


def _tell(console: Console, comparison: Comparison, names: tuple[str, str], every: bool) -> None:
    if comparison.scores:
        console.print(table(comparison, names, every))
    for each in comparison.scores:
        if each.main:
            _tell_uncommon(each)
    for name, problem in comparison.problems.items():
        log.warning("%s: not compared: %s", name, problem)


def _tell_uncommon(each: Compared) -> None:
    if each.only_a or each.only_b:
        log.warning(
            "* %s: %s answers in common; %s of the first alone and %s of the second alone count "
            "for nothing", each.set, f"{each.both:,}", f"{each.only_a:,}", f"{each.only_b:,}",
        )  # fmt: skip
    if each.relative:
        log.info("%s: lay in another folder; joined by what follows it", each.set)
