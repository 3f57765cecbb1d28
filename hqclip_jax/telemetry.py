"""What a run says of itself: metrics to files, progress to people."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from hqclip_jax.hardware import chip_of

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


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
    for noisy in ("orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Through it Orbax warns of a read-only directory whenever a checkpoint is only read.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return console


class MetricWriter:
    """Scalars to `metrics.jsonl` and to TensorBoard event files.

    Args:
        workdir: where both lie.
        step: the step that the run continues from. Lines of later steps, written by a run that was
            killed before its next checkpoint, are dropped: the file reads as if it had not been.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        path = workdir / METRICS_FILE
        if path.exists():
            kept = [row for row in read_metrics(workdir) if row["step"] <= step]
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`; a last line cut by a kill is left out."""
    rows = []
    for line in (Path(workdir) / METRICS_FILE).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a line cut short is left out", METRICS_FILE)
    return rows


class Stopwatch:
    """Adds up wall time by what it was spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def take(self, name: str) -> float:
        """Seconds spent on `name` since it was last taken."""
        return self.seconds.pop(name, 0.0)


def utilisation(flops: float, seconds: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Speed by formula: `tflops_per_chip`, model TFLOP/s of one chip; and `mfu`, their share of the
    published bf16 peak, where that is known (not for a CPU).

    Args:
        flops: model FLOPs of all devices together, as `cost.step_flops` counts them.
        seconds: that they took.
    """
    rate = flops / seconds / len(devices)
    chip = chip_of(devices[0])
    return {"tflops_per_chip": rate / 1e12} | ({"mfu": rate / chip.peak} if chip else {})


class ProgressLine:
    """A bar in a terminal; in a log file one line per report."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, line="compiling")
        self._total = total
        self._paced_from: tuple[int, float] | None = None

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        if self._paced_from is None:
            # The pace is that of the steps after the first one, which compiles.
            self._paced_from = (step, time.monotonic())
        self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows loss and speed; `metrics` holds `loss` and `images_per_s` at least."""
        line = f"loss {metrics['loss']:.4f}  {metrics['images_per_s']:,.0f} images/s"
        if "mfu" in metrics:
            line += f"  MFU {metrics['mfu']:.1%}"
        if not self._bar.disable:
            self._bar.update(self._task, line=line)
            return
        first, then = self._paced_from or (step, time.monotonic())
        pace = (time.monotonic() - then) / max(step - first, 1)
        eta = _clock(pace * (self._total - step))
        parts = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("loss/")
        )
        log.info("step %d/%d  %s  %s  ETA %s", step, self._total, line, parts, eta)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
