"""python -m refine: from raw image-text pairs to a data set that trains."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from refine.arguments import identifier, megabytes, positive
from refine.errors import RefineError
from refine.progress import console

RUN_EPILOG = """\
examples:
  # join the published VLM-150M annotations to the images of DFN, by uid
  python -m refine run --engine annotations --input 'dfn/*.tar' --annotations vlm-150m/ \\
      --annotator vlm-150m --uids dfn_large.npy --output data/dfn-vlm150m --workers 64

  # a baseline from the alt-text alone; never looks at the pictures
  python -m refine run --engine rules --input pairs/ --output data/rules

  # try it on the first 1,000 pairs
  python -m refine run --engine rules --input pairs/ --output /tmp/try --limit 1000

A killed run goes on with the same command. Tars hold KEY.jpg (png, webp), KEY.txt and KEY.json
with a `uid`, as img2dataset and DataComp write them; annotation tars hold NNNNNN/<uid>.json with
`tags`, `neg_tags`, `desc` and `neg_desc`. What did not become a record is counted in manifest.json
and named in skipped.jsonl, up to a million of each reason; what --uids leaves out is only counted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for an error told, 130 for an interrupt."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (RefineError, OSError) as e:
        console.print(f"error: {e}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m refine", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="refine tars of pairs into a data set",
        description="Refines tars of image-text pairs into ArrayRecord shards for TFDS and Grain.",
        epilog=RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run, parser=run)
    run.add_argument(
        "--engine",
        required=True,
        choices=("annotations", "rules"),
        help="annotations: published texts, joined by uid. rules: texts made from the alt-text by "
        "word lists; it never looks at the picture",
    )
    run.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="TARS",
        help="tars of pairs: files, globs or directories; of two records with one uid the first "
        "stays, in this order",
    )
    run.add_argument("--output", required=True, type=Path, metavar="DIR", help="the data set")
    run.add_argument("--uids", type=Path, metavar="FILE.npy", help="keep only these uids")
    run.add_argument("--name", default="refined", type=identifier, help="default: refined")
    run.add_argument("--split", default="train", type=identifier, help="default: train")
    run.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core"
    )
    run.add_argument(
        "--shard-mb",
        type=megabytes,
        default=512.0,
        help="megabytes in a shard, about: an input tar that yields more gives several, small ones "
        "share one; default: 512",
    )
    run.add_argument("--limit", type=positive, metavar="N", help="read only the first N pairs")
    run.add_argument(
        "--max-pixels",
        type=positive,
        default=89_478_485,
        help="larger images are skipped before they are decoded; default: 89,478,485",
    )
    joined = run.add_argument_group("engine annotations")
    joined.add_argument(
        "--annotations", nargs="+", metavar="TARS", help="files, globs, directories"
    )
    joined.add_argument(
        "--annotator", help="which model wrote them, kept in every record; default: -"
    )
    joined.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="keep the index over the annotations here, for other runs; default: inside the "
        "output, removed at the end",
    )


def _run(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    from refine.runner import INDEX, Run, run
    from refine.tars import expand

    if args.engine == "annotations":
        from refine.engines.annotations import Annotations

        if not args.annotations:
            args.parser.error("--engine annotations needs --annotations TARS")
        engine = Annotations(
            tars=tuple(expand(args.annotations, "--annotations")),
            index=args.index or args.output / INDEX,
            annotator=args.annotator or "-",
        )
    else:
        from refine.engines.rules import Rules

        for option in ("annotations", "annotator", "index"):
            if getattr(args, option):
                args.parser.error(f"--{option} is not for --engine rules")
        engine = Rules()
    if args.uids and not args.uids.exists():
        raise RefineError(f"--uids {args.uids}: no such file")
    asked = Run(
        inputs=tuple(expand(args.input, "--input")),
        output=args.output,
        engine=engine,
        uids=args.uids,
        name=args.name,
        split=args.split,
        shard_mb=args.shard_mb,
        limit=args.limit,
        max_pixels=args.max_pixels,
        workers=args.workers,
    )
    run(asked)


if __name__ == "__main__":
    sys.exit(main())
