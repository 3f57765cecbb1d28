"""The page of a comparison: a forest plot of the differences, and what changed sides."""

import math
from collections.abc import Iterator, Mapping, Sequence

from hqclip_jax.evals.bootstrap import RESAMPLES
from hqclip_jax.evals.comparison import (
    Column,
    Compared,
    Comparison,
    Estimate,
    bare_keys,
    changed_sample,
)
from hqclip_jax.evals.marks import STYLE, image, percent, score_name, whisker
from hqclip_jax.evals.published import COLUMNS
from hqclip_jax.report import Markup, element, page, table
from refine.judging.pages import secured, visible

FOREST = (
    STYLE
    + """
.verdict { white-space: nowrap; } .verdict.unclear { color: var(--soft); }
.changed { display: grid; gap: .6rem; margin: .5rem 0 1rem; list-style: none; padding: 0;
  max-width: none; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); font-size: .78rem; }
.changed li { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; min-width: 0;
  overflow-wrap: anywhere; }
.changed img { width: 100%; height: 7rem; object-fit: contain; display: block;
  background: var(--tint); margin-bottom: .4rem; }
"""
)
MARKS = {"better": ("better ▲", "good"), "worse": ("worse ▼", "bad"),
         "unclear": ("unclear", "unclear")}  # fmt: skip
HEADER = ("B\u00a0−\u00a0A", "95% interval", "points", "B is", "A", "B", "below\u00a00", "answers")


def document(
    names: Sequence[str],
    comparisons: Sequence[Comparison],
    pictures: Sequence[Mapping[str, Mapping[str, str]]],
    shown: int,
) -> Markup:
    """The whole page.

    Args:
        names: of the first model, then of each that is compared with it.
        pictures: data URIs by set and key, for each comparison.
        shown: answers of a set that are listed as won, and as lost.
    """
    sections = []
    for name, comparison, found in zip(names[1:], comparisons, pictures):
        heading = f"{name} against {names[0]}"
        sections.append((heading, list(_forests(comparison))))
        if changed := list(_changed(comparison, found, shown)):
            sections.append((f"What changed sides: {heading}", changed))
    lead = (
        f"A is {names[0]}. Paired differences over the answers that both gave, with intervals by "
        f"{RESAMPLES:,} bootstrap resamples of the pictures, a picture's captions staying with it; "
        "of a mean per class, of the pictures within each class. “Better” and “worse” are said "
        "where the interval leaves out 0 and at least six pictures' answers changed. Each interval "
        "is of its row alone: of twenty rows without any difference, one is outside. All this is "
        "about the choice of pictures; another seed of training moves scores too."
    )
    return secured(page("Models compared", visible(lead), sections), FOREST)


def _forests(comparison: Comparison) -> Iterator[Markup]:
    mains = [each for each in comparison.scores if each.main]
    means = [column for column in comparison.columns if column.of > 1]
    others = [each for each in comparison.scores if not each.main]
    yield _forest("set and main score", [*mains, *means])
    if means:
        note = "A mean's sets are taken as given: each is resampled by itself."
        yield element("p", note, class_="note")
    if others:
        summary = element("summary", f"{len(others)} further scores")
        yield element("details", summary, _forest("set and score", others))
    if comparison.problems:
        problems = [[visible(n), visible(p)] for n, p in comparison.problems.items()]
        yield element("div", table(["not compared", "because"], problems), class_="names")


def _reach(rows: Sequence[Compared | Column]) -> float:
    """Half of a plot's axis, in whole points: all intervals are inside, 0 is in the middle."""
    ends = [abs(end) for row in rows for end in (row.difference.low, row.difference.high)]
    return max(1, math.ceil(105 * max(ends, default=0))) / 100


def _forest(first: str, rows: Sequence[Compared | Column]) -> Markup:
    reach, cells = _reach(rows), []
    for row in rows:
        d: Estimate = row.difference
        ends = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
        text, kind = MARKS[d.verdict]
        cells.append([
            _name(row),
            element("span", f"{100 * d.value:+.1f}", class_="num"),
            element("span", ends, class_="num"),
            whisker(d.value, d.low, d.high, 0.0, (-reach, reach), kind),
            element("span", text, class_=f"verdict {kind}"),
            percent(row.a), percent(row.b), f"{d.below:.3f}", _answers(row),
        ])  # fmt: skip
    axis = f"−{100 * reach:.0f} … +{100 * reach:.0f}"
    return table([first, *(axis if name == "points" else name for name in HEADER)], cells)


def _name(row: Compared | Column) -> Markup:
    if isinstance(row, Column):
        part = element("span", f"mean over {row.have} of {row.of} sets", class_="part")
        return Markup(visible(COLUMNS[row.column]) + part)
    return Markup(visible(row.set) + element("span", score_name(row.score), class_="part"))


def _answers(row: Compared | Column) -> Markup:
    if isinstance(row, Column):
        return Markup()
    parts = [f"{row.both:,}"]
    if row.only_a or row.only_b:
        left = f"{row.only_a:,} of A and {row.only_b:,} of B have no partner"
        parts.append(element("span", left, class_="part"))
    return element("span", *parts)


def _changed(
    comparison: Comparison, found: Mapping[str, Mapping[str, str]], shown: int
) -> Iterator[Markup]:
    """Of each set's main score some answers that B won and lost."""
    for name, paired in comparison.pairs.items():
        counts = [len(side) for side in paired.changed()]
        if not any(counts):
            continue
        yield element("h3", visible(name))
        bare = bare_keys(paired.b.keys)
        for verb, count, side in zip(("won", "lost"), counts, changed_sample(paired, shown)):
            if side:
                some = f"; {len(side)} of them, drawn at random" if len(side) < count else ""
                yield element("p", f"B {verb} {count:,}{some}:", class_="note")
                items = (_item(paired.b.keys[i], bare[i], found.get(name, {})) for i in side)
                yield element("ol", *items, class_="changed")


def _item(key: str, bare: str, found: Mapping[str, str]) -> Markup:
    return element("li", image(key, found) if key in found else Markup(), visible(str(bare)))
