"""Evaluates a checkpoint: `python -m hqclip_jax.evaluate --checkpoint=DIR --suite=NAME_OR_PATH`."""

import argparse
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from hqclip_jax import report
from hqclip_jax.checkpoint import WEIGHTS, CheckpointError
from hqclip_jax.config import ConfigError
from hqclip_jax.evals import compare
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.embed import Embedder, EmbeddingError, Stopped
from hqclip_jax.evals.groups import group_means
from hqclip_jax.evals.outcome import Failure, Outcome, Result
from hqclip_jax.evals.page import Evaluation, document
from hqclip_jax.evals.pictures import pictures, wanted
from hqclip_jax.evals.published import closest_scale
from hqclip_jax.evals.results import main_scores, not_numbers, scores_of, write_results
from hqclip_jax.evals.suite import (
    Evaluator,
    SuiteError,
    known_suites,
    load_suite,
    suite_groups,
    tasks_help,
    unreadable,
)
from hqclip_jax.evals.tables import columns_table, results_table
from hqclip_jax.restore import RestoredModel, restore_model
from hqclip_jax.signals import meet
from hqclip_jax.telemetry import setup_logging

log = logging.getLogger("hqclip_jax.evaluate")

_LONGEST = 24 * 3600  # seconds that the other processes wait while the first one reports

EXAMPLES = f"""
a suite is one of
  a known name        {", ".join(known_suites())}; its sets lie under --data
  a folder            in CLIP_benchmark's layout: classnames.txt, test/nshards.txt, test/0.tar,
                      zeroshot_classification_templates.txt with {{c}} where the class goes;
                      or a folder per class, or what TFDS prepared
  a JSON file         paths lie under --data, or beside the file where --data is not given:
    {{"sets": [
      {{"task": "zeroshot", "name": "grocery", "path": "grocery/zeroshot"}},
      {{"task": "retrieval", "name": "coco", "path": "coco/00000.tar"}},
      {{"task": "hard_negatives", "name": "sugarcrepe", "path": "sugarcrepe.json",
       "images": "coco/00000.tar"}}
    ]}}
{tasks_help()}
    classnames, templates  files with a line each, or FILE.json:KEY, instead of the set's own
    split, label           of TFDS; or the folder between the path and the classes', or Karpathy's
    main                   the score that stands for the set in means
    metadata, group_by     names of the numbers in KEY.npy, and the one that makes the groups
    a suite may have "groups": {{"NAME": [names of sets]}}, whose means are told

examples
  python -m hqclip_jax.evaluate --checkpoint=runs/small --suite=imagenet --data=/data/wds
  python -m hqclip_jax.evaluate --checkpoint=runs/small --step=4000 --suite=/data/wds/wds_cars
  python -m hqclip_jax.evaluate --checkpoint=runs/demo --suite=mine.json --out=runs/demo-scores

written to --out
  results.json   all scores, DataComp's columns, what was left out and why
  results.csv    a line for each set and score: value, chance, 95% interval, n, left out
  items/SET.npz  the answer on each picture, by which two models are compared
  report.html    the scores beside the paper's, classes, confusions, examples with pictures

two models on the same sets
  python -m hqclip_jax.evaluate compare runs/eval/a runs/eval/b        (see compare --help)

exit status: 0 all sets scored, 1 some failed (the others' scores are there), 2 nothing was run
"""


