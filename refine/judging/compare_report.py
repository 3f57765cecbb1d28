"""A comparison for people and programs: a table in the terminal, JSON, CSV, one HTML page."""

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hqclip_jax.report import (
    COLORS,
    Markup,
    element,
    inline,
    page,
    plots,
    swatch,
    table,
    write,
)
from refine.judging.comparison import Compared, Comparison
from refine.judging.estimates import Estimate, Interval
from refine.judging.measures import MEASURES, Measure
from refine.judging.pages import secured, visible
from refine.judging.scoring import CLIP, JUDGE
from refine.manifest import COUNTS
from refine.storage import write_json

SCORERS = {"CLIP score": CLIP, "judge, 0 to 10": JUDGE}  # of a group of measures
PUBLISHED = {
    CLIP: {"alt-text": 25.4, "untuned student": 27.8, "student": 29.0, "negatives": 20.7},
    JUDGE: {"alt-text": 7.8, "untuned student": 8.0, "student": 8.4, "negatives": 0.5},
}
FACTS = {
    "records": ("records", 0, 1),
    "quarantined": ("pairs in quarantine", 0, 1),
    "validity": ("records of records and quarantine, %", 1, 100),
    "distinct_1": ("different words of all in the descriptions", 4, 1),
    "distinct_2": ("different pairs of words of all", 4, 1),
    "type_token_ratio": ("different words of the first {words:,}", 4, 1),
    "distinct_tags": ("different tags", 0, 1),
    "covered_tags": ("mentions that the 10,000 most frequent tags cover, %", 1, 100),
    "images_per_second": ("pictures a second and engine", 2, 1),
    "prompt_tokens": ("tokens of a question", 0, 1),
    "output_tokens": ("tokens of its answers", 0, 1),
    "usd_per_thousand": ("dollars for 1,000 pictures", 3, 1),
}
COSINE, RATING = "100 · cosine", "rating"
PLOTTED = {
    "clip_caption": ("CLIP score of the alt-text", COSINE),
    "clip_desc": ("CLIP score of the description", COSINE),
    "clip_neg_desc": ("CLIP score of the negative description", COSINE),
    "clip_margin": ("How far the description is above its negative", COSINE),
    "judge_caption": ("The judge's rating of the alt-text", RATING),
    "judge_desc": ("The judge's rating of the description", RATING),
    "judge_neg_desc": ("The judge's rating of the negative description", RATING),
    "words_desc": ("Words of the description", "words"),
    "kept_words": ("How much of the negative is in the description too", "share of its words"),
}
BINS = 40
STYLE = """
td { vertical-align: top; }
.mean { white-space: nowrap; }
.range { color: var(--soft); font-size: .84rem; }
.difference { display: block; font-size: .84rem; color: var(--soft); }
.apart { color: var(--ink); font-weight: 600; }
@media (max-width: 36rem) { td:first-child { white-space: normal; min-width: 7rem; } }
"""


def show(comparison: Comparison) -> None:
    """Prints the table."""
    labels = [each.label for each in comparison.compared]
    shown = Table("", title=f"{comparison.pictures:,} pictures; means and 95% intervals")
    for name in labels:
        shown.add_column(escape(name), justify="right")
    for group, rows in _groups(comparison):
        shown.add_section()
        shown.add_row(f"[bold]{group}[/]", *("" for _ in labels))
        for measure, estimates in rows:
            shown.add_row(escape(measure.label), *(_line(measure, each) for each in estimates))
    shown.add_section()
    shown.add_row("[bold]the whole output[/]", *("" for _ in labels))
    for name, values in _facts(comparison):
        shown.add_row(escape(name), *values)
    Console().print(shown)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes compare.json, compare.csv and compare.html; returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", as_json(comparison))
    _write_csv(comparison, folder / "compare.csv")
    return write(folder / "compare.html", document(comparison))


def as_json(comparison: Comparison) -> dict:
    """All of it but the single records; what is not known is null."""
    return {
        "pictures": comparison.pictures,
        "seed": comparison.seed,
        "scorers": comparison.scorers,
        "words_of_type_token_ratio": comparison.words,
        "outputs": [
            {
                "label": each.label,
                "directory": str(each.output.directory),
                "refiner": each.output.refiner,
                "quarantine": each.output.quarantined,
                **{key: _known(value) for key, value in each.facts.items()},
            }
            for each in comparison.compared
        ],
        "measures": {
            key: [
                {
                    "mean": _ends(each.mean),
                    "n": each.n,
                    "difference": each.difference and _ends(each.difference),
                }
                for each in estimates
            ]
            for key, estimates in comparison.estimates.items()
        },
        "published": PUBLISHED,
    }


