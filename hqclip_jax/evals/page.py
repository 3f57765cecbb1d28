"""The report of an evaluation: `report.html`, one file with nothing fetched from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from hqclip_jax.evals.groups import GroupMean
from hqclip_jax.evals.marks import STYLE, cards, image, names_told, percent, score_name, whisker
from hqclip_jax.evals.outcome import Classes, Failure, Outcome, Result
from hqclip_jax.evals.pictures import confusions
from hqclip_jax.evals.published import COLUMNS, SOURCE, column_means, published
from hqclip_jax.evals.results import Score, main_scores
from hqclip_jax.report import Markup, Share, element, page, table
from refine.judging.pages import secured, visible

SHOWN_CLASSES = 10  # of each end
CHOSEN = (
    "Not chosen by hand: a set's answers stand in a random order of a fixed seed, and the first of "
    "each kind are shown, so two models show the same pictures where both fail. Numbers are "
    "cosines."
)


@dataclass(frozen=True)
class Evaluation:
    """What a report is of.

    Attributes:
        about: as in `results.json`.
        scale: DataComp's, whose published rows stand beside.
        scores: of each set that has some.
        pictures: data URIs by set and source.
    """

    about: Mapping[str, object]
    scale: str
    results: Mapping[str, Result]
    scores: Mapping[str, Sequence[Score]]
    pictures: dict[str, Mapping[str, str]]


def document(evaluation: Evaluation) -> Markup:
    """The whole page."""
    about, results = evaluation.about, evaluation.results
    sections = [("Sets", [_contents(results), _overview(evaluation)])]
    if means := column_means(main_scores(results)):
        sections.append(("Beside the paper", _columns(means, evaluation.scale)))
    if any(isinstance(r, Outcome) and r.skips.total for r in results.values()):
        sections.append(("Left out", [_left_out(results)]))
    for i, (name, result) in enumerate(results.items()):
        if isinstance(result, Outcome):
            anchor = element("span", id=f"set-{i}")
            found = evaluation.pictures.get(name, {})
            sections.append((name, [anchor, *_set(result, evaluation.scores[name], found)]))
    lead = (
        f"Step {about['step']:,} of {about['checkpoint']}, its {about['weights']}, on suite "
        f"{about['suite']}: {about['model']['arch']} at {about['model']['image_size']} px, "
        f"tokenizer {about['tokenizer']}, {about['samples']:,} pictures seen in training."
    )
    return secured(page(f"Evaluation of {about['checkpoint']}", visible(lead), sections), STYLE)


def _contents(results: Mapping[str, Result]) -> Markup:
    links = [
        element("li", element("a", visible(name), href=f"#set-{i}"))
        for i, (name, result) in enumerate(results.items())
        if isinstance(result, Outcome)
    ]
    return element("ul", *links, class_="contents") if len(links) > 1 else Markup()


def _overview(evaluation: Evaluation) -> Markup:
    """Each set's main score, and the sets that failed."""
    lines, failures = [], []
    for name, result in evaluation.results.items():
        if isinstance(result, Failure):
            failures.append([visible(name), element("span", visible(result.error), class_="bad")])
            continue
        lines += [(name, s, result.skips.total) for s in evaluation.scores[name] if s.main]
    axis = _axis([score for _, score, _ in lines])
    rows = []
    for name, score, left_out in lines:
        told = Markup(visible(name) + element("span", score_name(score.name), class_="part"))
        rows.append([told, *_score(score, axis)[1:], f"{left_out:,}"])
    note = element(
        "p", "The dot is the score, the bar its 95% interval, the dotted line chance.",
        class_="note",
    )  # fmt: skip
    parts = [note, table(_header("set and main score", axis, "left out"), rows)] if rows else []
    if failures:
        parts.append(element("div", table(["failed", "because"], failures), class_="names"))
    return Markup("".join(parts))


def _header(first: str, axis: float, *more: str) -> list[str]:
    return [first, "%, and its 95% interval", f"0 to {100 * axis:.0f} %", "chance", "n", *more]


def _axis(scores: Sequence[Score]) -> float:
    """Where a plot of these ends: the first of a few round shares that all are below."""
    highest = max((max(s.value, s.high or 0, s.chance or 0) for s in scores), default=1.0)
    return next((end for end in (0.05, 0.1, 0.25, 0.5) if end > highest), 1.0)


