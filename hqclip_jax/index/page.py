"""The page of a search: small pictures with their similarities, all of it in one file."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from hqclip_jax.data.image import ImageError, open_rgb
from hqclip_jax.index.folder import Picture, PictureError, printable
from hqclip_jax.report import Markup, element, page
from refine.judging.pages import secured, visible

PIXELS = 288  # of a thumbnail's longer side: twice its size on the page, for dense screens
THREADS = 4  # each may hold a decoded picture of a quarter of a gigabyte

STYLE = """
:root { color-scheme: light dark; --paper: #fff; }
body { background: var(--paper); }
main { max-width: 90rem; }
section { margin-top: 2.2rem; }
section h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 1rem; display: flex;
  align-items: center; gap: .8rem; overflow-wrap: anywhere; }
h2 img { height: 4.5rem; max-width: 9rem; border-radius: .5rem; object-fit: contain; }
h2 small { font-size: .9rem; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.hits { display: grid; gap: 1.1rem .9rem; padding: 0; margin: 0; list-style: none; max-width: none;
  grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 45%), 1fr)); }
.hit { min-width: 0; font-size: .82rem; line-height: 1.4; }
.hit .look { display: grid; place-items: center; aspect-ratio: 1; border-radius: .6rem;
  overflow: hidden; background: var(--tint); color: var(--soft); text-align: center;
  border: 1px solid var(--line); margin-bottom: .4rem; text-decoration: none; }
.hit a.look:hover, .hit a.look:focus-visible { outline: 3px solid var(--bar); outline-offset: 1px; }
.hit img { width: 100%; height: 100%; object-fit: contain; min-height: 0; }
.hit .look span { padding: .8rem; overflow-wrap: anywhere; }
.hit .score { font-weight: 600; font-variant-numeric: tabular-nums; margin-right: .45rem; }
.hit .rank { color: var(--soft); float: right; font-variant-numeric: tabular-nums; }
.hit .name, .hit .folder { display: block; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.hit .folder { color: var(--soft); font-size: .76rem; direction: ltr; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e8ebf0; --soft: #9aa5b5; --line: #2b313b; --tint: #1d222a;
    --bar: #6ea8e6; }
  code.point { color: #f2c879; background: #3a2e14; }
}
"""


@dataclass(frozen=True)
class Hit:
    similarity: float
    picture: Picture


@dataclass(frozen=True)
class Result:
    """One heading of the page, with the pictures below it, best first.

    Attributes:
        title: the text searched for, the name of the picture, or what the pictures are.
        hits: pictures of the index.
        image: encoded, where a picture was searched for.
        note: in small print beside the title.
    """

    title: str
    hits: Sequence[Hit]
    image: bytes = b""
    note: str = ""


def document(title: str, lead: str, root: Path, results: Sequence[Result], out: Path) -> Markup:
    """The whole page.

    Args:
        title: of the document.
        lead: one paragraph: what was searched, with which model.
        root: the folder that was indexed.
        results: each becomes a section.
        out: where the page will lie: links to pictures below it are relative, so that the whole may
            be moved; others are file URLs.
    """
    pictures = {hit.picture for result in results for hit in result.hits}
    with ThreadPoolExecutor(THREADS) as pool:
        looks = dict(zip(pictures, pool.map(lambda p: _look(root, p), pictures)))
    sections = []
    for result in results:
        hits = (
            _hit(rank, hit, looks[hit.picture], link(root, hit.picture, out.absolute().parent))
            for rank, hit in enumerate(result.hits, 1)
        )
        sections.append((_heading(result), [element("ol", *hits, class_="hits")]))
    whole = page(printable(title), visible(printable(lead)), sections)
    return secured(whole, STYLE)


def link(root: Path, picture: Picture, beside: Path) -> str:
    """A URL of a picture's file; empty for one in a tar, which no browser opens."""
    if picture.member:
        return ""
    path = os.path.normpath(root / picture.path)
    if os.path.commonpath([path, beside]) == str(beside):
        # Quoted, no name reads as a scheme.
        return quote(os.fsencode(os.path.relpath(path, beside)))
    return "file://" + quote(os.fsencode(path))


def thumbnail(encoded: bytes) -> bytes:
    """A small JPEG of a picture's pixels alone: no byte of the file is in it.

    Raises:
        ImageError: it does not decode, or is too large.
    """
    image = open_rgb(encoded)
    image.thumbnail((PIXELS, PIXELS))
    out = io.BytesIO()
    # From an array, because Pillow would carry a file's comment over.
    Image.fromarray(np.asarray(image)).save(out, "JPEG", quality=82)
    return out.getvalue()


def _look(root: Path, picture: Picture) -> Markup:
    try:
        return _inline(thumbnail(picture.read(root)), printable(picture.name))
    except (ImageError, PictureError) as e:
        return element("span", printable(str(e)))


def _inline(jpeg: bytes, alt: str) -> Markup:
    data = base64.b64encode(jpeg).decode()
    # `element` would close it, which an image must not be.
    return Markup(element("img", alt=alt, src=f"data:image/jpeg;base64,{data}")[: -len("</img>")])


def _heading(result: Result) -> Markup:
    parts = [element("span", visible(result.title))]
    if result.image:
        parts.insert(0, _inline(thumbnail(result.image), ""))
    if result.note:
        parts.append(element("small", visible(result.note)))
    return Markup("".join(parts))


def _hit(rank: int, hit: Hit, look: Markup, url: str) -> Markup:
    picture = hit.picture
    folder, _, last = f"{picture.path}/{picture.member}".rstrip("/").rpartition("/")
    frame = (
        element("a", look, class_="look", href=url) if url else element("div", look, class_="look")
    )
    return element(
        "li",
        frame,
        element("span", f"{hit.similarity:.3f}", class_="score"),
        element("span", f"{rank}", class_="rank"),
        element("span", visible(last), class_="name"),
        element("span", visible(folder), class_="folder"),
        class_="hit",
        title=printable(picture.name),
    )
