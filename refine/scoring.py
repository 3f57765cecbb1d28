"""The scorers that a command is told to use, and their options."""

import argparse
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from refine.arguments import positive

if TYPE_CHECKING:
    import numpy as np

    from refine.engines.lvlm import Model
    from refine.outputs import Output
    from refine.scores import Scores

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


class Scoring:
    """Those scorers, loaded when they are needed and kept for the next output.

    Args:
        args: parsed with the options of `add_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._held = args, ExitStack()
        self._clip = self._judge = None
        if args.clip:
            from refine.clip import Clip

            self._clip = Clip(args.clip, args.clip_python, args.clip_batch)
        if args.judge_model:
            from refine.judge import JudgeScorer

            scorer = JudgeScorer(_judge(args), args.judge_pixels)
            self._judge = self._held.enter_context(closing(scorer))

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def scores(self, output: "Output", numbers: "np.ndarray | None" = None) -> "dict[str, Scores]":
        """Scores what has no score yet.

        Args:
            output: whose records.
            numbers: which, int64 [n], ascending; None for all.

        Returns:
            by "clip" and "judge", as far as they were asked for.

        Raises:
            RefineError: a scorer can't be loaded or gave up; what it said until then is kept.
        """
        from refine.scores import fill

        found = {}
        if self._clip:
            found[CLIP] = self._clip.scores(output, numbers)
        if self._judge:
            found[JUDGE] = fill(output, self._judge, numbers)
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
