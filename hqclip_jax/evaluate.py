"""Evaluates a checkpoint: `python -m hqclip_jax.evaluate --checkpoint=DIR --suite=NAME_OR_PATH`."""

import argparse
import dataclasses
import functools
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hqclip_jax.checkpoint import WEIGHTS, CheckpointError
from hqclip_jax.config import ConfigError
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.embed import Embedder, EmbeddingError, Stopped
from hqclip_jax.evals.outcome import Failure, Outcome, Result
from hqclip_jax.evals.suite import Evaluator, SuiteError, known_suites, load_suite, tasks_help
from hqclip_jax.restore import RestoredModel, restore_model
from hqclip_jax.telemetry import setup_logging

log = logging.getLogger("hqclip_jax.evaluate")

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
    split                  of TFDS or Karpathy; the folder of tars, or between path and classes
    label                  the feature of TFDS that holds the class
    main                   the score that stands for the set in means
    metadata, group_by     names of the numbers in KEY.npy, and the one that makes the groups
    a suite may have "groups": {{"NAME": [names of sets]}}, whose means are told

examples
  python -m hqclip_jax.evaluate --checkpoint=runs/small --suite=imagenet --data=/data/wds
  python -m hqclip_jax.evaluate --checkpoint=runs/small --step=4000 --suite=/data/wds/wds_cars
  python -m hqclip_jax.evaluate --checkpoint=runs/demo --suite=mine.json --out=runs/demo-scores

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
                results[evaluator.name] = evaluator.run(embedder)
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


def _tell_skips(name: str, outcome: Outcome) -> None:
    for reason, count in outcome.skips.counts.items():
        some = ", ".join(outcome.skips.names[reason])
        log.warning("%s: left out %s: %s: %s", name, f"{count:,}", reason, some)


def failed(results: dict[str, Result]) -> list[str]:
    """Names of the evaluators that failed."""
    return [name for name, result in results.items() if isinstance(result, Failure)]


def _queries(scores: dict[str, float], score: str) -> int:
    """How many answers a score is the mean of; the mean of two directions has no one number."""
    if category := score.partition("/")[2]:
        return scores[f"n/{category}"]
    return scores["captions" if score.startswith("image_retrieval") else "n"]


def results_table(results: dict[str, Result]) -> Table:
    """One row a score, in percent, with its chance level and the number of answers behind it."""
    table = Table("set", "score", title="scores in %")
    for column in ("value", "chance", "n"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if isinstance(result, Failure):
            table.add_row(escape(name), f"[red]{escape(result.error)}[/]", "-", "-", "-")
            continue
        scores = result.scores
        for score, value in scores.items():
            chance = scores.get(f"{score}_chance")
            if chance is None and score != "tie_rate":
                continue
            table.add_row(
                escape(name),
                escape(score),
                f"{100 * value:.1f}",
                "-" if chance is None else f"{100 * chance:.1f}",
                f"{_queries(scores, score):,}",
            )
        if result.skips.total:
            table.add_row(escape(name), "[yellow]left out[/]", "", "", f"{result.skips.total:,}")
        table.add_section()
    return table


def to_json(result: Result) -> dict:
    """As it stands in `results.json`."""
    if isinstance(result, Failure):
        return {"error": result.error}
    return {"main": result.main, "scores": result.scores, "left_out": result.skips.to_json()}


def write_results(
    out: Path, restored: RestoredModel, arguments: argparse.Namespace, results: dict[str, Result]
) -> Path:
    """Writes `results.json`: what was evaluated, on what, and by set its scores, its main score and
    what was left out; or its error."""
    whole = {
        "checkpoint": arguments.checkpoint,
        "step": int(restored.step),
        "weights": arguments.weights,
        "suite": arguments.suite,
        "data": arguments.data,
        "model": dataclasses.asdict(restored.config.model),
        "tokenizer": restored.tokenizer.name,
        "results": {name: to_json(result) for name, result in results.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.json.tmp"
    partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False))
    return partial.replace(out / "results.json")


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
    parser.add_argument("--out", help="folder for results.json [runs/eval/SUITE-STEP]")
    parser.add_argument("--batch", type=int, default=256, help="images or texts a step [256]")
    parser.add_argument("--step", type=int, help="step to evaluate [the latest]")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=WEIGHTS[0],
        help="the parameters, or the average that a run with optim.ema keeps of them [%(default)s]",
    )  # fmt: skip
    return parser


def _unreadable(evaluators: Sequence[Evaluator]) -> int:
    """Lists the sets whose files are missing before any time is spent; returns how many."""
    missing = []
    for evaluator in evaluators:
        try:
            evaluator.check()
        except EvalDataError as e:
            missing.append(f"{evaluator.name}: {e}")
    if missing:
        lines = "\n  ".join(missing)
        log.error("%d of %d sets can't be read:\n  %s", len(missing), len(evaluators), lines)
    return len(missing)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a set failed, 2 if nothing was run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        parser.error(f"--batch={arguments.batch} must be above 0")
    console = setup_logging()
    try:
        evaluators = load_suite(arguments.suite, arguments.data)
        if _unreadable(evaluators) == len(evaluators):
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
    results = run_suite(embedder, evaluators, console)
    suite = Path(arguments.suite).absolute().stem
    out = Path(arguments.out or f"runs/eval/{suite}-{restored.step}")
    console.print(results_table(results))
    log.info("written to %s", write_results(out, restored, arguments, results))
    if names := failed(results):
        log.error("failed: %s", ", ".join(names))
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