def _ends(interval: Interval) -> list[float | None]:
    """Value, low and high end."""
    return [_known(end) for end in (interval.value, interval.low, interval.high)]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _write_csv(comparison: Comparison, path: Path) -> None:
    """One line for each measure and output."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("value", "low", "high", "n", "difference", "difference_low", "difference_high")
        writer.writerow(("measure", "output", *names))
        for key, estimates in comparison.estimates.items():
            for each, found in zip(comparison.compared, estimates):
                ends = _ends(found.difference) if found.difference else (None,) * 3
                writer.writerow((key, each.label, *_ends(found.mean), found.n, *ends))
        for key in FACTS:
            for each in comparison.compared:
                writer.writerow((key, each.label, _known(each.facts[key])))
    partial.replace(path)


def document(comparison: Comparison) -> Markup:
    """The page."""
    labels = [each.label for each in comparison.compared]
    sections = [("Outputs", [_outputs(comparison.compared)])]
    for group, rows in _groups(comparison):
        cells = [
            (measure.label, *(_cell(measure, each) for each in estimates))
            for measure, estimates in rows
        ]
        drawn = [_histogram(comparison, m.key) for m, _ in rows if m.key in PLOTTED]
        parts = [table(("mean", *labels), cells), *_note(comparison, group), plots(drawn)]
        sections.append((group[0].upper() + group[1:], parts))
    facts = [(name, *values) for name, values in _facts(comparison)]
    sections.append(("The whole output", [table(("", *labels), facts), *_reasons(comparison)]))
    lead = (
        f"Measured on {comparison.pictures:,} pictures that all outputs have, drawn at random. ± "
        "is half of the 95% interval by bootstrap. Below it stands the difference to the first "
        "output's on the same pictures, in bold where its interval leaves out 0."
    )
    lines = zip(labels, cycle(COLORS), _dashes())
    key = [swatch(name, color, dash) for name, color, dash in lines]
    return secured(page("Refinements compared", lead, sections, key), STYLE)


def _groups(
    comparison: Comparison,
) -> Iterator[tuple[str, list[tuple[Measure, list[Estimate]]]]]:
    """The measures that some output has a value of, by group."""
    found: dict[str, list] = {}
    for measure in MEASURES:
        estimates = comparison.estimates.get(measure.key, [])
        if any(each.n for each in estimates):
            found.setdefault(measure.group, []).append((measure, estimates))
    yield from found.items()


def _facts(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Those facts that are known of some output."""
    for key, (name, digits, factor) in FACTS.items():
        values = [factor * each.facts[key] for each in comparison.compared]
        if not all(map(math.isnan, values)):
            shown = ["–" if math.isnan(value) else f"{value:,.{digits}f}" for value in values]
            yield name.format(words=comparison.words), shown


def _numbers(measure: Measure, interval: Interval, sign: str = "") -> tuple[str, str]:
    """An interval's value and half of its width."""
    factor, digits = 100 if measure.percent else 1, measure.digits
    value = round(factor * interval.value, digits) + 0.0  # no -0.0
    half = factor * (interval.high - interval.low) / 2
    return f"{value:{sign}.{digits}f}", f"±{half:.{digits}f}"


def _line(measure: Measure, found: Estimate) -> str:
    if not found.n:
        return "–"
    text = " ".join(_numbers(measure, found.mean))
    if found.difference and not math.isnan(found.difference.value):
        text += f"\n[dim]{' '.join(_numbers(measure, found.difference, '+'))}[/]"
    return text


def _cell(measure: Measure, found: Estimate) -> Markup:
    if not found.n:
        return Markup("–")
    value, half = _numbers(measure, found.mean)
    parts = [value, Markup(" "), element("span", half, class_="range")]
    difference = found.difference
    if difference and not math.isnan(difference.value):
        apart = difference.low > 0 or difference.high < 0
        text = " ".join(_numbers(measure, difference, "+"))
        parts.append(element("span", text, class_="difference apart" if apart else "difference"))
    return element("span", *parts, class_="mean")


def _outputs(compared: Sequence[Compared]) -> Markup:
    rows = []
    for each in compared:
        engine, _, rest = each.output.refiner.partition(":")
        model, _, prompt = rest.rpartition(":")
        rows.append((each.label, *map(visible, (engine, model, prompt))))
    return table(("output", "engine", "model", "prompt or rules"), rows)


def _note(comparison: Comparison, group: str) -> list[Markup]:
    """Who scored, and what was published of the measure."""
    kind = SCORERS.get(group)
    if kind is None:
        return []
    by = visible(comparison.scorers[kind])
    said = ", ".join(f"{name} {value}" for name, value in PUBLISHED[kind].items())
    text = (
        f". Published for VLM-150M, on other pictures and by another scorer: {said}. What can be "
        "compared with these is the order, not the size."
    )
    return [element("p", "By ", by, text, class_="note")]


def _reasons(comparison: Comparison) -> list[Markup]:
    """Why pairs went to quarantine, in percent of records and quarantine."""
    compared = comparison.compared
    reasons = dict.fromkeys(reason for each in compared for reason in each.output.quarantined)
    rows = []
    for reason in reasons:
        shares = []
        for each in compared:
            total = len(each.output) + sum(each.output.quarantined.values())
            shares.append(f"{100 * each.output.quarantined.get(reason, 0) / total:.2f}")
        rows.append((visible(str(COUNTS.get(reason, reason))[:200]), *shares))
    header = ("in quarantine because, in %", *(each.label for each in compared))
    return [table(header, rows)] if rows else []


def _dashes() -> Iterator[str]:
    """Solid lines for as many outputs as there are colours, then others."""
    for dash in cycle(("-", "--", ":")):
        yield from (dash,) * len(COLORS)


def _histogram(comparison: Comparison, key: str) -> Markup:
    """How a measure is distributed in each output, as outlines over one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    columns = [each.columns[key] for each in comparison.compared]
    columns = [column[~np.isnan(column)] for column in columns]
    together = np.concatenate(columns)
    title, x = PLOTTED[key]
    edges = np.arange(-0.5, 11)  # of ratings, which are whole numbers, most of them
    if x != RATING:
        inner = tuple(np.percentile(together, [0.2, 99.8]))
        edges = np.histogram_bin_edges(together, BINS, inner)
    for column, color, dash in zip(columns, cycle(COLORS), _dashes()):
        if len(column):
            heights = np.histogram(column, edges)[0] / len(column)
            axes.stairs(heights, edges, color=color, linestyle=dash, linewidth=1.6)
    axes.set(xlabel=x, ylabel="share of pictures")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    return inline(title, figure)
