"""What a run tells of its progress: where its time goes, how fast it is, what each report says."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import jax
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from hqclip_jax.config import Config
from hqclip_jax.data.pipeline import Pipeline
from hqclip_jax.data.record import REPLACED, DatasetError
from hqclip_jax.hardware import chip_of
from hqclip_jax.losses import Metrics
from hqclip_jax.telemetry import KINDS, MetricWriter

log = logging.getLogger(__name__)


class Goodput:
    """Adds up the wall time of a run by what it was spent on, over all its starts.

    `with goodput("data"):` attributes the time inside; of nested ones the inner counts. What is in
    none is "setup" until the first `with goodput("compile"):` has ended, and "step" from then on.
    For the main thread alone.

    Args:
        carried: `seconds` as the checkpoint has them.
        lost: seconds between that checkpoint and the kill: work that is done again.
        clock: seconds that only grow.
        since: its reading at the start; now by default.
    """

    def __init__(
        self,
        carried: Mapping[str, float] | None = None,
        lost: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        since: float | None = None,
    ) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0) | dict(carried or {})
        self._seconds["lost"] += lost
        self._clock, self._since = clock, clock() if since is None else since
        self._spent_on = ["setup"]

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of: {', '.join(KINDS)}")
        self._charge()
        self._spent_on.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._spent_on.pop()
            if kind == "compile":
                self._spent_on[0] = "step"

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._spent_on[-1]] += now - self._since
        self._since = now

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by kind, up to now."""
        self._charge()
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """`seconds`, the whole wall time, and `time/KIND`, its parts."""
        parts = self.seconds
        return {"seconds": sum(parts.values())} | {f"time/{k}": s for k, s in parts.items()}

    def line(self) -> str:
        """Shares of the wall time, those above 0.05%."""
        seconds = self.seconds
        whole = sum(seconds.values()) or 1.0
        shares = {kind: s / whole for kind, s in seconds.items()}
        told = [f"{kind} {share:.1%}" for kind, share in shares.items() if share > 0.0005]
        parts = ", ".join(told) or "nothing yet"
        return f"goodput {shares['step']:.1%}: {parts}".replace(": step ", ": steps ")


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


class _LineColumn(ProgressColumn):
    """The report. In a terminal too narrow its end goes, while counts and time stay."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["line"], no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """A bar in a terminal; in a log file one line per report."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._bar = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=8),
            _LineColumn(),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
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
        """Shows loss and speed, and what is amiss; `metrics` holds `loss` at least."""
        line = f"loss {metrics['loss']:.4f}"
        if "images_per_s" in metrics:
            line += f"  {metrics['images_per_s']:,.0f} images/s"
        if "mfu" in metrics:
            line += f"  MFU {metrics['mfu']:.1%}"
        if metrics.get("seconds") and "time/step" in metrics:
            line += f"  goodput {metrics['time/step'] / metrics['seconds']:.0%}"
        if metrics.get("data_wait", 0) > 0.05:
            line += f"  waits for data {metrics['data_wait']:.0%}"
        if metrics.get("replaced", 0) > 0:
            line += f"  replaced {metrics['replaced']:,.0f}"
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


@dataclass
class Report:
    """Collects what one report says. The metrics are fetched after the next step is under way, so
    that the device never waits for the host."""

    config: Config
    pipeline: Pipeline
    start: int
    replaced_before: int  # records, by starts before
    lr: optax.Schedule
    flops: float  # of one step
    goodput: Goodput
    progress: ProgressLine
    writer: MetricWriter | None
    replaced_log: Path
    due: tuple[int, Metrics] | None = None
    last: dict[str, float] = field(default_factory=dict)
    _since: tuple[int, float, float] | None = None  # step, and what `_clock` said then

    def begin(self, step: int) -> None:
        """The first interval begins once the first step, which compiles, is done."""
        self._since = (step, *self._clock())

    def flush(self) -> None:
        """Writes the metrics that are due, if any.

        Raises:
            DatasetError: more records than `data.max_replaced` could not be read.
        """
        if self.due is None:
            return
        (step, fetched), self.due = self.due, None
        fetched = jax.device_get({k: v for k, v in fetched.items() if k != "control"})
        metrics = {name: float(value) for name, value in fetched.items()}
        seconds, waited = self._clock()
        since, began, waited_before = self._since
        self._since = (step, seconds, waited)
        metrics |= {
            "lr": float(self.lr(step - 1 - metrics["skipped"])),  # a skipped update takes no step
            "samples": step * self.config.optim.batch,
            "replaced": sum(metrics[f"replaced/{reason}"] for reason in REPLACED),
        }
        if step > since:
            elapsed = max(seconds - began, 1e-9)
            rate = (step - since) * self.config.optim.batch / elapsed
            metrics |= {"images_per_s": rate, "images_per_s_per_chip": rate / jax.device_count()}
            metrics["data_wait"] = (waited - waited_before) / elapsed
            metrics |= utilisation((step - since) * self.flops, elapsed, jax.devices())
        for name, consumed in self.pipeline.position(step - self.start).items():
            metrics[f"samples/{name}"] = consumed
            if name in self.pipeline.records:
                metrics[f"epoch/{name}"] = consumed / self.pipeline.records[name]
        self.last = metrics | self.goodput.metrics()
        if self.writer:
            self.writer.write(step, self.last)
            self.progress.report(step, self.last)
        self._check_replaced(step, metrics["replaced"])

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes an evaluation's."""
        if self.writer:
            seconds = sum(self.goodput.seconds.values())
            at = {"samples": step * self.config.optim.batch, "seconds": seconds}
            self.writer.write(step, scores | at)

    def _clock(self) -> tuple[float, float]:
        """Seconds that training took, and those of them that it waited for data."""
        spent = self.goodput.seconds
        return sum(spent.values()) - spent["evaluation"], spent["data"]

    def _check_replaced(self, step: int, replaced: float) -> None:
        # Equal on all hosts, which therefore stop together.
        since = (step - self.start) * self.config.optim.batch
        found = int(replaced) - self.replaced_before
        if found > max(10, self.config.data.max_replaced * since):
            logs = self.replaced_log.with_name("replaced-*.jsonl")  # one a host
            named = "this host could read all of its own"
            if self.replaced_log.exists():
                lines = self.replaced_log.read_text(errors="replace").splitlines()
                named = "the last here:\n" + "\n".join(lines[-20:])
            raise DatasetError(
                f"{found} of {since} records could not be read, more than data.max_replaced="
                f"{self.config.data.max_replaced}. {logs} name them; {named}"
            )
