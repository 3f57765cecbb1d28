"""python -m refine filter: the records of an output that scores speak for, as a new data set."""

import argparse
import math
import os
from pathlib import Path

from refine.arguments import megabytes, positive
from refine.judging import scoring

EPILOG = """\
examples:
  # the best four fifths by our own model: it chooses what the next one learns from
  python -m refine filter data/refined --output data/round-2 --clip runs/large --keep-top 0.8

  # negatives that fit the picture as well as the description does are no negatives: drop them alone
  python -m refine filter data/refined --output data/clean --clip runs/large --min-margin 2

  # records whose description a judge rates 7 or more, and whose negative it rates 3 or less
  python -m refine filter data/refined --output data/clean --judge-engine openai \\
      --judge-model gpt-4o --min-judge 7 --max-negative-judge 3 --bad-negative record

CLIP scores are 100 times the cosine of picture and text. All records are scored first, but none
twice: `python -m hqclip_jax.score --shard` does it on many machines. A killed run goes on with the
same command. What was dropped is counted in manifest.json and named in skipped.jsonl.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `filter`."""
    parser = commands.add_parser(
        "filter",
        help="keep the records of an output that score well",
        description="Writes what passes rules on its scores, of one data set, as another.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_filter, parser=parser)
    add = parser.add_argument
    add("data", type=Path, metavar="OUT", help="a data set that `python -m refine run` wrote")
    add("--output", required=True, type=Path, metavar="NEW", help="the new data set")
    add("--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core")
    add("--shard-mb", type=megabytes, default=512.0, help="megabytes in a shard, about; 512")
    rules = parser.add_argument_group("rules", "A record stays if it passes all that are given.")
    add = rules.add_argument
    add("--min-clip", type=_number, metavar="X", help="least CLIP score of the description")
    add(
        "--keep-top",
        type=_share,
        metavar="SHARE",
        help="of the records that have one, those with the highest CLIP score of the description",
    )
    add(
        "--min-margin",
        type=_number,
        metavar="X",
        help="how far the CLIP score of a positive must be above its negative's",
    )
    add("--min-judge", type=_number, metavar="X", help="least rating of the description")
    add("--max-negative-judge", type=_number, metavar="X", help="highest of its negative")
    add(
        "--bad-negative",
        choices=("negative", "record"),
        default="negative",
        help="what goes where a negative fails --min-margin or --max-negative-judge: it alone "
        "(descriptions and tags each on their own), or, if it is the description's, the record; "
        "default: negative",
    )
    scoring.add_arguments(parser)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no number to compare with")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number above 0, up to 1")
    return value


def _filter(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    from refine.judging.outputs import Output
    from refine.judging.sieve import Rules, Sieve, sift

    rules = Rules(
        min_clip=args.min_clip,
        keep_top=args.keep_top,
        min_margin=args.min_margin,
        min_judge=args.min_judge,
        max_negative_judge=args.max_negative_judge,
        drop_record=args.bad_negative == "record",
    )
    if not (rules.by_clip or rules.by_judge):
        args.parser.error("give a rule: --min-clip, --keep-top, --min-margin, --min-judge ...")
    if rules.by_clip and not args.clip:
        args.parser.error("--min-clip, --keep-top and --min-margin need --clip DIR")
    if rules.by_judge and not args.judge_model:
        args.parser.error("--min-judge and --max-negative-judge need --judge-model MODEL")
    output = Output.open(args.data)
    (scores,) = scoring.score(args, [output], [None])
    about = {kind: found.about for kind, found in scores.items()}
    sift(Sieve(output, args.output, rules, about, args.shard_mb, args.workers))
