import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from hqclip_jax.index.folder import Picture, Walk
from hqclip_jax.index.page import PIXELS, Hit, Result, document, link, thumbnail
from tests.evals.colours import write_tar
from tests.index.encoder import png

HOSTILE = [
    "<script>alert(1)</script>.png".replace("/", "∕"),
    "\"'onerror='alert(1)' x=\".png",
    "javascript:alert(1).png",
    "two\nlines\u202egnp.png",
    "%2e%2e#a?b&amp;.png",
    os.fsdecode(b"\xff\xfe.png"),
    "日本語 é.png",
]


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def made(tmp_path: Path, out: Path, **result) -> Elements:
    pictures = list(Walk(tmp_path / "photos"))
    hits = [Hit(0.5 - i / 100, picture) for i, picture in enumerate(pictures)]
    results = [Result("a <b>cup</b> & \u202e", hits, **result)]
    page = document("Search <i>", "Of <u>.", tmp_path / "photos", results, out)
    page.encode()  # of names that are no UTF-8 too
    return Elements(page)


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in HOSTILE:
        (tmp_path / "photos" / name).write_bytes(png(200, 10, 10))
    return tmp_path / "photos"


@pytest.mark.parametrize("out", ["page.html", "elsewhere/page.html"])
def test_hostile_names_make_no_element_and_their_links_open_the_file(photos, tmp_path, out):
    out = tmp_path / out
    page = made(tmp_path, out)
    assert {tag for tag, _ in page.found} == {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "p", "section", "h2",
        "span", "bdi", "code", "ol", "li", "a", "img",
    }  # fmt: skip
    assert not [a for _, a in page.found if any(name.startswith("on") for name in a)]
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; img-src data:")
    opened = set()
    for anchor in page.of("a"):
        href = anchor["href"]
        assert href.startswith("file:///" if out.parent.name == "elsewhere" else "photos/")
        path = unquote_to_bytes(href.removeprefix("file://"))
        opened.add(os.path.basename(path))
        assert os.path.exists(os.path.join(os.fsencode(out.parent), path))
    assert opened == {os.fsencode(name) for name in HOSTILE}
    assert "a <b>cup</b> & U+202E" in page.text
    assert "U+DCFFU+DCFE.png" in page.text
    assert all(img["src"].startswith("data:image/jpeg;base64,") for img in page.of("img"))


def test_links_follow_the_folder(tmp_path):
    picture = Picture("a b/c.png", 1, 1, "", 0, 1)
    root, page = tmp_path / "photos", tmp_path / "photos"
    assert link(root, picture, page) == "a%20b/c.png"
    assert link(root, picture, tmp_path) == "photos/a%20b/c.png"
    # No folder of the page's merely begins with the same letters.
    assert link(root, picture, tmp_path / "pho") == f"file://{root}/a%20b/c.png"
    assert link(root, Picture("a.tar", 1, 1, "c.png", 0, 1), page) == ""


def test_what_is_gone_or_in_a_tar_is_shown_without_a_link(tmp_path):
    (tmp_path / "photos").mkdir()
    write_tar(tmp_path / "photos" / "d" / "a.tar", {"e/in.png": png(0, 0, 200)})
    (tmp_path / "photos" / "gone.png").write_bytes(png(0, 0, 200))
    pictures = list(Walk(tmp_path / "photos"))
    (tmp_path / "photos" / "gone.png").unlink()
    results = [Result("x", [Hit(0.25, p) for p in pictures], note="without y")]
    page = Elements(document("t", "l", tmp_path / "photos", results, tmp_path / "x.html"))
    assert len(page.of("img")) == 1
    assert [a["href"] for a in page.of("a")] == ["photos/gone.png"]
    for text in ("unreadable file: No such file", "0.250", "d/a.tar/e", "in.png", "without y"):
        assert text in page.text
    assert [li["title"] for li in page.of("li")] == ["d/a.tar:e/in.png", "gone.png"]


def test_a_picture_that_was_searched_for_stands_in_the_heading(photos, tmp_path):
    page = made(tmp_path, tmp_path / "x.html", image=png(0, 200, 0))
    data = page.of("img")[0]["src"].partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels[4, 4, 1] > 150 > pixels[4, 4, 0]


def test_thumbnails_are_small_and_hold_nothing_of_the_file_but_pixels():
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (1200, 900, 3), np.uint8)
    Image.fromarray(noise).save(out, "JPEG", comment=b"<script>", exif=b"Exif\0\0secret")
    small = thumbnail(out.getvalue())
    assert Image.open(io.BytesIO(small)).size == (PIXELS * 900 // 1200, PIXELS)
    assert b"script" not in small
    assert b"secret" not in small
