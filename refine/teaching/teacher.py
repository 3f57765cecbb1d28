"""`python -m refine teach`: draw a sample of pairs and have a strong model annotate it.

The sample is what `python -m refine sft` then fine-tunes a smaller model on.
"""

import argparse
import os
from pathlib import Path

from refine.arguments import positive

ANNOTATED = "annotated"
EPILOG = """\
examples:
  # a hosted teacher; the key comes from OPENAI_API_KEY alone
  python -m refine teach --input 's3://bucket/dfn/*.tar' --output teacher/ --model gpt-4o \\
      --price-in 2.5 --price-out 10 --max-cost 100 --requests-per-minute 500

  # a large model of one's own behind `vllm serve`
  python -m refine teach --input pairs/ --output teacher/ --samples 2000 \\
      --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct --slots 64

OUTPUT/pairs/ has the sample as tars, in random order; OUTPUT/sample.json says how many of which
kind there were and were drawn; OUTPUT/annotated/ is an ordinary data set. The same command goes on
where a killed one stopped: nothing is drawn twice, no answer is asked for twice. At --max-cost it
stops, and goes on with a higher one. A killed run can't count requests that were under way, which
the server may bill.
"""
OPTIONS = (
    ("--base-url", str, "such as http://localhost:8000/v1; default: OPENAI_BASE_URL, or OpenAI"),
    ("--prompt", str, "teacher-v1, student-v1 or a file; default: teacher-v1"),
    ("--max-pixels", positive, "pictures are shrunk to so many before they are sent"),
    ("--slots", positive, "requests at a time"),
    ("--temperature", float, "default: 0, the likeliest token"),
    ("--max-tokens", positive, "of an answer"),
    ("--retries", int, "of an answer that does not pass, warmer each"),
    ("--requests-per-minute", positive, "at most"),
    ("--tokens-per-minute", positive, "of questions and answers, at most"),
    ("--timeout", float, "seconds for one request"),
    ("--patience", float, "seconds that the server may be away"),
    ("--price-in", float, "dollars for a million tokens of prompts"),
    ("--price-out", float, "dollars for a million tokens of answers"),
    ("--max-cost", float, "dollars; the run stops before them"),
)
"""What `python -m refine run --engine openai` takes too; only the prompt's default is another."""


def add_command(commands: argparse._SubParsersAction) -> None:
    teach = commands.add_parser(
        "teach",
        help="have a strong model annotate a sample",
        description=__doc__.partition(": ")[2],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    teach.set_defaults(command=_teach, parser=teach)
    teach.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILES",
        help="tars, Parquet files or folders of pairs: names, globs, gs:// or s3://",
    )
    teach.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    teach.add_argument(
        "--samples",
        type=positive,
        default=10_000,
        metavar="N",
        help="default: 10,000, as published",
    )
    teach.add_argument(
        "--seed", type=int, default=0, help="of the sample and of the model's draws; default: 0"
    )
    teach.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core"
    )
    model = teach.add_argument_group(
        "the model", "Behind any OpenAI-compatible server; the key is read from OPENAI_API_KEY."
    )
    model.add_argument("--model", required=True, help="its name on the server")
    for option, kind, text in OPTIONS:
        model.add_argument(option, type=kind, help=text)
    model.add_argument(
        "--structured", action="store_true", help="hold the model to the JSON schema of the answer"
    )


def _teach(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    from refine.engines.openai import Server
    from refine.inputs.find import find
    from refine.prompts import load_prompt
    from refine.teaching.drawing import draw

    # What is wrong is said before the inputs are read for hours.
    load_prompt(args.prompt or "teacher-v1")
    prices = {"price_in": args.price_in or 0.0, "price_out": args.price_out or 0.0}
    Server(args.model, args.base_url, max_cost=args.max_cost, **prices)
    pairs = draw(find(args.input), args.output, args.samples, args.seed, args.workers)
    _run(run_arguments(args, pairs))


def run_arguments(args: argparse.Namespace, pairs: Path) -> list[str]:
    """The command line of the run that annotates a sample.

    Args:
        args: of `teach`.
        pairs: the sample's folder.
    """
    run = [
        "run", "--engine", "openai", "--input", str(pairs), "--output",
        str(args.output / ANNOTATED), "--model", args.model, "--seed", str(args.seed),
        "--workers", str(args.workers),
    ]  # fmt: skip
    chosen = {"prompt": "teacher-v1"} | {k: v for k, v in vars(args).items() if v is not None}
    for option, _, _ in OPTIONS:
        value = chosen.get(option[2:].replace("-", "_"))
        if value is not None:
            run += [option, str(value)]
    return run + (["--structured"] if args.structured else [])


def _run(arguments: list[str]) -> None:
    from refine import command

    parser = argparse.ArgumentParser("python -m refine")
    command.add_command(parser.add_subparsers())
    args = parser.parse_args(arguments)
    args.command(args)
