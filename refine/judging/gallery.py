"""python -m refine gallery: some records of an output, and what it rejected, on one HTML page."""

import argparse
from pathlib import Path

from refine.arguments import positive
from refine.progress import console

EPILOG = """\
examples:
  python -m refine gallery data/refined
  python -m refine gallery data/refined -n 200 --seed 1 --out look.html

  # with the pictures of what went to quarantine, from what was refined
  python -m refine gallery data/refined --input 'dfn/*.tar'

The page holds all that it shows: pictures are made small and encoded anew, nothing is fetched, no
script runs. The same --seed shows the same records.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `gallery`."""
    parser = commands.add_parser(
        "gallery",
        help="an HTML page of some records and of what was rejected",
        description="Writes one HTML page: pictures with their texts, where each negative differs "
        "from its positive, and what went to quarantine and why.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=gallery, parser=parser)
    add = parser.add_argument
    add("data", type=Path, metavar="OUT", help="a data set that `python -m refine run` wrote")
    add("-n", type=positive, default=50, metavar="N", help="records to show; default: 50")
    add("--out", type=Path, metavar="FILE.html", help="default: gallery.html in OUT")
    add("--seed", type=int, default=0, help="which ones; default: 0")
    add(
        "--quarantined",
        type=positive,
        default=20,
        metavar="N",
        help="rejected pairs to show; default: 20",
    )
    add(
        "--input",
        nargs="+",
        metavar="FILES",
        help="what was refined, as given to `run`: for the pictures of rejected pairs, which OUT "
        "does not hold",
    )


def gallery(args: argparse.Namespace) -> Path:
    """Writes the page; returns where it lies.

    Raises:
        RefineError: no finished data set, or a record or input that can't be read.
    """
    # The parser answers --help without the second that these imports take.
    from hqclip_jax.report import write
    from refine.inputs.find import find
    from refine.judging.gallery_page import document
    from refine.judging.outputs import Output
    from refine.judging.specimens import draw_records, draw_rejected, find_pictures

    output = Output.open(args.data)
    records = draw_records(output, args.n, args.seed)
    rejected = draw_rejected(output, args.quarantined, args.seed)
    pictures = {}
    if args.input:
        wanted = ((pair.source, pair.key) for pair in rejected)
        pictures = find_pictures(wanted, find(args.input))
    page = document(output, records, rejected, pictures)
    written = write(args.out or args.data / "gallery.html", page)
    console.print(
        f"{written}: {len(records):,} of {len(output):,} records, {len(rejected):,} of "
        f"{sum(output.quarantined.values()):,} quarantined; open it in a browser",
        soft_wrap=True,
        markup=False,
    )
    return written
