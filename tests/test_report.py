import base64
import re
from html.parser import HTMLParser

import pytest

from hqclip_jax import report
from hqclip_jax.report import Card, Markup, Share

VOID = {"meta", "img", "wbr"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps attributes and text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def cells(self) -> list[str]:
        return [t for t in self.text if t.strip()]


def whole_page() -> Markup:
    figure = report.curves("Loss", {"a": [(0, 2.0), (64, 1.0), (128, 0.5)]}, "samples", "loss")
    card = Card(b"\x89PNG-bytes", [("alt-text", "red <b>")], ("", "x"), [["a", "0.5"]])
    parts = [report.table(["n", "v"], [["a", Share(0.25)]]), report.plots([figure])]
    return report.page("T & t", "lead", [("One", parts), ("Two", [report.gallery([card])])])


def test_page_nests_and_fetches_nothing():
    document = whole_page()
    reader = Reader(document)
    links = [v for _, name, v in reader.attributes if name in ("src", "href", "xlink:href")]
    assert [v for v in links if not v.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\((?!#)", document)
    assert "<script" not in document
    assert document.startswith("<!doctype html>")
    assert ("meta", "name", "viewport") in reader.attributes


def test_every_text_is_escaped():
    evil = '<script>alert("x")</script> & co'
    escaped = "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; co"
    card = Card(b"", [(evil, evil)], (evil,), [[evil]])
    figure = report.curves(evil, {evil: [(0, 1), (1, 2)]}, evil, evil)
    parts = [report.table([evil], [[evil]], [[evil]]), report.gallery([card]), figure]
    document = report.page(evil, evil, [(evil, parts)])
    assert "<script" not in document
    Reader(document)
    # title, heading, lead, section; three cells; label, text, alternative text, two cells; caption
    # and label of the plot. Text in the SVG is matplotlib's to escape.
    assert document.count(escaped) == 4 + 3 + 5 + 2
    assert report.verdict(evil, True).count("&lt;script") == 1


def test_a_share_is_a_number_over_a_bar_of_its_length():
    row = report.table(["name", "top-1"], [["a", Share(0.125)], ["b", Share(1.2)]])
    reader = Reader(row)
    assert reader.cells() == ["name", "top-1", "a", "12.5", "b", "120.0"]
    bars = [v for _, name, v in reader.attributes if name == "style"]
    assert bars == ["--share: 12.5%", "--share: 100.0%"]  # a bar never leaves its cell


def test_quiet_rows_come_last():
    row = report.table(["", "n"], [["a", "1"]], quiet=[["chance", "2"]])
    assert Reader(row).cells() == ["n", "a", "1", "chance", "2"]
    assert row.index("quiet") > row.index(">1<")


def line_points(figure: str, color: str) -> int:
    """Corners of the longest path in this colour; the legend's sample has three."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {color}', figure)
    return max((d.count("M") + d.count("L") for d in paths), default=0)


def test_curves_draw_every_point_in_the_lines_own_colour():
    zigzag = [(0, 1.0), (1, 3.0), (2, 2.0), (3, 5.0)]
    lines = {"one": zigzag, "none": [], "two": [*zigzag, (4, 0.0)]}
    figure = report.curves("a title", lines, "samples", "loss")
    assert line_points(figure, report.COLORS[0]) == 4
    assert line_points(figure, report.COLORS[1]) == 0
    assert line_points(figure, report.COLORS[2]) == 5
    assert ">none<" not in figure and ">one<" in figure and ">samples<" in figure
    svg = figure[figure.index("<svg") : figure.index(">", figure.index("<svg"))]
    assert 'aria-label="a title"' in svg and "viewBox" in svg
    assert not re.search(r"\b(width|height)=", svg)  # the page decides
    assert report.curves("a title", lines, "samples", "loss") == figure


def test_gallery_holds_the_very_bytes():
    image = bytes(range(256))
    card = Card(image, [("alt-text", 'a "red" circle')])
    reader = Reader(report.gallery([card, card]))
    sources = [v for tag, name, v in reader.attributes if (tag, name) == ("img", "src")]
    assert len(sources) == 2
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == image
    assert ("img", "alt", 'a "red" circle') in reader.attributes


@pytest.mark.parametrize(("good", "sign"), [(True, "✓"), (False, "✗")])
def test_verdict_is_not_told_by_colour_alone(good, sign):
    assert sign in report.verdict("0.50", good)


def test_write_replaces_the_file_and_leaves_nothing_temporary(tmp_path):
    path = tmp_path / "new" / "report.html"
    report.write(path, Markup("old"))
    assert report.write(path, whole_page()) == path
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
