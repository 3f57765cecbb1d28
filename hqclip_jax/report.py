"""Reports as one HTML file: tables, curves and a gallery, with nothing fetched from elsewhere.

The functions return HTML; every text that they are given is escaped, so they take plain strings
and each other's results, which are `Markup`. No JAX here.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea; --tint: #f5f7fa;
  --bar: #5b8fc7; --good: #0b6b3a; --bad: #a3261d; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note, figcaption { color: var(--soft); font-size: .88rem; }
ul { max-width: 46rem; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { font-size: .84rem; font-weight: 600; color: var(--soft); vertical-align: bottom;
  border-bottom: 2px solid var(--line); }
tr.quiet td { color: var(--soft); font-size: .88rem; }
td.bar { line-height: 2; background-origin: content-box; background-repeat: no-repeat;
  background-image: linear-gradient(var(--bar) 0 0), linear-gradient(var(--line) 0 0);
  background-position: left bottom; background-size: var(--share) 4px, 100% 4px; }
.plots { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: .6rem 0;
  position: sticky; top: 0; z-index: 1;
  background: #fff; border-bottom: 1px solid var(--line); font-size: .9rem; }
.key i { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle; }
td small { display: inline-block; min-width: 5rem; color: var(--soft); }
.gallery { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; font-size: .86rem; }
.card { display: flex; flex-direction: column; }
.card img { width: 100%; height: 9rem; object-fit: contain; display: block; padding: .6rem;
  image-rendering: pixelated; background: var(--tint); border-bottom: 1px solid var(--line); }
.card dl { margin: 0; padding: .8rem .9rem .2rem; }
.card dt { color: var(--soft); font-size: .74rem; text-transform: uppercase;
  letter-spacing: .05em; }
.card dd { margin: 0 0 .55rem; overflow-wrap: anywhere; }
.card .scroll { margin: auto 0 0; }
.card table { font-size: .82rem; }
.card th, .card td { padding: .3rem .4rem; white-space: nowrap; }
.card th:first-child, .card td:first-child { padding-left: .9rem; white-space: normal; }
.card th:last-child, .card td:last-child { padding-right: .9rem; }
.card tr:last-child td { border-bottom: 0; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
@media (max-width: 36rem) { main { padding: 1.5rem .9rem 3rem; } h1 { font-size: 1.5rem; }
  th, td { padding: .4rem .5rem; } }
"""

COLORS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Of the curves, in order; told apart by colour-blind readers too (Okabe and Ito's)."""


class Markup(str):
    """HTML that is safe as it stands."""


def escape(text: str) -> Markup:
    """HTML of a plain text; `Markup` passes unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """<tag attributes>content</tag>; `class_` is the attribute class."""
    named = "".join(
        f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>{''.join(map(escape, content))}</{tag}>")


@dataclass(frozen=True)
class Share:
    """A table cell: a share from 0 to 1, shown in percent over a bar of that length."""

    value: float


Cell = str | Share


def _cell(cell: Cell) -> Markup:
    if isinstance(cell, Share):
        length = f"--share: {100 * min(max(cell.value, 0), 1):.1f}%"
        return element("td", f"{100 * cell.value:.1f}", class_="bar", style=length)
    return element("td", cell)


def table(
    header: Sequence[str], rows: Iterable[Sequence[Cell]], quiet: Iterable[Sequence[Cell]] = ()
) -> Markup:
    """A table; its first column is text, the others are numbers.

    Args:
        header: names of the columns.
        rows: cells.
        quiet: further rows, in small print: chance levels, sample sizes.
    """
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [element("tr", *map(_cell, row)) for row in rows]
    small = [element("tr", *map(_cell, row), class_="quiet") for row in quiet]
    whole = element("table", element("thead", head), element("tbody", *body, *small))
    return element("div", whole, class_="scroll")


def curves(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str
) -> Markup:
    """A line plot as inline SVG.

    Args:
        title: what it shows, also for readers who don't see it.
        lines: points (x, y) by the line's name; colours go by position, and a line without points
            keeps its own for other plots.
        x: name of the horizontal axis.
        y: name of the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    drawn = [(name, points, c) for (name, points), c in zip(lines.items(), COLORS) if points]
    for name, points, color in drawn:
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points), label=name, color=color, linewidth=1.8, marker=marker)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    if drawn:
        axes.legend(frameon=False)
    return inline(title, figure)


def inline(title: str, figure: "Figure") -> Markup:
    """A matplotlib figure as inline SVG with its caption; the page decides the size."""
    import matplotlib

    stream = io.StringIO()
    # Text stays text, in the page's font; the salt makes equal plots equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # The view box keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return element("figure", Markup(svg), element("figcaption", title))


def plots(figures: Iterable[Markup]) -> Markup:
    """Plots side by side, or below each other on a narrow screen."""
    return element("div", *figures, class_="plots")


@dataclass(frozen=True)
class Card:
    """One picture of a gallery.

    Attributes:
        image: PNG bytes.
        texts: (label, text), shown below the picture.
        header, rows: a small table below the texts.
    """

    image: bytes
    texts: Sequence[tuple[str, str]]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)


def gallery(cards: Iterable[Card]) -> Markup:
    """Pictures with their texts and scores in a grid."""
    return element("div", *map(_card, cards), class_="gallery")


def _card(card: Card) -> Markup:
    data = base64.b64encode(card.image).decode()
    alt = html.escape(card.texts[0][1] if card.texts else "")
    image = Markup(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
    texts = (element("dt", label) + element("dd", text) for label, text in card.texts)
    scores = table(card.header, card.rows) if card.rows else Markup()
    return element("div", image, element("dl", *map(Markup, texts)), scores, class_="card")


def verdict(text: str, good: bool) -> Markup:
    """A text in the colour, and with the sign, of right or wrong."""
    return element("span", f"{text} {'✓' if good else '✗'}", class_="good" if good else "bad")


def swatch(name: str, color: str, linestyle: str = "-") -> Markup:
    """An entry of a key: the line that stands for a name in plots; dashes as matplotlib's."""
    border = {"-": "solid", "--": "dashed", ":": "dotted"}[linestyle]
    line = element("i", style=f"border-top: 4px {border} {color}")
    return element("span", line, element("span", name))


def page(
    title: str,
    lead: str,
    sections: Iterable[tuple[str, Sequence[Markup]]],
    key: Sequence[Markup] = (),
) -> Markup:
    """A whole document.

    Args:
        title: of the document, and its first heading.
        lead: one paragraph below it.
        sections: (heading, parts).
        key: swatches that stay in sight.
    """
    body = [element("h1", title), element("p", lead, class_="lead")]
    if key:
        body.append(element("div", *key, class_="key"))
    for heading, parts in sections:
        body.append(element("section", element("h2", heading), *parts))
    head = (
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    main = element("main", *body)
    document = element("html", element("head", *head), element("body", main), lang="en")
    return Markup("<!doctype html>\n" + document + "\n")


def write(path: str | Path, document: Markup) -> Path:
    """Writes the file under a temporary name until it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(document, encoding="utf-8")
    return partial.replace(path)
