"""`python -m refine merge`: joins shares of one run, made apart, into one data set.

Every shard is read once more and compared with its hash, uids that two shares have are counted and
dropped, and the shares stay as they are.
"""

import argparse
import os
import shutil
from pathlib import Path

from refine.arguments import megabytes, positive
from refine.errors import RefineError
from refine.progress import console

EPILOG = """\
examples:
  python -m refine merge data/share-* --output data/refined
  python -m refine merge monday/ tuesday/ --output both/ --mixed   # other models, other prompts

A killed merge starts anew with the same command; nothing is asked for again.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser(
        "merge",
        help="join shares of a run, and verify them",
        description=__doc__.partition(": ")[2],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.set_defaults(command=_merge, parser=merge)
    merge.add_argument("outputs", nargs="+", type=Path, metavar="DIR", help="finished outputs")
    merge.add_argument("--output", required=True, type=Path, metavar="DIR", help="the data set")
    merge.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="processes; default: one a core"
    )
    merge.add_argument(
        "--shard-mb", type=megabytes, default=512.0, help="small shards are joined up to this; 512"
    )
    merge.add_argument("--partial", action="store_true", help="though shares are missing")
    merge.add_argument("--mixed", action="store_true", help="though they were made differently")


def _merge(args: argparse.Namespace) -> None:
    # The parser answers --help without the second that these imports take.
    from hqclip_jax.data.record import MANIFEST_FILE
    from refine.joining import SCRATCH, Share, check, merge, place
    from refine.manifest import show
    from refine.storage import locked

    shares = sorted(map(Share.load, args.outputs), key=place)
    check(shares, args.partial, args.mixed)
    output: Path = args.output
    if (output / MANIFEST_FILE).exists():
        raise RefineError(f"--output {output} is complete already: choose another")
    foreign = sorted(p.name for p in output.iterdir()) if output.exists() else []
    if foreign and SCRATCH not in foreign:
        raise RefineError(f"--output {output} holds other files ({foreign[0]}): choose another")
    (output / SCRATCH).mkdir(parents=True, exist_ok=True)
    with locked(output / SCRATCH / "lock", wait=False):
        for left in output.iterdir():
            if left.name != SCRATCH:  # of a merge that was killed
                left.unlink()
        counts = merge(shares, output, int(args.shard_mb * 1e6), args.workers)
    shutil.rmtree(output / SCRATCH)
    show(counts)
    console.print(f"{output}: {counts['joined']:,} records of {len(shares)} outputs, verified")
