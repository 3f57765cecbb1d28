"""A folder of pictures, searched by text or by picture: `python -m hqclip_jax.search`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hqclip_jax.checkpoint import WEIGHTS, CheckpointError
from hqclip_jax.config import ConfigError
from hqclip_jax.evals.embed import EmbeddingError
from hqclip_jax.index.build import build, hint
from hqclip_jax.index.duplicates import duplicates
from hqclip_jax.index.folder import printable
from hqclip_jax.index.store import SKIPPED, Index, SearchError
from hqclip_jax.telemetry import setup_logging

if TYPE_CHECKING:
    from hqclip_jax.index.page import Result

log = logging.getLogger("hqclip_jax.search")

EXAMPLES = """
examples
  python -m hqclip_jax.search build --checkpoint=runs/demo --images=photos
  python -m hqclip_jax.search query runs/search/photos "a red cup on a table"
  python -m hqclip_jax.search query runs/search/photos "a beach" "a forest" --not people -n 50
  python -m hqclip_jax.search query runs/search/photos --image cup.jpg --out like-this-cup.html
  python -m hqclip_jax.search duplicates runs/search/photos

exit status: 0 done, 2 nothing was done, with the reason
"""
BUILD = """
What is indexed: .jpg .png .webp .gif .bmp .tiff .avif, and those in .tar files, in the folder and
all below it; not what begins with a dot, and not behind links to folders. Pictures that can't be
read are named, counted and left out.

Run it again whenever the folder has changed: only what is new or changed (by size and time of
change) is embedded, and what is gone is dropped. It may be killed at any moment; the same command
goes on where it was. From 200,000 pictures on, `pip install faiss-cpu` makes queries faster.

  python -m hqclip_jax.search build --checkpoint=runs/demo --images=photos
  python -m hqclip_jax.search build --checkpoint=runs/large --images=/data/photos --index=/data/ix
"""
QUERY = """
Prints the nearest pictures of each query, and writes them as one page that needs nothing else: it
shows small pictures, and a click opens the file. Similarities are cosines. They compare pictures of
one query; a text's are far below a picture's.

  python -m hqclip_jax.search query runs/search/photos "a red cup on a table"
  python -m hqclip_jax.search query runs/search/photos "a beach" "a forest" --not people
  python -m hqclip_jax.search query runs/search/photos --image cup.jpg --image tea.png --out x.html

