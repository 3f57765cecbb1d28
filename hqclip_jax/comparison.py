"""The comparison of runs as a page: their curves beside tables of what they reached and cost."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hqclip_jax import report
from hqclip_jax.curves import STYLE, View, draw, draw_shares, heading, picture, shares, style, timed
from hqclip_jax.report import Markup, Share, element
from hqclip_jax.runs import Run, RunError, differing, load
from hqclip_jax.telemetry import KINDS


def plot(
    workdirs: Sequence[str], out: str | None, metrics: Sequence[str], x: str, smooth: int
) -> list[Path]:
    """Writes `out`, or else `curves.html` and `curves.png` in the first workdir; returns the paths.

    Raises:
        RunError: a workdir without reports, a metric or an axis that no run has, another suffix.
    """
    view = View(load(workdirs), metrics, x, smooth)
    default = [Path(workdirs[0]) / "curves.html", Path(workdirs[0]) / "curves.png"]
    paths = [Path(out)] if out else default
    for path in paths:
        if path.suffix == ".html":
            report.write(path, page(view))
        elif path.suffix == ".png":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(view))
        else:
            raise RunError(f"--out={path}: a name that ends in .html or .png")
    return paths


def page(view: View) -> Markup:
    """The whole comparison: tables first, then the curves."""
    runs = view.runs
    sections = [("Runs", [_summary(view)])]
    fields = differing(runs)
    if fields:
        header = ["field", *(run.name for run in runs)]
        sections.append(
            ("Configured differently", [report.table(header, ([n, *v] for n, v in fields))])
        )
    with matplotlib.rc_context(STYLE):
        for group, metrics in view.panels():
            figures = []
            for metric in metrics:
                figure = Figure(figsize=(3.9, 2.4))
                draw(figure.subplots(), view, group, metric)
                figures.append(report.inline(heading(view, metric), figure))
            sections.append((group.title, [report.plots(figures)]))
        if bars := timed(view):
            figure = Figure(figsize=(11, 0.9 + 0.36 * len(bars)))
            draw_shares(figure.subplots(), bars)
            parts = [report.inline("Wall time by what it was spent on", figure), _times(bars)]
            sections.append(("Where the time went", parts))
    sections.append(("Last values", [_values(view)]))
    key = [report.swatch(run.name, **style(i)) for i, run in enumerate(runs)]
    lead = "Curves by step" if view.x == "step" else f"Curves by {view.x}"
    if view.smooth > 1:
        lead += f", averaged over {view.smooth} reports; thin lines are the reports themselves"
    lead += ". A dotted vertical line is a restart, a gap a value that is no number."
    if silent := [run.name for run in runs if not any(view.x in row for row in run.rows)]:
        lead += f" Not drawn, as they report no {view.x}: {', '.join(silent)}."
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return report.page(title, lead, sections, key)


def _summary(view: View) -> Markup:
    rows = []
    for run in view.runs:
        when, seconds = run.last("time"), run.last("seconds")
        rows.append([
            run.name, number(run.last("step")), number(run.last("samples")),
            "–" if seconds is None else f"{seconds / 3600:,.2f}",
            f"{len(run.restarts('step'))}", f"{sum(map(run.broken, run.metrics()))}",
            "–" if when is None else f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M}",
        ])  # fmt: skip
    header = ["run", "steps", "samples", "hours", "restarts", "values that are no number",
              "last report (UTC)"]  # fmt: skip
    return report.table(header, rows)


def _times(runs: Sequence[Run]) -> Markup:
    """Seconds and share of each kind."""
    rows = []
    for run in runs:
        cells = [Share(share) for share in shares(run).values()]
        rows.append([run.name, number(run.last("seconds")), *cells])
    return report.table(["run", "seconds", *(f"{kind}, %" for kind in KINDS)], rows)


def _values(view: View) -> Markup:
    first, *others = view.runs
    rows = []
    for _, names in view.groups():
        for name in names:
            base = first.last(name)
            cells = [number(base)]
            for run in others:
                cells.append(Markup(number(run.last(name)) + _difference(run.last(name), base)))
            rows.append([name, *cells])
    table = report.table(["metric", *(run.name for run in view.runs)], rows)
    if not others:
        return table
    note = f"Small figures are differences from {first.name}."
    if len({run.last("step") for run in view.runs}) > 1:
        note += " The runs end at different steps: these are ends, not equals."
    return Markup(element("p", note, class_="note") + table)


def _difference(value: float | None, base: float | None) -> Markup:
    if value is None or base is None or not np.isfinite(value - base):
        return Markup()
    return element("small", f"{value - base:+,.3g}" if value != base else "±0")


def number(value: float | None) -> str:
    """A value for a table: four digits, or all of a count."""
    if value is None:
        return "–"
    if not np.isfinite(value):
        return "no number"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