def run_suite(
    embedder: Embedder, evaluators: Sequence[Evaluator], console: Console | None = None
) -> dict[str, Result]:
    """Runs every evaluator; one that fails leaves a `Failure` and the others still run.

    On a pod every host calls this together, with the same files: a set that only some hosts can
    read leaves the others waiting.

    Args:
        console: shows a progress bar, if it is a terminal.

    Returns:
        results by the evaluator's name, in order.

    Raises:
        Stopped: the embedder was asked to stop.
    """
    results: dict[str, Result] = {}
    shown = console is not None and console.is_terminal
    columns = TextColumn("{task.description}: {task.completed:,} embedded"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        for evaluator in evaluators:
            bar = progress.add_task(evaluator.name, total=None)
            embedder.on_embedded = functools.partial(progress.advance, bar)
            start = time.monotonic()
            try:
                if jax.process_count() > 1 and (why := unreadable([evaluator])):
                    raise EvalDataError(why[evaluator.name])  # on all, where one of them lost it
                results[evaluator.name] = _finite(evaluator.run(embedder))
                log.info("%s: done in %.1f s", evaluator.name, time.monotonic() - start)
                _tell_skips(evaluator.name, results[evaluator.name])
            except Stopped:
                raise
            except (EvalDataError, EmbeddingError) as e:
                results[evaluator.name] = Failure(str(e))
                log.error("%s: %s", evaluator.name, e)
            except Exception as e:
                results[evaluator.name] = Failure(f"{type(e).__name__}: {e}")
                log.exception("%s failed", evaluator.name)
            finally:
                embedder.on_embedded = None
                progress.remove_task(bar)
    return results


def _finite(outcome: Outcome) -> Outcome:
    if names := not_numbers(outcome):
        raise EvalDataError(f"these scores are no numbers: {', '.join(names)}")
    return outcome


def _tell_skips(name: str, outcome: Outcome) -> None:
    for reason, count in outcome.skips.counts.items():
        some = ", ".join(outcome.skips.names[reason])
        log.warning("%s: left out %s: %s: %s", name, f"{count:,}", reason, some)


def failed(results: dict[str, Result]) -> list[str]:
    """Names of the evaluators that failed."""
    return [name for name, result in results.items() if isinstance(result, Failure)]


def about(restored: RestoredModel, arguments: argparse.Namespace) -> dict:
    """What was evaluated, on what; the head of `results.json`."""
    return {
        "checkpoint": arguments.checkpoint,
        "step": int(restored.step),
        "samples": int(restored.step) * restored.config.optim.batch,
        "weights": arguments.weights,
        "suite": arguments.suite,
        "data": arguments.data,
        "model": dataclasses.asdict(restored.config.model),
        "tokenizer": restored.tokenizer.name,
    }


def write_report(
    out: Path, evaluation: Evaluation, evaluators: Sequence[Evaluator], console: Console
) -> Path:
    """Reads the sets again for the pictures that `report.html` shows, and writes it."""
    with console.status("reading the report's pictures"):
        for evaluator in evaluators:
            result = evaluation.results[evaluator.name]
            if isinstance(result, Outcome):
                evaluation.pictures[evaluator.name] = pictures(evaluator, wanted(result))
    return report.write(out / "report.html", document(evaluation))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.evaluate",
        description="Scores a checkpoint: zero-shot classification, retrieval, hard negatives.\n"
        "Architecture, resolution and tokenizer are the checkpoint's own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="folder that training wrote")
    parser.add_argument("--suite", required=True, help="known name, JSON file or folder; see below")
    parser.add_argument("--data", help="folder under which a suite's sets lie")
    parser.add_argument("--out", help="folder for what is written [runs/eval/RUN-SUITE-STEP]")
    parser.add_argument("--batch", type=int, default=256, help="images or texts a step [256]")
    parser.add_argument("--step", type=int, help="step to evaluate [the latest]")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=WEIGHTS[0],
        help="the parameters, or the average that a run with optim.ema keeps of them [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--distributed", action="store_true",
        help="join the other processes of a TPU pod or cluster (jax.distributed.initialize)",
    )  # fmt: skip
    parser.add_argument(
        "--no-report", action="store_true",
        help="write no report.html, and so read no set a second time for its pictures",
    )  # fmt: skip
    return parser


def _tell_unreadable(why: dict[str, str], evaluators: Sequence[Evaluator]) -> None:
    """Before any time is spent."""
    if why:
        lines = "\n  ".join(f"{name}: {reason}" for name, reason in why.items())
        log.error("%d of %d sets can't be read:\n  %s", len(why), len(evaluators), lines)


def tell_and_write(
    restored: RestoredModel,
    arguments: argparse.Namespace,
    evaluators: Sequence[Evaluator],
    results: dict[str, Result],
    console: Console,
) -> None:
    """The tables, the files, and the report."""
    suite, run = Path(arguments.suite).absolute().stem, Path(arguments.checkpoint).absolute().name
    out = Path(arguments.out or f"runs/eval/{run}-{suite}-{restored.step}")
    console.print(results_table(results))
    head = about(restored, arguments)
    scale = closest_scale(restored.config.model.arch, head["samples"])
    if (table := columns_table(results, scale)) is not None:
        console.print(table)
    for group, mean in group_means(suite_groups(arguments.suite), main_scores(results)).items():
        log.info("mean of %s: %s", group, mean)
    scores = {name: scores_of(r) for name, r in results.items() if isinstance(r, Outcome)}
    log.info("written to %s", write_results(out, head, results, scores))
    if not arguments.no_report:
        evaluation = Evaluation(head, scale, results, scores, {})
        log.info("written to %s", write_report(out, evaluation, evaluators, console))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a set failed, 2 if nothing was run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        parser.error(f"--batch={arguments.batch} must be above 0")
    console = setup_logging()
    try:
        if arguments.distributed:
            jax.distributed.initialize()
        evaluators = load_suite(arguments.suite, arguments.data)
        _tell_unreadable(why := unreadable(evaluators), evaluators)
        if len(why) == len(evaluators):
            return 2
        restored = restore_model(arguments.checkpoint, arguments.step, arguments.weights)
    except (SuiteError, CheckpointError, ConfigError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    embedder = Embedder(
        restored.model,
        restored.params,
        restored.tokenizer,
        restored.config.model.image_size,
        restored.mesh,
        arguments.batch,
    )
    found = run_suite(embedder, [e for e in evaluators if e.name not in why], console)
    results = {e.name: found.get(e.name) or Failure(why[e.name]) for e in evaluators}
    names = failed(results)
    if jax.process_index() == 0:
        tell_and_write(restored, arguments, evaluators, results, console)
    if names:
        log.error("failed: %s", ", ".join(names))
    meet("evaluated", _LONGEST)  # a process that ended would take the first one with it
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
