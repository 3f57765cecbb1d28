"""What a run says of itself: metrics to files, progress to people.

    python -m hqclip_jax.telemetry plot runs/a runs/b

draws and compares runs.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler

from hqclip_jax.config import Config
from hqclip_jax.sinks import METRICS_FILE, json_line, open_sinks
from hqclip_jax.trackers import check_trackers

log = logging.getLogger(__name__)

KINDS = ("step", "data", "compile", "checkpoint", "evaluation", "setup", "lost")
"""What wall time is spent on."""


def setup_logging() -> Console:
    """One line per message: coloured in a terminal, plain with date and time in a log file."""
    console = Console(file=sys.stdout)
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        form = "%(message)s"
    else:
        handler = logging.StreamHandler(sys.stdout)
        form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=form, force=True)
    for noisy in ("orbax", "jax", "grain", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Through absl Orbax warns of a read-only directory whenever a checkpoint is only read; urllib3
    # and TensorBoard warn at every attempt and every nan.
    for noisy in ("absl", "urllib3", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return console


class MetricWriter:
    """Scalars to every sink of the run: see `hqclip_jax.sinks`.

    Args:
        workdir: where the files lie.
        step: the step that the run continues from. Rows of later steps, written by a run that was
            killed before its next checkpoint, move to `metrics.dropped.jsonl`: `metrics.jsonl`
            reads as if they had not been.
        config: names the trackers on the network, and goes there as the run's parameters.

    Attributes:
        dropped_until: the largest `seconds` of the rows moved away, 0.0 where there is none: wall
            time beyond that of the checkpoint is lost.

    Raises:
        ConfigError: a tracker's package or credential is missing; nothing has been touched then.
    """

    def __init__(self, workdir: Path, step: int, config: Config | None = None) -> None:
        if config:
            check_trackers(config.log)
        dropped = _drop_later(workdir, step)
        seconds = [row.get("seconds", 0.0) for row in dropped]
        self.dropped_until = max((s for s in seconds if math.isfinite(s)), default=0.0)
        self._sinks = open_sinks(workdir, step, bool(step or dropped), config)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Args:
        failed: whether an error ended the run, which the trackers then say of it.
        """
        # Side by side: each tracker may take its time, and a host that ends has little.
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda sink: sink.close(failed), self._sinks):
                pass


def _drop_later(workdir: Path, step: int) -> list[dict[str, float]]:
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    rows = read_metrics(workdir)
    dropped = [row for row in rows if row["step"] > step]
    if dropped:
        with path.with_suffix(".dropped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(map(json_line, dropped))
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json_line(row) for row in rows if row["step"] <= step))
    partial.replace(path)
    return dropped


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, null as nan; a line cut by a kill is left out.

    Every row has `step` and `time`, in seconds since 1970 (UTC); the first after a restart has
    `resumed_from`, the step of the checkpoint.
    """
    rows, cut = [], 0
    text = (Path(workdir) / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
            row["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            cut += 1
            continue
        rows.append({name: math.nan if v is None else v for name, v in row.items()})
    if cut:
        log.warning("%s: %d line(s) cut short left out", Path(workdir) / METRICS_FILE, cut)
    return rows


EXAMPLES = """examples:
  one run, into runs/a/curves.html and runs/a/curves.png:
    python -m hqclip_jax.telemetry plot runs/a
  three runs, by pictures seen, each value the mean of 20 reports:
    python -m hqclip_jax.telemetry plot runs/* --x samples --smooth 20 --out compare.html
  the losses and the speed alone:
    python -m hqclip_jax.telemetry plot runs/a runs/b --metrics 'loss*,images_per_s,mfu'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 drawn, 2 nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m hqclip_jax.telemetry")
    commands = parser.add_subparsers(required=True, metavar="plot")
    command = commands.add_parser(
        "plot",
        help="draws and compares runs",
        description="Draws and compares runs from their metrics.jsonl and config.json: curves, "
        "last values, where the time went, which fields of the configuration differ.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("workdir", nargs="+", help="a run's --workdir; differences are from the first")
    add("--out", metavar="FILE", help="ends in .html or .png; without it both are written into the "
        "first workdir, as curves.html and curves.png")  # fmt: skip
    add("--metrics", default="", metavar="GLOB,…", help="only metrics of these names")
    add("--x", choices=("step", "samples", "seconds"), default="step",
        help="horizontal axis; seconds are wall time over all starts")  # fmt: skip
    add("--smooth", type=int, default=1, metavar="N", help="average over N reports")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        command.error("--smooth: at least 1")

    from hqclip_jax.comparison import plot
    from hqclip_jax.runs import RunError

    globs = [glob.strip() for glob in args.metrics.split(",") if glob.strip()]
    try:
        for path in plot(args.workdir, args.out, globs, args.x, args.smooth):
            print(path)
    except RunError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
