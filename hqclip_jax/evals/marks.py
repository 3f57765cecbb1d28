"""What the pages of an evaluation and of a comparison share: their style, intervals, cards."""

from collections.abc import Iterable, Mapping

from hqclip_jax.evals.outcome import Card, Cell
from hqclip_jax.report import Markup, element
from refine.judging.pages import folded, visible

STYLE = """
:root { color-scheme: light dark; --page: #fff; --low-bar: #c9d9ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --ink: #e4e8ee; --soft: #9da7b5; --line: #2d3541; --tint: #1a2029;
    --bar: #6f9fd4; --low-bar: #2f4a68; --good: #58c58c; --bad: #ff8f85; }
  code.point { color: #ffd48a; background: #3a2f17; }
}
body { background: var(--page); }
h1 { overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: inherit; }
tr.ours td { font-weight: 600; background: var(--tint); }
td:first-child { overflow-wrap: anywhere; }
.tight table { font-size: .86rem; } .tight th, .tight td { padding: .35rem .4rem; }
.tight td:first-child { min-width: 9rem; white-space: normal; }
.num { white-space: nowrap; }
.part { display: block; color: var(--soft); font-size: .74rem; font-weight: 400; }
.whisker { position: relative; display: block; min-width: 9rem; height: 1.25rem; }
.whisker i { position: absolute; display: block; }
.whisker .axis { left: 0; right: 0; top: 50%; border-top: 1px solid var(--line); }
.whisker .span { top: calc(50% - 3px); height: 7px; border-radius: 4px; background: var(--low-bar);
  left: var(--low); width: calc(var(--high) - var(--low)); min-width: 2px; }
.whisker .dot { left: var(--at); top: calc(50% - 4px); width: 9px; height: 9px; margin-left: -4.5px;
  border-radius: 50%; background: var(--bar); }
.whisker .zero { left: var(--zero); top: 0; bottom: 0; border-left: 2px dotted var(--soft); }
.whisker.good .dot { background: var(--good); } .whisker.bad .dot { background: var(--bad); }
.contents { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0;
  max-width: none; font-size: .92rem; }
.shown { display: grid; gap: 1rem; align-items: stretch;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.answered { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; min-width: 0;
  font-size: .88rem; contain: paint; }
.asked { display: flex; gap: .8rem; align-items: center; padding: .7rem .8rem; min-height: 4rem;
  background: var(--tint); border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.asked img { flex: none; width: 6rem; height: 6rem; object-fit: contain; }
.asked b { font-size: .74rem; font-weight: 600; color: var(--soft); text-transform: uppercase;
  letter-spacing: .05em; display: block; }
.answers { margin: 0; padding: .5rem .8rem .6rem; list-style: none; max-width: none; }
.answers li { display: flex; gap: .6rem; padding: .14rem 0; align-items: baseline; }
.answers .text { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.answers .sim { font-variant-numeric: tabular-nums; color: var(--soft); white-space: nowrap; }
.strip { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .35rem; }
.strip li { display: block; text-align: center; }
.strip img, .strip .gone { width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--tint); border: 2px solid transparent; border-radius: .3rem; display: block; }
.strip .yes img { border-color: var(--good); }
.gone { color: var(--soft); font-size: .74rem; flex: none; display: grid; place-items: center;
  text-align: center; }
.asked .gone { width: 6rem; height: 6rem; border: 1px dashed var(--line); }
td img { height: 3.2rem; width: 4.2rem; object-fit: contain; vertical-align: middle; }
.two { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.two td:first-child, .names td { white-space: normal; }
.names td:nth-child(2), .names th:nth-child(2) { text-align: left; overflow-wrap: anywhere; }
td small { min-width: 6.2rem; }
@media (max-width: 36rem) { td:first-child { white-space: normal; min-width: 7rem; }
  .whisker { min-width: 6rem; } }
"""


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def score_name(name: str) -> Markup:
    """A score's name, which may go on in the next line behind an underscore."""
    return Markup(visible(name).replace("_", "_<wbr>"))


def whisker(
    at: float,
    low: float | None,
    high: float | None,
    zero: float | None,
    scale: tuple[float, float],
    kind: str = "",
) -> Markup:
    """A dot with its interval on an axis, drawn by the style sheet, so that it follows the page's
    width and colours.

    Args:
        zero: where the dotted line stands: chance, or no difference; None for no line.
        scale: the axis' ends.
        kind: `good` or `bad` colours the dot.
    """

    def place(value: float) -> str:
        return f"{100 * min(max((value - scale[0]) / (scale[1] - scale[0]), 0), 1):.2f}%"

    style, parts = [f"--at: {place(at)}"], [element("i", class_="axis")]
    label = f"{100 * at:.1f}"
    if zero is not None:
        style.append(f"--zero: {place(zero)}")
        parts.append(element("i", class_="zero"))
    if low is not None and high is not None:
        style += [f"--low: {place(low)}", f"--high: {place(high)}"]
        parts.append(element("i", class_="span"))
        label += f", 95% interval {100 * low:.1f} to {100 * high:.1f}"
    parts.append(element("i", class_="dot"))
    # `aria-label` has a dash, which no Python name may have.
    named = {
        "class": f"whisker {kind}",
        "style": "; ".join(style),
        "role": "img",
        "aria-label": label,
    }
    return element("span", *parts, **named)


def image(source: str, found: Mapping[str, str]) -> Markup:
    """A picture of `pictures`, or a word where it is not at hand."""
    if source in found:
        return element_void("img", alt="", src=found[source], loading="lazy")
    return element("span", "no picture", class_="gone")


def element_void(tag: str, **attributes: str) -> Markup:
    """An element that has no content and no end tag."""
    whole = element(tag, **attributes)
    return Markup(whole.removesuffix(f"</{tag}>"))


def cards(shown: Iterable[Card], found: Mapping[str, str]) -> Markup:
    """Examples in a grid, each what was asked above what was answered."""
    return element("div", *(_card(card, found) for card in shown), class_="shown")


def _card(card: Card, found: Mapping[str, str]) -> Markup:
    asked = []
    if card.asked.source:
        asked.append(image(card.asked.source, found))
    if card.asked.text:
        asked.append(element("span", folded(card.asked.text)))
    in_pictures = any(cell.source for cell in card.answers)
    answers = [(_picture if in_pictures else _text)(cell, found) for cell in card.answers]
    listed = element("ol", *answers, class_="answers strip" if in_pictures else "answers")
    return element("article", element("div", *asked, class_="asked"), listed, class_="answered")


def _mark(cell: Cell) -> Markup:
    if cell.right is None:
        return Markup()
    return element("span", "✓" if cell.right else "✗", class_="good" if cell.right else "bad")


def _similarity(cell: Cell) -> Markup:
    told = "" if cell.similarity is None else f"{cell.similarity:.3f}"
    return element("span", told, class_="sim")


def _text(cell: Cell, found: Mapping[str, str]) -> Markup:
    text = element("span", folded(cell.text), class_="text")
    return element("li", _mark(cell), text, _similarity(cell))


def _picture(cell: Cell, found: Mapping[str, str]) -> Markup:
    below = element("span", _mark(cell), " ", _similarity(cell))
    return element("li", image(cell.source, found), below, class_="yes" if cell.right else "no")


def names_told(names: Iterable[str]) -> Markup:
    """Names one below the other."""
    return element("span", *(element("div", visible(name)) for name in names))
