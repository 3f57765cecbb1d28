"""The page of `python -m refine gallery`."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from hqclip_jax.data.record import Record
from hqclip_jax.report import Markup, Share, element, page, table
from refine.inputs.pairs import ImageError
from refine.inputs.pictures import prepared
from refine.judging.differences import TEXTS, Pairing, Span, pair_up
from refine.judging.outputs import Output
from refine.judging.pages import SHOWN, folded, secured, visible
from refine.judging.specimens import Rejected
from refine.judging.verdicts import REASONS
from refine.manifest import COUNTS

THUMBNAIL_PIXELS = 400 * 300
LARGEST_PICTURE = 89_478_485  # pixels
STYLE = """
.cards { display: grid; gap: 1.1rem; margin-top: 1rem; }
.pair { display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr); contain: paint;
  border: 1px solid var(--line); border-radius: .6rem; font-size: .92rem; }
.look { background: var(--tint); display: grid; place-items: start center; padding: .6rem;
  border-right: 1px solid var(--line); min-height: 8rem; }
.look img { width: 100%; max-height: 15rem; object-fit: contain; }
.look p { color: var(--soft); font-size: .84rem; text-align: center; overflow-wrap: anywhere; }
.said { padding: .75rem 1rem; min-width: 0; overflow-wrap: anywhere; line-height: 1.5; }
.said h3 { font-size: .74rem; font-weight: 600; color: var(--soft); text-transform: uppercase;
  letter-spacing: .05em; margin: .8rem 0 .2rem; }
.said h3:first-child { margin-top: 0; }
.two { display: grid; gap: 0 1.25rem; grid-template-columns: 1fr 1fr; margin-bottom: .3rem; }
.one, .other { padding-left: 1.3rem; text-indent: -1.3rem; }
.one::before, .other::before { display: inline-block; width: 1.3rem; text-indent: 0;
  font-weight: 600; }
.one::before { content: "✓"; color: var(--good); }
.other::before { content: "✗"; color: var(--bad); }
.tag { display: inline-block; max-width: 100%; text-indent: 0; vertical-align: top;
  margin: 0 .3rem .3rem 0; padding: 0 .55rem; border: 1px solid var(--line); border-radius: 1rem; }
