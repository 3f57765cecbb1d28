"""The scorers that a command is told to use, and their options."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from refine.arguments import positive

if TYPE_CHECKING:
    import numpy as np

    from refine.engines.lvlm import Model
    from refine.judging.outputs import Output
    from refine.judging.scores import Scores

CLIP, JUDGE = "clip", "judge"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --clip and --judge-… to a command."""
    clip = parser.add_argument_group("CLIP scores")
    clip.add_argument(
        "--clip",
        type=Path,
        metavar="DIR",
        help="a checkpoint: the --workdir of a training, or a folder with a CLIPModel of "
        "transformers",
    )
    clip.add_argument(
        "--clip-python",
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter that has JAX, for a checkpoint of ours; default: this one",
    )
    clip.add_argument(
        "--clip-batch", type=positive, default=64, metavar="N", help="pictures at a time; 64"
    )
    judge = parser.add_argument_group(
        "judge scores",
        "A vision-language model rates from 0 to 10 how well each text fits its picture. A "
        "server's key is read from OPENAI_API_KEY alone.",
    )
    judge.add_argument(
        "--judge-model", metavar="MODEL", help="a folder, a name on the hub, or on the server"
    )
    judge.add_argument(
        "--judge-engine",
        choices=("vllm", "openai"),
        default="vllm",
        help="in this process, or behind a server; default: vllm",
    )
    judge.add_argument("--judge-url", metavar="URL", help="such as http://localhost:8000/v1")
    judge.add_argument("--judge-slots", type=positive, metavar="N", help="requests at a time")
    judge.add_argument(
        "--judge-pixels",
        type=positive,
        default=512 * 512,
        metavar="N",
        help="pictures are shrunk to N pixels before the judge sees them; default: 262144",
    )


def score(
    args: argparse.Namespace,
    outputs: "Sequence[Output]",
    numbers: "Sequence[np.ndarray | None]",
) -> "list[dict[str, Scores]]":
    """Scores what has no score yet, one scorer after the other, since a judge may want all of a
    GPU's memory.

    Args:
        args: parsed with the options of `add_arguments`.
        outputs: whose records.
        numbers: for each output, which, int64 [n], ascending; None for all.

    Returns:
        for each output its scores by "clip" and "judge", as far as they were asked for.

    Raises:
        RefineError: a scorer can't be loaded or gave up; what it said until then is kept.
    """
    found: list[dict[str, Scores]] = [{} for _ in outputs]
    model = _judge(args) if args.judge_model else None  # what is wrong with it is told at once
    if args.clip:
        from refine.judging.clip import Clip

        with closing(Clip(args.clip, args.clip_python, args.clip_batch)) as clip:
            for scores, output, chosen in zip(found, outputs, numbers):
                scores[CLIP] = clip.scores(output, chosen)
    if model:
        from refine.judging.judge import JudgeScorer
        from refine.judging.scores import fill

        with closing(JudgeScorer(model, args.judge_pixels)) as judge:
            for scores, output, chosen in zip(found, outputs, numbers):
                scores[JUDGE] = fill(output, judge, chosen)
    return found


def _judge(args: argparse.Namespace) -> "Model":
    slots = {"slots": args.judge_slots} if args.judge_slots else {}
    if args.judge_engine == "openai":
        from refine.engines.openai import Server

        return Server(args.judge_model, args.judge_url, **slots)
    if args.judge_url:
        args.parser.error("--judge-url is for --judge-engine openai")
    from refine.engines.vllm import Vllm

    return Vllm(args.judge_model, **slots)