The model is the one that the index was built with, which is restored from its checkpoint.
"""
DUPLICATES = """
Lists groups of pictures that the index's model can hardly tell apart: copies, other sizes and
formats, shots of one moment. Needs no checkpoint. Small or little trained models find many pictures
alike that are not: raise --above for them.
"""


def run_build(args: argparse.Namespace, console: Console) -> None:
    """Brings an index up to date with a folder."""
    images = Path(args.images)
    if not images.is_dir():
        raise SearchError(f"--images={printable(args.images)} is no folder: name the one in which "
                          "the pictures lie")  # fmt: skip
    from hqclip_jax.index.model import SearchModel

    index = Path(args.index or Path("runs/search") / images.absolute().name)
    model = SearchModel.restore(args.checkpoint, args.step, args.weights, args.batch)
    about = build(index, images, model, console)
    left_out = ", ".join(f"{count:,} × {reason}" for reason, count in about.skipped.items())
    log.info("%s: %d pictures by %s", printable(str(index)), about.count, about.model)
    if left_out:
        log.info("left out: %s; named in %s", left_out, printable(str(index / SKIPPED)))
    if about.others:
        log.info("%d other files were passed over", about.others)
    if told := hint(about):
        log.info("%s", told)


def run_query(args: argparse.Namespace, console: Console) -> None:
    """Prints and writes the nearest pictures of each query."""
    if not args.text and not args.image:
        raise SearchError("nothing to search for: give a text, or --image FILE")
    index = Index.open(args.index)
    from hqclip_jax.index.model import SearchModel, check_text
    from hqclip_jax.index.page import Hit, Result

    for text in (*args.text, *args.negative):
        check_text(text)
    stored = index.about.model
    checkpoint = args.checkpoint or stored.checkpoint
    try:
        batch = max(len(args.text), 1)
        model = SearchModel.restore(checkpoint, stored.step, stored.weights, batch)
    except CheckpointError as e:
        raise SearchError(f"the index is by {stored}. {e}; if that run was moved, name its new "
                          "place with --checkpoint") from e  # fmt: skip
    if model.about.digest != stored.digest:
        raise SearchError(f"the index is by {stored}, and {model.about} is another model: search "
                          "with the index's, or build one with the other")  # fmt: skip
    for text in model.cut([*args.text, *args.negative]):
        log.warning("the model sees only the beginning of %r", text)
    images = [Path(image) for image in args.image]
    z_qxD = model.queries(args.text, images, args.negative)
    without = f"without {', '.join(args.negative)}" if args.negative else ""
    asked = [(text, b"") for text in args.text] + [(p.name, p.read_bytes()) for p in images]
    similarity_qxk, row_qxk = index.nearest(z_qxD, args.n)
    results = [
        Result(
            title,
            [Hit(float(s), index.picture(r)) for s, r in zip(similarities, rows)],
            image,
            without,
        )
        for (title, image), similarities, rows in zip(asked, similarity_qxk, row_qxk)
    ]
    lead = f"The nearest of {len(index):,} pictures in {index.images}, by {stored}."
    _show(results, f"Search in {index.images.name}", lead, index, args, console)


def run_duplicates(args: argparse.Namespace, console: Console) -> None:
    """Prints and writes groups of pictures that look the same."""
    index = Index.open(args.index)
    from hqclip_jax.index.page import Hit, Result

    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("comparing", total=len(index))
        groups = duplicates(index, args.above, lambda n: progress.advance(bar, n))
    results = [
        Result(f"{len(group)} pictures", [Hit(cosine, index.picture(row)) for row, cosine in group])
        for group in groups[: args.n]
    ]
    lead = (
        f"{len(groups):,} groups with cosines of {args.above} and more among {len(index):,} "
        f"pictures in {index.images}, by {index.about.model}"
        + (f"; the {args.n} largest are shown." if len(groups) > args.n else ".")
    )
    _show(results, f"Near-identical pictures in {index.images.name}", lead, index, args, console)


def _show(
    results: Sequence["Result"],
    title: str,
    lead: str,
    index: Index,
    args: argparse.Namespace,
    console: Console,
) -> None:
    from hqclip_jax.index.page import document
    from hqclip_jax.report import write

    console.print(escape(printable(lead)), highlight=False)
    for result in results:
        console.print(results_table(result))
    out = Path(args.out or Path(args.index) / f"{args.command}.html")
    written = write(out, document(title, lead, index.images, results, out))
    console.print(f"written to {escape(printable(str(written)))}: open it in a browser",
                  soft_wrap=True, highlight=False)  # fmt: skip


def results_table(result: "Result") -> Table:
    """Rank, similarity and path of each hit."""
    table = Table(title=escape(printable(result.title)), title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("similarity", justify="right")
    table.add_column("picture", overflow="fold")
    for rank, hit in enumerate(result.hits, 1):
        name = escape(printable(hit.picture.name))
        table.add_row(str(rank), f"{hit.similarity:.3f}", name)
    return table


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m hqclip_jax.search",
        description="Searches a folder of pictures by text or by picture, with a checkpoint that "
        "training wrote.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    add = command("build", "indexes a folder, or brings its index up to date", BUILD).add_argument
    add("--checkpoint", required=True, help="folder that training wrote")
    add("--images", required=True, metavar="DIR", help="folder of pictures and tars of pictures")
    add("--index", metavar="DIR", help="where the index lies [runs/search/NAME of the folder]")
    add("--step", type=int, help="step of the checkpoint [the latest]")
    add("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="[%(default)s]")
    add("--batch", type=_positive, default=256, help="pictures a step [256]")

    add = command("query", "finds pictures by text or by picture", QUERY).add_argument
    add("index", metavar="INDEX", help="folder that `build` wrote")
    add("text", nargs="*", metavar="TEXT", help="what to search for; each text is a query")
    add(
        "--image", action="append", default=[], metavar="FILE",
        help="a picture to search for; may be given again",
    )  # fmt: skip
    add(
        "--not", dest="negative", action="append", default=[], metavar="TEXT",
        help="what should not be seen, taken off every query by half; may be given again",
    )  # fmt: skip
    add("-n", type=_positive, default=24, help="pictures per query [24]")
    add("--out", metavar="FILE.html", help="the page [query.html in INDEX]")
    add("--checkpoint", help="where the index's model lies now [where it was]")

    add = command("duplicates", "lists near-identical pictures", DUPLICATES).add_argument
    add("index", metavar="INDEX", help="folder that `build` wrote")
    add("--above", type=float, default=0.97, metavar="COSINE", help="least cosine [%(default)s]")
    add("-n", type=_positive, default=50, help="groups to show [50]")
    add("--out", metavar="FILE.html", help="the page [duplicates.html in INDEX]")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if args.command == "query" and not any(text.startswith("-") for text in more):
        args.text += more  # argparse takes no more texts after the first option
    elif more:
        parser.error(f"unknown: {' '.join(more)}; see `{args.command} --help`")
    return args


RUN = {"build": run_build, "query": run_query, "duplicates": run_duplicates}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error told."""
    args = _arguments(argv)
    console = setup_logging()
    try:
        RUN[args.command](args, console)
    except (SearchError, CheckpointError, ConfigError, EmbeddingError, OSError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
