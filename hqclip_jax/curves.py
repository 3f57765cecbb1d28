"""Curves of runs, a colour each: which metrics belong together, and how each is drawn."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hqclip_jax.runs import AXES, Run, RunError
from hqclip_jax.telemetry import KINDS

COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c2330", "#8a6d3b",
)  # fmt: skip
"""Of the runs, in order; after the last one they come again with dashes."""

KIND_COLORS = dict(zip(KINDS, (
    "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#0072b2", "#9aa3b2", "#d55e00",
)))  # fmt: skip

STYLE = {
    "font.size": 10, "text.parse_math": False, "text.color": "#1c2330",
    "axes.labelcolor": "#1c2330", "axes.edgecolor": "#8a93a3", "axes.titlesize": 10,
    "xtick.color": "#5b6575", "ytick.color": "#5b6575", "xtick.labelsize": 9,
    "ytick.labelsize": 9, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Metrics that people look at together.

    Attributes:
        title: of the group.
        patterns: globs of metric names, in the order shown.
        log: draw on a log scale where the values spread far.
        smooth: whether smoothing says anything; counts are no noise.
        zero: the axis begins at 0.
    """

    title: str
    patterns: tuple[str, ...]
    log: bool = False
    smooth: bool = True
    zero: bool = False


GROUPS = (
    Group("Loss", ("loss", "loss/*"), log=True),
    Group("Evaluation", ("eval/*",), smooth=False),
    Group("Accuracy", ("accuracy", "hni_accuracy", "tag_recall", "*accuracy*")),
    Group("Gradient norms", ("grad_norm", "grad_norm/*"), log=True),
    Group(
        "Optimizer",
        ("lr", "logit_scale", "*logit_scale", "logit_bias", "skipped", "streak"),
        smooth=False,
        zero=True,
    ),
    Group("Speed", ("images_per_s*", "*_per_chip", "mfu", "data_wait"), zero=True),
    Group(
        "Data", ("text_cut*", "neg_share", "replaced*", "epoch*", "samples*"), False, False, True
    ),
    Group("Wall time", ("goodput", "seconds", "time/*"), smooth=False, zero=True),
    Group("Other", ("*",)),
)

MEANINGS = {
    "loss": "weighted sum of its parts",
    "accuracy": "pictures that find their own text in the batch",
    "hni_accuracy": "pictures nearer to their text than to its negative",
    "tag_recall": "tags among the first guesses",
    "data_wait": "share of time that steps wait for data",
    "mfu": "share of the chip's published peak",
    "text_cut": "share of texts that are cut",
    "neg_share": "share of pictures with a usable negative",
    "replaced": "records that could not be read",
    "skipped": "updates left out",
    "goodput": "share of wall time spent on steps",
}

SPREAD = 20  # largest by smallest value, from which on a log scale helps


@dataclass(frozen=True)
class View:
    """What is shown of which runs.

    Attributes:
        runs: at least one of them has rows.
        metrics: globs of names; empty takes all.
        x: horizontal axis, one of `AXES`.
        smooth: reports to average over; 1 leaves them as they are.
    """

    runs: Sequence[Run]
    metrics: Sequence[str] = ()
    x: str = "step"
    smooth: int = 1

    def __post_init__(self) -> None:
        known = set().union(*(run.metrics() for run in self.runs))
        for glob in self.metrics:
            if not any(fnmatchcase(name, glob) for name in known):
                raise RunError(f"--metrics: {glob!r} fits none of: {', '.join(sorted(known))}")
        if not any(self.x in row for run in self.runs for row in run.rows):
            axes = [x for x in AXES if any(x in row for run in self.runs for row in run.rows)]
            raise RunError(f"--x={self.x}: no run reports it; there is: {', '.join(axes)}")

    def groups(self) -> list[tuple[Group, list[str]]]:
        """Groups with the names of their metrics; every metric is in one, the first that fits."""
        left = sorted(set().union(*(run.metrics() for run in self.runs)))
        if self.metrics:
            left = [n for n in left if any(fnmatchcase(n, glob) for glob in self.metrics)]
        found = []
        for group in GROUPS:
            taken = [n for glob in group.patterns for n in left if fnmatchcase(n, glob)]
            found.append((group, list(dict.fromkeys(taken))))
            left = [n for n in left if n not in taken]
        return [(group, names) for group, names in found if names]

    def panels(self) -> list[tuple[Group, list[str]]]:
        """As `groups`, without what the bars of wall time and the axes say already."""
        said = () if self.metrics else ("seconds", "samples")
        hidden = lambda n: n.startswith("time/") or n in said
        shown = [(g, [n for n in names if not hidden(n)]) for g, names in self.groups()]
        return [(group, names) for group, names in shown if names]