def _score(score: Score, axis: float) -> list[Markup | str]:
    ends = "" if score.low is None else f" {percent(score.low)}–{percent(score.high)}"
    value = element("span", percent(score.value), element("small", ends), class_="num")
    drawn = whisker(score.value, score.low, score.high, score.chance, (0, axis))
    return [score_name(score.name), value, drawn, percent(score.chance), f"{score.n:,}"]


def _columns(means: Mapping[str, GroupMean], scale: str) -> list[Markup]:
    """Ours above the published rows of one scale, in DataComp's columns."""
    ours = []
    for column in COLUMNS:
        mean = means.get(column)
        parts = [] if mean is None else [percent(mean.mean)]
        if mean is not None and mean.have < mean.of:
            parts.append(element("span", f"{mean.have} of {mean.of} sets", class_="part"))
        ours.append(element("span", *parts))
    rows = []
    for row in (row for row in published() if row.scale == scale):
        cells = (f"{row.scores[c]:.1f}" if c in row.scores else "" for c in COLUMNS)
        method = [f"{row.method}, {row.model}"]
        told = f"{row.data} pairs" + (f"; {row.note}" if row.note else "")
        rows.append([element("span", *method, element("span", told, class_="part")), *cells])
    grid = table(["", *COLUMNS.values()], [["this model", *ours], *rows])
    grid = Markup(grid.replace("<tbody><tr>", '<tbody><tr class="ours">', 1))
    note = (
        f"In %. Below: {SOURCE}, at scale {scale}, the one closest to this model by its tower or "
        "else by the pictures it saw. Blank columns were not evaluated, or not published; a mean "
        "over fewer sets than DataComp's says of how many, and is then no equal of the column's."
    )
    return [element("p", note, class_="note"), element("div", grid, class_="tight")]


def _left_out(results: Mapping[str, Result]) -> Markup:
    rows = []
    for name, result in results.items():
        for reason, count in result.skips.counts.items() if isinstance(result, Outcome) else ():
            names = result.skips.names[reason]
            told = [*names, f"and {count - len(names):,} more"] if count > len(names) else names
            first = Markup(visible(name) + element("span", visible(reason), class_="part"))
            rows.append([first, names_told(told), f"{count:,}"])
    return element("div", table(["set and reason", "which", "count"], rows), class_="names")


def _set(outcome: Outcome, scores: Sequence[Score], found: Mapping[str, str]) -> list[Markup]:
    axis = _axis(scores)
    parts = [table(_header("score", axis), [_score(score, axis) for score in scores])]
    if outcome.classes is not None:
        parts += [_by_class(outcome.classes), _confusions(outcome, found)]
    if outcome.cards:
        parts.append(element("p", CHOSEN, class_="note"))
    for section, shown in groupby(outcome.cards, key=lambda card: card.section):
        parts += [element("h3", section), cards(shown, found)]
    return parts


def _by_class(classes: Classes) -> Markup:
    """The worst and the best classes; those with more pictures come first among equals. No class is
    in both, and none that was never found is among the best."""
    n_C = np.bincount(classes.labels, minlength=len(classes.names))
    right = classes.labels[classes.labels == classes.predicted]
    right_C = np.bincount(right, minlength=len(classes.names))
    seen = np.flatnonzero(n_C)
    share_c = right_C[seen] / n_C[seen]
    worst = seen[np.lexsort((-n_C[seen], share_c))]
    best = seen[np.lexsort((-n_C[seen], -share_c))]
    half = min(SHOWN_CLASSES, -(-len(seen) // 2))
    best = best[right_C[best] > 0][: min(half, len(seen) - half)]

    def rows(ids: np.ndarray) -> list[list]:
        return [[visible(classes.names[c]), Share(right_C[c] / n_C[c]), f"{n_C[c]:,}"] for c in ids]

    return element(
        "div",
        table([f"worst {half} of {len(seen)} classes", "right, %", "n"], rows(worst[:half])),
        table([f"best {len(best)}", "right, %", "n"], rows(best)) if len(best) else "",
        class_="two",
    )


def _confusions(outcome: Outcome, found: Mapping[str, str]) -> Markup:
    rows = []
    names, n_C = outcome.classes.names, np.bincount(outcome.classes.labels)
    for true, predicted, count, source in confusions(outcome):
        pair = element("span", visible(names[true]), " → ", visible(names[predicted]))
        rows.append([pair, image(source, found), f"{count:,}", percent(count / n_C[true])])
    if not rows:
        return element("p", "Nothing was confused.", class_="note")
    header = ["confused most: true → taken for", "the first", "pictures", "% of the true class"]
    return table(header, rows)
