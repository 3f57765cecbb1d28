"""The gallery: what it shows, and that nothing from outside acts in it."""

import html
import io
import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from PIL import Image

from hqclip_jax.data.record import Record
from refine.__main__ import main
from refine.judging.gallery_page import thumbnail
from refine.judging.outputs import Output
from refine.judging.specimens import draw_records, draw_rejected
from tests.refine.outputs import make_record, write_output

HOSTILE = (
    "<script>document.body.innerHTML='OWNED'</script>",
    '" onerror="alert(1)" x=\'',
    "<img src=x onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "]]> --> </style></title></pre></details></html>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
)


class Page(HTMLParser):
    """Tags with attributes, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def rejected(number, **fields):
    pair = {
        "uid": f"{number:032x}", "source": "0.tar", "key": f"k{number}", "caption": "a caption",
        "reason": "refusal", "detail": "it says sorry", "raw": "I'm sorry", "attempts": 3,
    }  # fmt: skip
    return pair | fields


def render(directory, *options) -> str:
    assert main(["gallery", str(directory), *map(str, options)]) == 0
    return (directory / "gallery.html").read_text()


def hostile_record(number, text) -> Record:
    fields = dict.fromkeys(("desc", "neg_desc", "tags", "neg_tags"), (text, f"{text} and more"))
    image = make_record(number).image
    return Record(f"{number:032x}", image, caption=text, source=text, refiner=text, **fields)


def test_differing_words_of_a_pair_are_marked_wherever_it_stands(tmp_path):
    record = Record(
        "0" * 32,
        make_record(0).image,
        caption="the alt-text",
        desc=("a red apple on a table.", "the sky is blue"),
        neg_desc=("The sky is green", "nothing like it", "a red pear under a table."),
        tags=("red apple", "sky"),
        neg_tags=("red pear",),
    )
    page = render(write_output(tmp_path / "out", [[record]]))
    marked = re.findall(r"<mark><bdi>(.*?)</bdi></mark>", page)
    assert marked == ["apple on", "pear under", "blue", "green", "apple", "pear"]
    rows = re.findall(r'<div class="two">(.*?)</div></div>', page)
    plain = [re.sub(r"<.*?>", "|", row).replace("|", "") for row in rows]
    assert plain[:3] == [
        "a red apple on a table.a red pear under a table.",
        "the sky is blueThe sky is green",
        "nothing like it",
    ]


def test_a_negative_that_equals_its_positive_is_pointed_out(tmp_path):
    record = Record(
        "0" * 32, make_record(0).image, desc=("A red apple.",), neg_desc=("a red apple",),
        tags=("apple",), neg_tags=("pear",),
    )  # fmt: skip
    assert render(write_output(tmp_path / "out", [[record]])).count("same as the positive") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_outside_becomes_markup(tmp_path, text):
    directory = write_output(
        tmp_path / "out",
        [[hostile_record(1, text)]],
        [rejected(1, **dict.fromkeys(("caption", "reason", "detail", "raw", "key", "uid"), text))],
        counts={text: 3, "joined": 1},
        plan={"refiner": f"vllm:{text}:0123456789ab"},
        engine_stats={text: text},
        note=text,
    )
    page = Page(render(directory))
    tame = write_output(
        tmp_path / "tame",
        [[hostile_record(1, "tame")]],
        [rejected(1, **dict.fromkeys(("caption", "reason", "detail", "raw", "key", "uid"), "t"))],
        counts={"tame": 3, "joined": 1},
        plan={"refiner": "vllm:tame:0123456789ab"},
        engine_stats={"tame": "tame"},
        note="tame",
    )
    expected = Page(render(tame))
    names = lambda shown: [(tag, sorted(attributes)) for tag, attributes in shown.tags]
    assert names(page) == names(expected)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "a", "iframe", "object", "link"})
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1 and sources[0].startswith("data:image/jpeg;base64,")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(text) >= 12  # unchanged, as text


def test_the_policy_forbids_scripts_and_loads_before_anything_else_stands(tmp_path):
    page = render(write_output(tmp_path / "out", [[make_record(0)]]))
    policy = page.index("Content-Security-Policy")
    assert policy < page.index("<style")
    content = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in content.split(";"))
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
    }  # fmt: skip


def test_characters_that_cannot_be_seen_are_shown_by_number(tmp_path):
    text = "safe\u202egpj.exe\u202c zero\u200bwidth \x1b[31m nul\x00 \u2028 \ufeff soft\u00ad"
    page = render(write_output(tmp_path / "out", [[hostile_record(1, text)]]))
    assert not set(page) & set("\u202e\u202c\u200b\x1b\x00\u2028\ufeff\u00ad")
    for point in ("202E", "202C", "200B", "001B", "0000", "2028", "FEFF", "00AD"):
        assert f'<code class="point">U+{point}</code>' in page


def test_half_of_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    page = render(
        write_output(tmp_path / "out", [[make_record(0)]], [rejected(1, raw="\ud800 lone")])
    )
    assert "U+D800" in page


def test_long_texts_are_folded_and_cut(tmp_path):
    record = Record(
        "0" * 32, make_record(0).image, caption="x" * 100_000, desc=("y" * 100_000,),
        neg_desc=tuple(f"number {n}" for n in range(100)), tags=("z" * 100_000,),
    )  # fmt: skip
    page = render(write_output(tmp_path / "out", [[record]], [rejected(1, raw="w" * 100_000)]))
    assert len(page) < 100_000
    assert page.count("cut here: the text has 100,000 characters") == 4
    assert page.count("<details><summary>99,400 characters more") == 4
    assert "and 84 more, not shown" in page


def test_a_thumbnail_has_no_byte_of_the_file(tmp_path):
    noise = Image.effect_noise((800, 600), 80).convert("RGB")
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "EXIF<script>"
    noise.save(out, "JPEG", comment=b"COMMENT<script>", exif=exif, icc_profile=b"ICC<script>")
    encoded = out.getvalue() + b"TRAILER<script>"
    assert encoded.count(b"<script>") == 4
    small = thumbnail(encoded)
    assert b"<script>" not in small
    with Image.open(io.BytesIO(small)) as image:
        assert image.format == "JPEG" and image.size == (400, 300)
        assert not image.getexif() and "icc_profile" not in image.info


def test_a_picture_that_does_not_decode_says_so(tmp_path):
    record = Record("0" * 32, b"<svg onload=alert(1)>", caption="no picture")
    page = Page(render(write_output(tmp_path / "out", [[record]])))
    assert "UnidentifiedImageError" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_records_are_drawn_by_seed_and_no_others_are_read(tmp_path, monkeypatch):
    output = Output.open(
        write_output(
            tmp_path / "out", [[make_record(i) for i in range(k, k + 20)] for k in (0, 20)]
        )
    )
    read = []
    plain = Output.record
    monkeypatch.setattr(Output, "record", lambda self, n: read.append(n) or plain(self, n))
    first = draw_records(output, 5, seed=0)
    assert len(read) == 5 == len(set(read)) and read == sorted(read)
    assert draw_records(output, 5, seed=0) == first != draw_records(output, 5, seed=1)
    assert len(draw_records(output, 100, seed=0)) == 40
    drawn = {
        n for seed in range(60) for n in [read.clear(), draw_records(output, 5, seed), *read][2:]
    }
    assert drawn == set(range(40))


def test_rejected_pairs_are_drawn_by_seed_from_the_whole_file(tmp_path):
    output = Output.open(
        write_output(tmp_path / "out", [[make_record(0)]], [rejected(n) for n in range(30)])
    )
    keys = [pair.key for pair in draw_rejected(output, 4, seed=0)]
    assert keys == [pair.key for pair in draw_rejected(output, 4, seed=0)]
    assert keys == sorted(keys, key=lambda key: int(key[1:]))
    drawn = {pair.key for seed in range(60) for pair in draw_rejected(output, 4, seed)}
    assert drawn == {f"k{n}" for n in range(30)}
    assert len(draw_rejected(output, 100, seed=0)) == 30


def test_quarantine_shows_reason_output_counts_and_the_pictures_of_input(tmp_path, make):
    make.pairs(tmp_path / "in" / "0.tar", range(3))
    make.pairs(tmp_path / "in" / "1.tar", range(3, 6))
    pairs = [
        rejected(1, source="0.tar", key=f"{1:09d}", raw="{broken"),
        rejected(4, source="1.tar", key=f"{4:09d}"),
        rejected(5, source="1.tar", key="gone"),
    ]
    directory = write_output(
        tmp_path / "out", [[make_record(0)]], pairs, counts={"pairs": 4, "joined": 1}
    )
    page = render(directory, "--input", tmp_path / "in")
    shown = Page(page)
    images = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    expected = [thumbnail(make_record(0).image), *(thumbnail(make.image(n)) for n in (1, 4))]
    assert [b64decode(image) for image in images] == expected
    assert "{broken" in shown.text and "it says sorry" in shown.text
    assert "3 of 3 in quarantine" in shown.text and "pairs read" in shown.text
    assert shown.text.count("picture not at hand") == 1
    assert render(directory).count("picture not at hand") == 3


def test_lines_that_are_no_objects_are_shown_as_they_are(tmp_path):
    directory = write_output(tmp_path / "out", [[make_record(0)]])
    (directory / "quarantine.jsonl").write_text('<b>torn\n[1]\n{"reason": ["x"], "raw": null}\n')
    page = html.unescape(render(directory))
    assert "unreadable line" in page and "<b>torn" in page and "['x']" in page


def test_the_header_names_engine_model_and_prompt(tmp_path):
    directory = write_output(
        tmp_path / "out", [[make_record(0)]], plan={"refiner": "openai:org/model:8b:0123456789ab"},
        engine_stats={"images_per_second": 3.25, "answers": 1_234_567},
    )  # fmt: skip
    text = Page(render(directory, "-n", 1)).text
    assert "modelorg/model:8b" in text and "0123456789ab" in text and "openai" in text
    assert "images per second3.25" in text and "answers1,234,567" in text


def test_no_data_set_is_an_error_that_says_so(tmp_path, capfd):
    assert main(["gallery", str(tmp_path / "gone")]) == 2
    assert "is not a directory" in capfd.readouterr().err
    assert main(["gallery", "s3://bucket/out"]) == 2
    assert "not on a local disk" in capfd.readouterr().err


def test_real_photos(tmp_path, real_data, refine):
    out = tmp_path / "out"
    pairs = real_data / "grocery" / "pairs" / "val"
    assert refine("--engine", "rules", "--input", pairs, "--output", out) == 0
    page = render(out, "-n", 30, "--out", out / "gallery.html")
    assert page.count("<img ") == 30
    assert page.count("<mark>") > 10
