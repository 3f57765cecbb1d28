import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine.errors import RefineError
from refine.inputs import folders, parquet, tars
from refine.inputs.find import Input, find, fingerprint
from refine.inputs.pairs import Pair, Skip, read_pairs
from tests.refine.buckets import bucket, server  # noqa: F401 (fixtures)


def write_parquet(make, path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [make.image(n) for n in numbers]
    captions = [f"A red apple no {n}" for n in numbers]
    uids = [make.uid(n) for n in numbers]
    rows = pa.table({"jpg": images, "caption": captions, "uid": uids})
    pq.write_table(rows, path, row_group_size=2)
    return path


def write_folder(make, path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,caption,uid"]
    for n in numbers:
        (path.parent / f"{n}.jpg").write_bytes(make.image(n))
        lines.append(f"{n}.jpg,A red apple no {n},{make.uid(n)}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tree(tmp_path, make):
    make.pairs(tmp_path / "tars/1.tar", [1])
    make.pairs(tmp_path / "tars/0.tar", [0])
    write_parquet(make, tmp_path / "tars/0.parquet", [0])  # as img2dataset leaves it
    (tmp_path / "tars/0_stats.json").write_text("{}")
    write_parquet(make, tmp_path / "rows/b.parquet", [3, 4])
    write_parquet(make, tmp_path / "rows/a.parquet", [5])
    (tmp_path / "rows/readme.csv").write_text("no listing")
    write_folder(make, tmp_path / "files/list.csv", [6, 7])
    return tmp_path


def contents(found: list[Input]) -> list[tuple[str, str]]:
    return [(i.kind, i.name) for i in found]


def test_what_a_folder_means(tree):
    assert contents(find([str(tree / "tars")])) == [("tar", "0.tar"), ("tar", "1.tar")]
    names = [("parquet", "a.parquet"), ("parquet", "b.parquet")]
    assert contents(find([str(tree / "rows")])) == names
    assert contents(find([str(tree / "files")])) == [("folder", "list.csv")]


def test_names_may_be_in_capitals(tree):
    (tree / "files/list.csv").rename(tree / "files/LIST.CSV")
    (tree / "tars/1.tar").rename(tree / "tars/1.TAR")
    found = find([str(tree / "files"), str(tree / "tars")])
    assert contents(found)[::2] == [("folder", "files/LIST.CSV"), ("tar", "tars/1.TAR")]
    assert [len(list(i.pairs())) for i in found] == [2, 1, 1]


def test_arguments_keep_their_order_and_each_file_counts_once(tree, monkeypatch):
    given = ["rows/b.parquet", "tars/*.tar", "files", "tars", "files/list.csv", "row?"]
    found = find([str(tree / each) for each in given])
    expected = [
        ("parquet", "rows/b.parquet"),
        ("tar", "tars/0.tar"),
        ("tar", "tars/1.tar"),
        ("folder", "files/list.csv"),
        ("parquet", "rows/a.parquet"),
    ]
    assert contents(found) == expected
    monkeypatch.chdir(tree / "files")
    relative = find(["../rows/b.parquet", "../tars", "list.csv", "../rows"])
    assert contents(relative) == expected
    assert [list(i.pairs()) for i in relative] == [list(i.pairs()) for i in found]


def test_every_kind_gives_the_same_pairs(tree, make):
    (listed,) = find([str(tree / "files")])
    rows, images = find([str(tree / "rows")]), [make.image(n) for n in range(8)]
    found = [pair for i in (*rows, listed) for pair in i.pairs()]
    assert [(p.uid, p.image, p.caption, p.source, p.key) for p in found] == [
        (make.uid(n), images[n], f"A red apple no {n}", source, key)
        for n, source, key in [
            (5, "a.parquet", "0"),
            (3, "b.parquet", "0"),
            (4, "b.parquet", "1"),
            (6, "list.csv", "6.jpg"),
            (7, "list.csv", "7.jpg"),
        ]
    ]
    (tar,) = find([str(tree / "tars/1.tar")])
    assert list(tar.pairs()) == list(read_pairs(tree / "tars/1.tar", "1.tar"))


def test_inputs_travel_to_other_processes(tree):
    found = find([str(tree / "files"), str(tree / "tars")])
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(pickle.dumps(found[0])) < 500


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("none", r"--input .*none: no such file, and nothing matches it"),
        ("none*.tar", r"--input .*none\*\.tar: no such file"),
        (
            "empty",
            r"--input .*empty: the directory holds no \*\.tar, no \*\.parquet and no listing",
        ),
        ("tars/*", r"tars/\*: .*0_stats\.json is of no known kind: expected \*\.tar"),
        ("many", r"many holds several listings \(a\.csv, b\.jsonl\): name one of them"),
        ("many/a.csv", r"a\.csv lists no image"),
        ("many/b.jsonl", r"b\.jsonl has no column caption"),
    ],
)
def test_what_can_not_be_used_is_told(tree, argument, message):
    (tree / "empty").mkdir()
    (tree / "many").mkdir()
    (tree / "many/a.csv").write_text("image,text\n")
    (tree / "many/b.jsonl").write_text('{"image": "1"}')
    with pytest.raises(RefineError, match=message):
        find([str(tree / "tars"), str(tree / argument)])


def test_a_compressed_tar_is_told_when_it_is_read(tree):
    (tree / "tars/2.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    found = find([str(tree / "tars")])
    assert contents(found)[-1] == ("tar", "2.tar.gz")
    with pytest.raises(RefineError, match="gunzip"):
        list(found[-1].pairs())


def test_a_count_is_of_pairs_and_of_what_can_not_be_used(tree, make):
    broken = tree / "tars/0.tar"
    make.tar(broken, [*make.pair(1), ("9.jpg", make.image(1)), *make.pair(2)])
    data = broken.read_bytes()
    broken.write_bytes(data[: data.index(b"000000002.json") + 520])
    (tar,) = find([str(broken)])
    reasons = [getattr(item, "reason", "pair") for item in tar.pairs()]
    assert reasons == ["pair", "no_uid", "no_uid", "broken_tar"]
    assert [tar.count(limit) for limit in (0, 1, 3, 99)] == [0, 1, 3, 3]
    rows = tree / "rows/b.parquet"
    data = rows.read_bytes()
    rows.write_bytes(data[:-1])
    (cut,) = find([str(rows)])
    assert [item.reason for item in cut.pairs()] == ["broken_parquet"]
    assert cut.count(9) == 0


def test_the_fingerprint_of_tars_is_that_of_the_files(tree):
    found = find([str(tree / "tars")])
    paths = [tree / "tars/0.tar", tree / "tars/1.tar"]
    for times in (False, True):
        assert fingerprint(found, times) == tars.fingerprint(paths, times)


def test_the_fingerprint_sees_sizes_pieces_and_if_asked_times(tree, make, monkeypatch):
    def seen(times=False):
        return fingerprint(find([str(tree / "files"), str(tree / "rows")]), times)

    plain, timed = seen(), seen(times=True)
    size = sum((tree / n).stat().st_size for n in ("files/list.csv", "rows/a.parquet"))
    assert plain["files"] == 3
    assert plain["bytes"] == size + (tree / "rows/b.parquet").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "PIECE_BYTES", 1)
        patch.setattr(folders, "PIECE_ROWS", 1)
        assert seen()["sha256"] != plain["sha256"]
        assert seen() | {"sha256": ""} == plain | {"sha256": ""}
    write_folder(make, tree / "files/list.csv", range(6, 13))
    sums = set()
    for rows in (4, 5):  # two pieces each
        monkeypatch.setattr(folders, "PIECE_ROWS", rows)
        sums.add(seen()["sha256"])
    assert len(sums) == 2
    plain, timed = seen(), seen(times=True)
    os.utime(tree / "rows/a.parquet", (1, 1))
    assert seen() == plain
    assert seen(times=True) != timed
    (tree / "files/list.csv").write_text((tree / "files/list.csv").read_text() + "\n")
    assert seen() != plain


def test_pieces_give_what_the_whole_does(tree, monkeypatch):
    given = [str(tree / "files"), str(tree / "rows/b.parquet"), str(tree / "tars")]
    separate = [list(i.pairs()) for i in find(given)]
    whole = [pair for pairs in separate for pair in pairs]
    monkeypatch.setattr(parquet, "PIECE_BYTES", 1)
    monkeypatch.setattr(folders, "PIECE_ROWS", 1)
    found = find(given)
    assert len(found) > len(separate)
    assert [pair for i in found for pair in i.pairs()] == whole


@pytest.fixture
def remote(bucket, make):
    """All kinds in a bucket."""
    for n in range(2):
        make.pairs(bucket.root / f"all/tars/{n}.tar", [n])
    write_parquet(make, bucket.root / "all/rows/a.parquet", range(2, 7))
    write_folder(make, bucket.root / "all/files/list.csv", [7, 8, 9])
    with open(bucket.root / "all/files/list.csv", "a") as file:
        file.write("\nnone.jpg,a,\n../tars/0.tar,b,\n")
    return bucket


GIVEN = ["all/tars/*.tar", "all/rows", "all/files/list.csv"]


def test_a_bucket_gives_what_the_local_folder_does(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PIECE_ROWS", 2)
    here = find([str(remote.root / each) for each in GIVEN])
    there = find([f"{remote.url}/{each}" for each in GIVEN])
    assert contents(there) == contents(here)
    assert fingerprint(there) == fingerprint(here)
    assert fingerprint(there, times=True) != fingerprint(here, times=True)
    fetched = [i.local(tmp_path / "scratch") for i in there]
    expected = [list(i.pairs()) for i in here]
    assert [list(i.pairs()) for i in fetched] == expected
    assert [i.count(9) for i in fetched] == [len(pairs) for pairs in expected]
    reasons = [item.reason for pairs in expected for item in pairs if isinstance(item, Skip)]
    assert reasons == ["missing_image", "malformed_row"]


def test_a_large_file_in_a_bucket_is_not_cut(remote, monkeypatch):
    monkeypatch.setattr(parquet, "PIECE_BYTES", 1)
    assert [i.piece for i in find([f"{remote.url}/all/rows"])] == [None]
    assert remote.asked("a.parquet") == 0


def test_folders_and_patterns_in_a_bucket(remote):
    names = [("tar", "tars/0.tar"), ("tar", "tars/1.tar"), ("parquet", "rows/a.parquet")]
    given = [f"{remote.url}/all/t*", f"{remote.url}/**/*.parquet", f"{remote.url}/all/tars/1.tar"]
    assert contents(find(given)) == names
    for argument, message in [
        ("all/none", "no such file, and nothing matches it"),
        ("all/none/*.tar", "no such file, and nothing matches it"),
        ("all", "the directory holds no"),
        ("all/files/7.jpg", "of no known kind"),
    ]:
        with pytest.raises(RefineError, match=message) as told:
            find([f"{remote.url}/{argument}"])
        assert f"--input {remote.url}/{argument}: " in str(told.value)


def test_a_copy_is_kept_until_it_is_released(remote, tmp_path):
    tar, listed = find([f"{remote.url}/all/tars/0.tar", f"{remote.url}/all/files"])
    scratch = tmp_path / "scratch"
    copy = tar.local(scratch)
    assert copy.local(scratch) == copy  # local already
    remote.asked("0.tar")
    assert tar.local(scratch) == copy
    assert remote.asked("0.tar") == 0
    copy.release(scratch)  # not the input that was made local: nothing
    assert os.path.exists(copy.address)
    tar.release(scratch)
    tar.release(scratch)
    assert not os.path.exists(copy.address)
    first = list(tar.local(scratch).pairs())
    assert [type(item) for item in first] == [Pair]
    listing = listed.local(scratch)
    listed.release(scratch)  # its other pieces need it
    assert os.path.exists(listing.address)


def test_a_remote_file_is_not_read_by_mistake(remote):
    (tar,) = find([f"{remote.url}/all/tars/0.tar"])
    with pytest.raises(ValueError, match="is not local"):
        tar.pairs()


def test_an_image_that_a_store_refuses_stops_the_run(remote, tmp_path):
    (listed,) = find([f"{remote.url}/all/files"])
    remote.breaks("all/files/8.jpg", 403)
    items = listed.local(tmp_path).pairs()
    assert next(items).key == "7.jpg"
    with pytest.raises(RefineError, match=r"8\.jpg can't be read"):
        next(items)


def test_real_photos_are_the_same_in_every_kind(real_data, tmp_path):
    tar = sorted((real_data / "grocery/pairs/test").glob("*.tar"))[0]
    (given,) = find([str(tar)])
    pairs = [item for item, _ in zip(given.pairs(), range(100)) if isinstance(item, Pair)]
    rows = [{"image": p.image, "caption": p.caption, "uid": p.uid} for p in pairs]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = ["file_name\tcaption\tuid"]
    for p in pairs:
        (tmp_path / f"{p.uid}.jpg").write_bytes(p.image)
        lines.append(f"{p.uid}.jpg\t{p.caption}\t{p.uid}")
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    expected = [(p.uid, p.image, p.caption) for p in pairs]
    assert len(expected) > 50
    for each in find([str(tmp_path / "a.parquet"), str(tmp_path / "list.tsv")]):
        assert [(p.uid, p.image, p.caption) for p in each.pairs()] == expected
