import csv
import json
import os
import tracemalloc

import numpy as np
import pytest

from refine.errors import RefineError
from refine.inputs import folders
from refine.inputs.folders import AHEAD, LINE_BYTES, pieces, read_rows
from refine.inputs.pairs import Pair, Skip, uid_of
from refine.inputs.stores import look


@pytest.fixture
def folder(tmp_path, make):
    (tmp_path / "images/deep").mkdir(parents=True)
    for number in range(10):
        (tmp_path / f"images/{number}.jpg").write_bytes(make.image(number))
    (tmp_path / "images/deep/10.jpg").write_bytes(make.image(10))
    return tmp_path


def read(path) -> list[Pair | Skip]:
    cut = pieces(look(str(path)))
    return [item for piece in cut for item in read_rows(path, str(path.parent), "list", piece)]


def listing(folder, text: str | bytes, name: str = "list.csv"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(folder, name: str, rows: list[dict]):
    """Writes rows as a CSV, TSV or JSONL."""
    path = folder / name
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


ROWS = [
    {"file_name": "images/1.jpg", "caption": 'A "red" apple,\n no\t1', "uid": "A" * 32},
    {"file_name": "./images//deep/10.jpg", "caption": "caf\u00c3\u00a9 &amp;amp; bar", "uid": "x"},
    {"file_name": "images/2.jpg", "caption": "", "uid": ""},
]


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "metadata.CSV"])
def test_pairs_come_in_order_from_every_form(folder, make, name):
    assert read(table(folder, name, ROWS)) == [
        Pair("a" * 32, make.image(1), 'A "red" apple, no 1', "list", "images/1.jpg"),
        Pair(uid_of("x", None, ""), make.image(10), "café & bar", "list", "./images//deep/10.jpg"),
        Pair(uid_of(None, make.image(2), ""), make.image(2), "", "list", "images/2.jpg"),
    ]


@pytest.mark.parametrize("path", ["file_name", "image", "path", "filepath", "FilePath "])
@pytest.mark.parametrize("caption", ["caption", "text", "txt", "alt_text", "title", "TITLE"])
def test_columns_are_found_by_name(folder, make, path, caption):
    path_csv = listing(folder, f"x,{path},{caption}\n7,images/1.jpg,An apple\n")
    assert [p.caption for p in read(path_csv)] == ["An apple"]


def test_a_missing_column_is_told_with_those_there_are(folder):
    with pytest.raises(
        RefineError, match=r"list\.csv has no column file_name or .* it holds a, text"
    ):
        read(listing(folder, "a,text\n1,2\n"))
    with pytest.raises(RefineError, match=r"no column caption or .* it holds image, b"):
        read(listing(folder, '{"image": "1", "b": 2}\n', "list.jsonl"))
    with pytest.raises(RefineError, match="it holds none"):
        read(listing(folder, ""))


def test_marks_and_ends_of_lines(folder):
    text = "\ufefffile_name,caption\r\n\r\nimages/1.jpg,one\r\n\r\nimages/2.jpg,two"
    assert [p.caption for p in read(listing(folder, text))] == ["one", "two"]
    text = '\ufeff{"image": "images/1.jpg", "text": "one"}\r\n \n{"image": "images/2.jpg"}'
    assert [p.caption for p in read(listing(folder, text, "list.jsonl"))] == ["one", ""]
    with pytest.raises(RefineError, match=r"list\.csv is in UTF-16: save it as UTF-8"):
        read(listing(folder, "file_name,caption\n".encode("utf-16")))


def test_bytes_that_are_no_utf8_spoil_one_caption(folder):
    path = listing(folder, b"file_name,caption\nimages/1.jpg,caf\xe9\nimages/2.jpg,\xc3\xa9\n")
    assert [p.caption for p in read(path)] == ["caf\ufffd", "é"]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ("images/11.jpg,a", "missing_image", "no such file"),
        ("images,a", "missing_image", "no such file"),
        ("images/1.jpg/x,a", "missing_image", "no such file"),
        ("pipe,a", "missing_image", "no such file"),
        ("loop,a", "missing_image", ""),
        ("x" * 5000 + ",a", "missing_image", "OSError"),
        ("../secret,a", "malformed_row", "the path leads out of the folder"),
        ("images/../../secret,a", "malformed_row", "the path leads out of the folder"),
        ("/etc/passwd,a", "malformed_row", "the path leads out of the folder"),
        ("link,a", "malformed_row", "a link that leads out"),
        ("linked/secret,a", "malformed_row", "a link that leads out"),
        ("a\0b,a", "malformed_row", "leads out of the folder"),
        (".,a", "malformed_row", "leads out of the folder"),
        (",a", "malformed_row", "the image's path is ''"),
        ("images/2.jpg", "malformed_row", "1 fields, 2 columns"),
        ("images/2.jpg,a,b", "malformed_row", "3 fields, 2 columns"),
        ("images/2.jpg," + "x" * 131_073, "malformed_row", "field larger than field limit"),
        (
            "images/2.jpg," + "x" * LINE_BYTES,
            "malformed_row",
            "a line of more than 1,048,576 bytes",
        ),
        ("x" * 3 * LINE_BYTES, "malformed_row", "a line of more than 1,048,576 bytes"),
    ],
)
def test_a_row_that_is_no_pair_costs_no_other(folder, row, reason, detail):
    (folder / "inside").mkdir()
    root = folder / "inside"
    (folder / "images").rename(root / "images")
    (folder / "secret").write_bytes(b"secret")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "link").symlink_to("../secret")
    (root / "linked").symlink_to("..")
    text = f"file_name,caption\nimages/1.jpg,one\n{row}\nimages/3.jpg,three\n"
    first, bad, last = read(listing(root, text))
    assert (first.caption, last.caption) == ("one", "three")
    assert (bad.reason, bad.source) == (reason, "list")
    assert detail in bad.detail
    assert len(bad.line()) < 1500


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("{", "at byte 44: Expecting property name"),
        ("[1]", "a list, no object"),
        ("{}", "the image's path is None"),
        ("[" * 100_000, "recursion"),
        ('{"image": 7, "text": "a"}', "the image's path is 7"),
        ('{"image": "images/2.jpg", "text": ["a"]}', "caption is a list, not a string"),
        ('{"image": "\\ud800", "text": "a"}', ""),
        ('{"image": "images/2.jpg", "text": ' + "9" * 5000 + "}", "limit"),
    ],
)
def test_a_line_that_is_no_object_costs_no_other(folder, line, detail):
    good = '{"image": "images/1.jpg", "text": "An one"}'
    first, bad, last = read(listing(folder, f"{good}\n{line}\n{good}\n", "list.jsonl"))
    assert first == last
    if "image" not in line:
        again = read(listing(folder, f"{line}\n{good}\n", "list.jsonl"))
        assert [item.reason for item in again[:-1]] == ["malformed_row"]
        assert again[-1] == first
    assert bad.reason == ("missing_image" if "ud800" in line else "malformed_row")
    assert detail in bad.detail