mark { color: inherit; border-radius: .2rem; }
.one mark { background: #d3f0df; } .other mark { background: #fbd9d5; }
.warn { color: var(--bad); font-size: .8rem; font-weight: 600; }
.origin { margin-top: .8rem; font-size: .78rem; color: var(--soft); }
.said pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .5rem .7rem;
  background: var(--tint); border-radius: .4rem; max-height: 20rem; overflow: auto;
  font: .82rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 0 2.5rem; align-items: start; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { white-space: normal; min-width: 8rem; }
@media (max-width: 44rem) {
  .pair, .two { grid-template-columns: minmax(0, 1fr); }
  .look { border-right: 0; border-bottom: 1px solid var(--line); }
  .two { margin-bottom: .6rem; }
}
"""


def document(
    output: Output,
    records: Sequence[Record],
    rejected: Sequence[Rejected],
    pictures: Mapping[tuple[str, str], bytes],
) -> Markup:
    """The whole page.

    Args:
        output: what they come from.
        records: to show.
        rejected: quarantined pairs to show.
        pictures: encoded, of quarantined pairs, by source and key.
    """
    named = (REASONS | COUNTS).get
    name = output.directory.resolve().name.encode("utf-8", "replace").decode()
    sections = [
        ("Summary", [element("div", *_facts(output), *_counts(output, named), class_="facts")]),
        (f"{len(records):,} of {len(output):,} records", [_cards(map(_record, records))]),
    ]
    if output.quarantined:
        heading = f"{len(rejected):,} of {sum(output.quarantined.values()):,} in quarantine"
        cards = (_rejected(r, pictures.get((r.source, r.key)), named) for r in rejected)
        sections.append((heading, [_reasons(output, named), _cards(cards)]))
    lead = (
        "Records drawn at random. Beside each positive text stands the negative that is most like "
        "it, and the words in which the two differ are marked. Characters that can't be seen are "
        "shown by their number."
    )
    return secured(page(f"Refinement: {name}", lead, sections), STYLE)


def thumbnail(encoded: bytes) -> bytes:
    """A small JPEG of a picture's pixels alone: no byte of the file is in it.

    Raises:
        ImageError: it does not decode, or is too large.
    """
    small = prepared(encoded, LARGEST_PICTURE, THUMBNAIL_PIXELS)
    out = io.BytesIO()
    # From an array, because Pillow would carry a file's comment over.
    Image.fromarray(np.asarray(small)).save(out, "JPEG", quality=82)
    return out.getvalue()


def _facts(output: Output) -> list[Markup]:
    engine, _, rest = output.refiner.partition(":")
    model, _, prompt = rest.rpartition(":")
    rows = {
        "engine": engine,
        "model": model,
        "prompt or rules": prompt,
        "what it is": output.manifest.get("note", ""),
        "records": f"{len(output):,}",
        "in quarantine": f"{sum(output.quarantined.values()):,}",
    }
    for name, value in output.manifest.get("engine_stats", {}).items():
        rows[name.replace("_", " ")] = _number(value) if isinstance(value, int | float) else value
    filled = [(name, visible(str(value))) for name, value in rows.items() if value not in ("", "-")]
    return [table(("refinement", ""), filled)]


def _number(value: float) -> str:
    return f"{value:,.3f}".rstrip("0").rstrip(".")


def _counts(output: Output, named: Callable) -> list[Markup]:
    rows = [
        (visible(str(named(key, key))), f"{count:,}")
        for key, count in output.counts.items()
        if count
    ]
    return [table(("what became of the pairs", "count"), rows)] if rows else []


def _reasons(output: Output, named: Callable) -> Markup:
    """The counts of quarantine by reason."""
    total = sum(output.quarantined.values())
    rows = [
        (visible(str(named(reason, reason))[:200]), f"{count:,}", Share(count / total))
        for reason, count in output.quarantined.items()
    ]
    return table(("reason", "pairs", "share of the quarantine in %"), rows)


def _cards(cards: Iterable[Markup]) -> Markup:
    return element("div", *cards, class_="cards")


def _card(look: Markup, *said: Markup) -> Markup:
    return element("article", look, element("div", *said, class_="said"), class_="pair")


def _look(encoded: bytes | None) -> Markup:
    try:
        if encoded is None:
            raise ImageError("", "picture not at hand: name what was refined in --input")
        data = base64.b64encode(thumbnail(encoded)).decode()
        inside = Markup(f'<img alt="" src="data:image/jpeg;base64,{data}">')
    except ImageError as e:
        inside = element("p", visible(str(e)[:200]))
    return element("div", inside, class_="look")


def _record(record: Record) -> Markup:
    parts = [_heading("alt-text"), element("div", _or_none(record.caption))]
    parts.append(_heading("descriptions"))
    parts += _sentences(record.desc, record.neg_desc) or [_or_none("")]
    parts.append(_heading("tags"))
    parts += _tags(record.tags, record.neg_tags)
    size = f"{record.width}×{record.height}"
    parts.append(_origin(record.uid, record.source, size, record.refiner))
    return _card(_look(record.image), *parts)


def _rejected(pair: Rejected, encoded: bytes | None, named: Callable) -> Markup:
    why = element("span", visible(str(named(pair.reason, pair.reason))[:200]), class_="warn")
    parts = [_heading("rejected because"), element("div", why)]
    if pair.detail:
        parts.append(element("div", folded(pair.detail)))
    parts += [_heading("alt-text"), element("div", _or_none(pair.caption))]
    parts += [_heading("last output"), element("pre", _or_none(pair.raw))]
    attempts = f"{pair.attempts} attempts" if pair.attempts else ""
    parts.append(_origin(pair.uid, pair.source, pair.key, attempts))
    return _card(_look(encoded), *parts)


def _heading(text: str) -> Markup:
    return element("h3", text)


def _or_none(text: str) -> Markup:
    return folded(text) if text else element("span", "none", class_="cut")


def _origin(*parts: str) -> Markup:
    shown = [visible(part[:200]) for part in parts if part]
    joined = Markup(" · ").join(shown)
    return element("div", Markup(joined), class_="origin")


def _columns(one: Sequence[Markup], other: Sequence[Markup]) -> Markup:
    """A row of two columns; an empty one keeps its place."""
    columns = (
        element("div", *one, class_="one" if one else ""),
        element("div", *other, class_="other" if other else ""),
    )
    return element("div", *columns, class_="two")


def _sentences(positives: Sequence[str], negatives: Sequence[str]) -> list[Markup]:
    """A row for each positive, its negative beside it, then the negatives that have none."""
    rows = []
    for pairing in pair_up(positives[:TEXTS], negatives[:TEXTS]):
        rows.append(_columns(_marked(pairing.positive), _negative(pairing)))
    return [*rows, *_left_out(positives, negatives)]


def _tags(positives: Sequence[str], negatives: Sequence[str]) -> list[Markup]:
    """One row: all positives, all negatives."""
    pairings = pair_up(positives[:TEXTS], negatives[:TEXTS])
    one = [_tag(_marked(p.positive)) for p in pairings if p.positive]
    other = [_tag(_negative(p)) for p in pairings if p.negative]
    return [_columns(one, other), *_left_out(positives, negatives)]


def _tag(parts: Sequence[Markup]) -> Markup:
    return element("span", *parts, class_="tag")


def _negative(pairing: Pairing) -> list[Markup]:
    same = [element("span", " same as the positive", class_="warn")] if pairing.equal else []
    return _marked(pairing.negative) + same


def _left_out(*lists: Sequence[str]) -> list[Markup]:
    count = sum(max(0, len(texts) - TEXTS) for texts in lists)
    return [element("div", f"and {count:,} more, not shown", class_="cut")] if count else []


def _marked(spans: Sequence[Span]) -> list[Markup]:
    """The differing words marked; a long text is folded instead."""
    if sum(len(span.text) for span in spans) > SHOWN:
        return [folded("".join(span.text for span in spans))]
    parts = []
    for span in spans:
        bare = span.text.rstrip()
        parts.append(element("mark", visible(bare)) if span.differs else visible(bare))
        parts.append(visible(span.text[len(bare) :]))
    return parts
