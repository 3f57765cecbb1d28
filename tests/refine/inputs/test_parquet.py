import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine.errors import RefineError
from refine.inputs import parquet
from refine.inputs.pairs import Pair, Skip, uid_of
from refine.inputs.parquet import pieces, read_rows
from refine.inputs.stores import look

ROWS = 40


def table(make, numbers, image="jpg", caption="caption", **columns) -> pa.Table:
    images = [make.image(n) for n in numbers]
    captions = [f"A red apple &amp; pear no {n}" for n in numbers]
    return pa.table({image: images, caption: captions} | columns)


def write(path, rows: pa.Table, **options):
    pq.write_table(rows, path, **({"row_group_size": 8} | options))
    return path


def read(path, groups=None) -> list[Pair | Skip]:
    return list(read_rows(path, "a.parquet", groups))


@pytest.fixture
def written(tmp_path, make):
    numbers = range(ROWS)
    return write(tmp_path / "a.parquet", table(make, numbers, uid=[make.uid(n) for n in numbers]))


@pytest.fixture
def expected(make) -> list[Pair]:
    return [
        Pair(make.uid(n), make.image(n), f"A red apple & pear no {n}", "a.parquet", str(n))
        for n in range(ROWS)
    ]


def test_rows_come_in_order_with_the_bytes_received(written, expected):
    assert read(written) == expected
    assert read(written, (2, 4)) == expected[16:32]


def test_the_form_of_hugging_face(tmp_path, make):
    images = [{"bytes": make.image(1), "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None]
    rows = pa.table({"image": images, "text": ["one", "two", "three"], "id": ["a", "b", None]})
    pair, *skips = read(write(tmp_path / "a.parquet", rows))
    assert pair == Pair(uid_of("a", None, ""), make.image(1), "one", "a.parquet", "0")
    assert [(s.reason, s.key, s.uid) for s in skips] == [
        ("missing_image", "1", uid_of("b", None, "")),
        ("missing_image", "2", ""),
    ]


@pytest.mark.parametrize(
    ("image", "caption", "uid"),
    [
        (pa.binary(), pa.string(), pa.string()),
        (pa.large_binary(), pa.large_string(), pa.large_string()),
        (pa.binary(3), pa.dictionary(pa.int32(), pa.string()), pa.int64()),
        (pa.binary(), pa.binary(), pa.binary()),
        (pa.binary(), pa.binary(), pa.dictionary(pa.int8(), pa.string())),
    ],
)
def test_columns_of_every_fitting_type(tmp_path, image, caption, uid):
    given = {
        "Image": pa.array([b"abc"], image),
        "CAPTION": pa.array(["a b"]).cast(caption),
        "Key": pa.array([7]).cast(pa.string()).cast(uid) if uid != pa.int64() else [7],
    }
    assert read(write(tmp_path / "a.parquet", pa.table(given))) == [
        Pair(uid_of("7", None, ""), b"abc", "a b", "a.parquet", "0")
    ]


def test_of_several_columns_the_first_name_that_fits_counts(tmp_path, make):
    rows = table(make, [1], caption="text", image="image_bytes", id=["x"], key=["y"])
    rows = rows.append_column("image", [["http://a/1.jpg"]]).append_column("caption", [[["list"]]])
    (pair,) = read(write(tmp_path / "a.parquet", rows))
    assert (pair.image, pair.caption) == (make.image(1), "A red apple & pear no 1")
    assert pair.uid == uid_of("x", None, "")


def test_of_equal_names_the_first_counts(tmp_path):
    rows = pa.table({"JPG": [b"1"], "jpg": [b"2"], "text": ["one"], "Text": ["two"]})
    (pair,) = read(write(tmp_path / "a.parquet", rows))
    assert (pair.image, pair.caption) == (b"1", "one")


def test_without_an_id_image_and_caption_make_the_uid(tmp_path, make):
    (pair,) = read(write(tmp_path / "a.parquet", table(make, [1])))
    assert pair.uid == uid_of(None, make.image(1), "A red apple &amp; pear no 1")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("jpg", r"a\.parquet has no column of the images' bytes.*it holds caption \(string\)"),
        (
            "caption",
            r"no column of the captions as text, named caption or text or .*jpg \(binary\)",
        ),
    ],
)
def test_a_missing_column_is_told_with_those_there_are(tmp_path, make, dropped, message):
    rows = table(make, [1], url=["http://a"]).drop_columns([dropped])
    with pytest.raises(RefineError, match=message) as told:
        read(write(tmp_path / "a.parquet", rows))
    assert "url (string)" in str(told.value)


def test_a_path_is_no_image(tmp_path):
    rows = pa.table({"image": ["1.jpg"], "caption": ["one"]})
    with pytest.raises(RefineError, match=r"holds image \(string\), caption \(string\)"):
        read(write(tmp_path / "a.parquet", rows))


def test_text_that_is_no_text(tmp_path, make):
    bad = pa.array([b"caf\xc3\xa9 \xff", None, b""]).view(pa.string())
    rows = pa.table({"jpg": [b"1", b"2", b"3"], "caption": bad})
    assert [p.caption for p in read(write(tmp_path / "a.parquet", rows))] == ["café \ufffd", "", ""]


