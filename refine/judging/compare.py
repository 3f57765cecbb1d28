"""python -m refine compare: which refinement is better, and what does it cost?"""

import argparse
import os
from pathlib import Path

from refine.arguments import positive
from refine.errors import RefineError
from refine.judging import scoring

EPILOG = """\
examples:
  # texts alone: lengths, variety, tags, validity, what was spent
  python -m refine compare data/qwen data/internvl --out runs/compare

  # the paper's two measures on 2,000 pictures that both have
  python -m refine compare data/qwen data/internvl --out runs/compare --limit 2000 \\
      --clip runs/large --judge-engine openai --judge-model gpt-4o

  # what it costs: dollars for a million tokens of prompts and answers, or for a GPU's hour
  python -m refine compare data/teacher data/student --out runs/compare \\
      --token-price teacher=2.5:10 --gpu-price student=1.8

Scores are kept beside each output, in OUT/scores: a second comparison, and `python -m refine
filter`, ask for none of them again. Where a checkpoint of ours needs another environment than the
judge, run `python -m hqclip_jax.score` there first, or name it with --clip-python.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `compare`."""
    parser = commands.add_parser(
        "compare",
        help="measure outputs against each other on the same pictures",
        description="Measures outputs on the pictures that all of them have: CLIP and judge scores "
        "of alt-text, description and negative, lengths, variety, tags, validity and cost. Writes "
        "compare.json, compare.csv and compare.html.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_compare, parser=parser)
    add = parser.add_argument
    add(
        "data",
        nargs="+",
        type=Path,
        metavar="OUT",
        help="data sets that `python -m refine run` wrote; differences are to the first",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="where the report goes")
    add("--limit", type=positive, default=1000, metavar="N", help="pictures; default: 1000")
    add("--seed", type=int, default=0, help="which ones; default: 0")
    add("--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core")
    scoring.add_arguments(parser)
    cost = parser.add_argument_group("cost", "NAME is the name of an OUT's folder; without it: all")
    cost.add_argument(
        "--token-price",
        action="append",
        type=_token_price,
        default=[],
        metavar="[NAME=]IN:OUT",
        help="dollars for a million tokens of prompts, and of answers",
    )
    cost.add_argument(
        "--gpu-price",
        action="append",
        type=_gpu_price,
        default=[],
        metavar="[NAME=]USD",
        help="dollars for an hour of what one engine runs on",
    )


def _token_price(text: str) -> tuple[str, tuple[float, float]]:
    name, _, prices = text.rpartition("=")
    taken, colon, said = prices.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not [NAME=]IN:OUT, such as 2.5:10")
    return name, (_dollars(taken), _dollars(said))


def _gpu_price(text: str) -> tuple[str, float]:
    name, _, price = text.rpartition("=")
    return name, _dollars(price)


def _dollars(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price in dollars")
    return value


def _compare(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    try:
        import matplotlib  # noqa: F401 (only to say so before anything is scored)
    except ImportError as e:
        raise RefineError("compare draws with matplotlib: pip install 'matplotlib>=3.9,<4'") from e
    from refine.judging.compare_report import show, write_report
    from refine.judging.comparison import Prices, compare, label
    from refine.judging.outputs import Output
    from refine.progress import console

    outputs = [Output.open(directory) for directory in args.data]
    labels = label(args.data)
    prices = Prices.of(labels, args.token_price, args.gpu_price)
    comparison = compare(outputs, labels, prices, args)
    show(comparison)
    page = write_report(comparison, args.out)
    console.print(f"{page}: open it in a browser", soft_wrap=True, markup=False)