def style(index: int) -> dict[str, str]:
    """Colour and dashes of the run at this position."""
    dashes = ("-", "--", ":")[index // len(COLORS) % 3]
    return {"color": COLORS[index % len(COLORS)], "linestyle": dashes}


def smoothed(ys: np.ndarray, reports: int) -> np.ndarray:
    """The mean of up to `reports` values before and at each; a gap stays one."""
    sound = np.isfinite(ys)
    total = np.convolve(np.where(sound, ys, 0), np.ones(reports))[: len(ys)]
    count = np.convolve(sound, np.ones(reports))[: len(ys)]
    return np.where(sound, total / np.maximum(count, 1), np.nan)


def draw(axes: Axes, view: View, group: Group, metric: str) -> None:
    """One metric of all runs."""
    unit, per = _axis(view)
    values = []
    for index, run in enumerate(view.runs):
        xs, ys = run.series(metric, view.x)
        if not len(ys):
            continue
        look = style(index)
        values.append(ys[np.isfinite(ys)])
        if view.smooth > 1 and group.smooth:
            axes.plot(xs / per, ys, **look, linewidth=0.8, alpha=0.3)
            ys = smoothed(ys, view.smooth)
        sound = np.isfinite(np.pad(ys, 1, constant_values=np.nan))
        alone = sound[1:-1] & ~sound[:-2] & ~sound[2:]  # no line would show it
        axes.plot(xs / per, ys, **look, linewidth=1.6, marker="o", markersize=4,
                  markevery=np.flatnonzero(alone).tolist())  # fmt: skip
        for mark in run.restarts(view.x):
            axes.axvline(mark / per, color=look["color"], linestyle=(0, (1, 3)), linewidth=1)
    drawn = np.concatenate([*values, np.empty(0)])
    if group.log and len(drawn) and drawn.min() > 0 and drawn.max() / drawn.min() > SPREAD:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        if group.zero and len(drawn) and drawn.min() >= 0:
            axes.set_ylim(0, max(1.05 * drawn.max(), 1e-9) if drawn.max() else 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)


def _axis(view: View) -> tuple[str, float]:
    """Label and divisor of the horizontal axis."""
    if view.x != "seconds":
        return view.x, 1
    longest = max((run.last("seconds") or 0 for run in view.runs), default=0)
    for unit, per in (("hours", 3600), ("minutes", 60)):
        if longest >= 2 * per:
            return unit, per
    return "seconds", 1


def heading(view: View, metric: str) -> str:
    """The metric, what it means, and how much of it could not be drawn."""
    text = f"{metric}: {MEANINGS[metric]}" if metric in MEANINGS else metric
    gaps = sum(run.broken(metric) for run in view.runs)
    return f"{text} ({gaps} × no number)" if gaps else text


def draw_shares(axes: Axes, runs: Sequence[Run]) -> None:
    """Wall time by what it was spent on, a bar per run."""
    for position, run in enumerate(runs):
        left = 0.0
        for kind, share in shares(run).items():
            axes.barh(position, share, left=left, color=KIND_COLORS[kind], height=0.62)
            if share > 0.06:
                axes.text(left + share / 2, position, f"{share:.0%}", ha="center", va="center",
                          color="white", fontsize=9)  # fmt: skip
            left += share
    axes.set_yticks(range(len(runs)), [f" {run.name}" for run in runs], color="#1c2330")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [Patch(color=KIND_COLORS[kind], label=kind) for kind in KINDS]
    axes.legend(handles=handles, ncols=len(KINDS), frameon=False, loc="lower left",
                bbox_to_anchor=(0, 1), fontsize=9, handlelength=1, columnspacing=1.2)  # fmt: skip


def shares(run: Run) -> dict[str, float]:
    """Of the wall time, by kind; empty where the run does not say."""
    seconds = {kind: run.last(f"time/{kind}") or 0.0 for kind in KINDS}
    whole = sum(seconds.values())
    return {kind: s / whole for kind, s in seconds.items()} if whole > 0 else {}


def timed(view: View) -> list[Run]:
    """The runs whose wall time is to be shown."""
    asked = any(name.startswith("time/") for _, names in view.groups() for name in names)
    return [run for run in view.runs if asked and shares(run)]


def picture(view: View) -> bytes:
    """All panels as one PNG, three in a row."""
    panels, bars = view.panels(), timed(view)
    rows = [-(-len(names) // 3) for _, names in panels]
    heights = [0.3 + 0.22 * -(-len(view.runs) // 4), *(0.35 + 2.5 * r for r in rows)]
    if bars:
        heights.append(1.1 + 0.36 * len(bars))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, sum(heights)), dpi=100, facecolor="white")
        parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
        lines = [Line2D([], [], **style(i), linewidth=3) for i in range(len(view.runs))]
        # A label that began with an underscore would be left out.
        names = [f" {run.name}" for run in view.runs]
        parts[0].legend(lines, names, ncols=4, frameon=False, loc="center left", fontsize=11)
        for part, (group, metrics), count in zip(parts[1:], panels, rows):
            part.suptitle(group.title, x=0.005, ha="left", fontsize=13, fontweight="bold")
            grid = list(part.subplots(count, 3, squeeze=False).flat)
            for axes, metric in zip(grid, metrics):
                draw(axes, view, group, metric)
                axes.set_title(heading(view, metric), loc="left")
            for axes in grid[len(metrics) :]:
                axes.set_visible(False)
        if bars:
            draw_shares(parts[-1].subplots(), bars)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def short(value: float) -> str:
    """A tick: 12.8B for 12,800,000,000."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"