def test_only_the_columns_needed_are_read(tmp_path, make, expected):
    rows = table(make, range(ROWS), uid=[make.uid(n) for n in range(ROWS)], junk=["x" * 99] * ROWS)
    path = write(tmp_path / "a.parquet", rows)
    data = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    for number in range(metadata.num_row_groups):
        junk = metadata.row_group(number).column(3)
        start = junk.dictionary_page_offset or junk.data_page_offset
        data[start : start + junk.total_compressed_size] = bytes(junk.total_compressed_size)
    path.write_bytes(data)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert read(path) == expected


def test_a_broken_row_group_costs_no_other(written, expected):
    data = bytearray(written.read_bytes())
    chunk = pq.read_metadata(written).row_group(2).column(0)
    data[chunk.data_page_offset :][:4] = b"\xff" * 4
    data[chunk.data_page_offset : chunk.data_page_offset + 20] = bytes(20)
    written.write_bytes(data)
    found = read(written)
    assert [p for p in found if isinstance(p, Pair)] == expected[:16] + expected[24:]
    (broken,) = (s for s in found if isinstance(s, Skip))
    assert (broken.reason, broken.source) == ("broken_parquet", "a.parquet")
    assert broken.detail.startswith("row group 2 from row 16 on: ")


def test_a_changed_byte_is_seen_by_its_checksum(tmp_path):
    rows = pa.table({"jpg": [b"0123456789"] * 8, "caption": ["a"] * 8})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    options["write_page_checksum"] = True
    path = write(tmp_path / "a.parquet", rows, **options)
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"0123456780", 1))
    (broken,) = read(path)
    assert "CRC" in broken.detail


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -9])
def test_a_cut_file_is_broken(written, keep):
    written.write_bytes(written.read_bytes()[:keep])
    (broken,) = read(written)
    assert (broken.reason, broken.source) == ("broken_parquet", "a.parquet")


def test_what_can_not_be_opened_stops_the_run(tmp_path):
    with pytest.raises(RefineError, match=r"none\.parquet can't be opened"):
        read(tmp_path / "none.parquet")


def test_no_rows(tmp_path, make):
    assert read(write(tmp_path / "a.parquet", table(make, [1]).slice(0, 0))) == []


def test_pieces_are_the_whole(written, expected, monkeypatch):
    file = look(str(written))
    assert pieces(file) == [None]
    sizes = [parquet._stored_bytes(pq.read_metadata(written).row_group(n)) for n in range(5)]
    monkeypatch.setattr(parquet, "PIECE_BYTES", sum(sizes[:2]))
    cut = pieces(file)
    assert cut == [(0, 2), (2, 4), (4, 5)]
    assert [pair for piece in cut for pair in read(written, piece)] == expected
    monkeypatch.setattr(parquet, "PIECE_BYTES", 1)
    assert pieces(file) == [(n, n + 1) for n in range(5)]


def test_a_large_file_that_is_broken_is_one_piece(written, monkeypatch):
    monkeypatch.setattr(parquet, "PIECE_BYTES", 1)
    written.write_bytes(written.read_bytes()[:-2] + b"xx")
    assert pieces(look(str(written))) == [None]


MUTATE = """
import sys, numpy as np
from pathlib import Path
from refine.errors import RefineError
from refine.inputs.parquet import read_rows
from refine.inputs.pairs import Pair, Skip
path, whole = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
rng, seen = np.random.default_rng(7), {"whole": 0, "broken": 0, "refused": 0}
for trial in range(300):
    data = bytearray(whole)
    # Half of them in the footer, which rules all the rest.
    low = 0 if trial % 2 else len(data) - 2500
    for at in rng.integers(low, len(data), rng.integers(1, 6)):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
        items = list(read_rows(path, "a", None))
    except RefineError:
        seen["refused"] += 1
        continue
    assert all(isinstance(i, (Pair, Skip)) for i in items)
    seen["broken" if any(isinstance(i, Skip) for i in items) else "whole"] += 1
print(seen)
"""


def test_bytes_changed_at_random_crash_nothing(written):
    # In a process of its own: what fails here may end it.
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, written], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = eval(done.stdout)
    assert seen["broken"] > 50, seen


GROWTH = """
import sys
from pathlib import Path
from refine.inputs.parquet import read_rows
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
import pyarrow.compute, pyarrow.parquet
start = peak = resident()
items = read_rows(Path(sys.argv[1]), "a", None)
for rows, _ in enumerate(items, 1):
    peak = max(peak, resident())
print(rows, peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_group_is_not_read_at_once(tmp_path):
    image = np.random.default_rng(0).bytes(100_000)
    rows = pa.table({"jpg": [image] * 1000, "caption": ["an apple"] * 1000})
    path = write(
        tmp_path / "a.parquet", rows, row_group_size=1000, write_batch_size=8, use_dictionary=False
    )
    assert path.stat().st_size > 90e6
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, path], capture_output=True, text=True, timeout=120
    )
    count, megabytes = done.stdout.split()
    assert int(count) == 1000
    assert float(megabytes) < 60
