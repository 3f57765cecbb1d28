"""python -m refine: from raw image-text pairs to a data set that trains."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from refine.errors import RefineError
from refine.progress import console

COMMANDS = (
    "command",
    "merge",
    "teaching.teacher",
    "teaching.sft",
    "judging.compare",
    "judging.filter",
    "judging.gallery",
)
"""Modules that add a command each, in the order of the help."""


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
    for name in COMMANDS:
        import_module(f"refine.{name}").add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
