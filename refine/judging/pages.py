"""HTML of texts that strangers wrote: nothing in them acts, hides or fills the page."""

import re
import unicodedata

from hqclip_jax.report import Markup, element

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
SHOWN, UNFOLDED = 600, 8_000  # characters of a text in sight, and in all
INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
STYLE = """
code.point { font: .75em ui-monospace, "DejaVu Sans Mono", monospace; color: #7a4b00;
  background: #fff3d6; border-radius: .2rem; padding: 0 .2rem; }
.cut { color: var(--soft); font-style: italic; }
details summary { cursor: pointer; color: var(--soft); }
"""


def visible(text: str) -> Markup:
    """A text with what can't be seen in it shown by number: control characters, marks that turn
    the direction of writing, characters of no width, halves of a surrogate pair.

    Line feeds and tabs stay as they are.
    """
    if text.isprintable():
        return element("bdi", text)
    parts, plain = [], []
    for character in text:
        if character in "\n\t" or unicodedata.category(character) not in INVISIBLE:
            plain.append(character)
            continue
        parts += ["".join(plain), element("code", f"U+{ord(character):04X}", class_="point")]
        plain.clear()
    # Isolated: writing from right to left inside does not reorder what stands around it.
    return element("bdi", *parts, "".join(plain))


def folded(text: str) -> Markup:
    """The same, of a long text the beginning; the rest unfolds, up to 8,000 characters in all."""
    if len(text) <= SHOWN:
        return visible(text)
    parts = [visible(text[SHOWN:UNFOLDED])]
    if len(text) > UNFOLDED:
        note = f" … cut here: the text has {len(text):,} characters"
        parts.append(element("span", note, class_="cut"))
    more = element("summary", f"{len(text) - SHOWN:,} characters more")
    return Markup(visible(text[:SHOWN]) + element("details", more, *parts))


def secured(document: Markup, style: str = "") -> Markup:
    """A page of `hqclip_jax.report` that may run no script and load nothing, whatever is in it.

    Args:
        document: the page.
        style: further CSS.
    """
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    # The first of each is the page's own: what it is told, it escapes. The policy holds for what
    # stands behind it, and of equal rules the last one counts.
    title, head, rest = re.split("(?<=</title>)|(?=</head>)", document, maxsplit=2)
    return Markup(title + policy + head + element("style", Markup(STYLE + style)) + rest)