def test_a_lone_surrogate_does_not_reach_a_record(folder):
    line = '{"image": "images/1.jpg", "text": "an \\ud800 apple", "id": "\\udfff"}'
    (pair,) = read(listing(folder, line, "list.jsonl"))
    assert pair.caption == "an \ufffd apple"
    assert len(pair.uid) == 32


def test_a_missing_image_keeps_the_uid_it_has(folder):
    rows = [{"image": "none.jpg", "text": "a", "uid": uid} for uid in ("b" * 32, "7", None)]
    skips = read(table(folder, "list.jsonl", rows))
    assert [s.uid for s in skips] == ["b" * 32, uid_of("7", None, ""), ""]
    assert {s.key for s in skips} == {"none.jpg"}


def test_a_link_inside_the_folder_is_followed(folder, make):
    (folder / "link.jpg").symlink_to("images/1.jpg")
    (pair,) = read(listing(folder, "image,text\nlink.jpg,a\n"))
    assert pair.image == make.image(1)


def test_an_open_quote_swallows_no_more_than_a_field_may_hold(folder):
    rows = "".join(f"images/{n % 10}.jpg,caption {n}\n" for n in range(20_000))
    found = read(listing(folder, f'image,text\nimages/1.jpg,"open\n{rows}'))
    assert [s.reason for s in found if isinstance(s, Skip)] == ["malformed_row"]
    assert len(found) > 14_000
    assert found[-1].caption == "caption 19999"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_pieces_are_the_whole(folder, monkeypatch, suffix, rows):
    path = table(folder, "list" + suffix, [ROWS[n % 3] for n in range(7)])
    with open(path, "ab") as file:
        file.write(b'\n\n"bad\n\n\n')
    whole = read(path)
    assert len(whole) == 8
    monkeypatch.setattr(folders, "PIECE_ROWS", rows)
    cut = pieces(look(str(path)))
    assert len(cut) == -(-8 // rows)
    assert [a[1] for a in cut[:-1]] == [b[0] for b in cut[1:]]
    assert read(path) == whole


def test_no_rows_give_no_piece(folder):
    assert pieces(look(str(listing(folder, "image,text\n\n\n")))) == []
    assert pieces(look(str(listing(folder, "", "list.jsonl")))) == []


def test_reading_may_end_early(folder):
    path = table(folder, "list.csv", ROWS * 40)
    (piece,) = pieces(look(str(path)))
    items = read_rows(path, str(folder), "list", piece)
    assert next(items).key == "images/1.jpg"
    items.close()


def test_few_images_are_held_at_once(folder):
    (folder / "big.jpg").write_bytes(bytes(1 << 20))
    path = listing(folder, "image,text\n" + "big.jpg,a\n" * 300)
    (piece,) = pieces(look(str(path)))
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, str(folder), "list", piece))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300
    assert peak < (AHEAD + 8) << 20


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_bytes_changed_at_random_crash_nothing(folder, suffix):
    path = table(folder, "list" + suffix, ROWS * 5)
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    reasons = set()
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(len(data) // 4, len(data), rng.integers(1, 9)):
            data[at] = rng.choice(np.frombuffer(b'\0\n\r",\t\\{}[]:\xff/.ab0', np.uint8))
        path.write_bytes(data)
        for item in read(path):
            reasons.add(item.reason if isinstance(item, Skip) else "pair")
    assert reasons == {"pair", "malformed_row", "missing_image"}


def test_a_listing_that_went_stops_the_run(folder):
    with pytest.raises(RefineError, match=r"none\.csv can't be opened"):
        list(read_rows(folder / "none.csv", str(folder), "list", (0, 1)))
