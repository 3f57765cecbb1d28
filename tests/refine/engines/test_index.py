import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from refine import uids
from refine.engines.index import AnnotationIndex
from refine.errors import RefineError
from refine.uids import ENTRY

ROOT = Path(__file__).parents[3]


def names(index: AnnotationIndex) -> list[tuple[str, str]]:
    return [(skip.reason, skip.key or skip.uid) for skip in index.skips()]


def test_shuffled_annotations_are_all_found(tmp_path, make, monkeypatch):
    monkeypatch.setattr(uids, "BUCKET_ROWS", 8)  # many buckets from few entries
    order = np.random.default_rng(0).permutation(200)
    tars = [
        make.annotations(tmp_path / f"{i}.tar", part) for i, part in enumerate(np.split(order, 4))
    ]
    index = AnnotationIndex.build(tmp_path / "index", tars, 1)
    assert index.table.buckets == 32
    for n in range(200):
        assert json.loads(index.read(make.uid(n))) == make.texts(n)
    assert index.read(make.uid(200)) is None
    assert index.counts == {
        "annotations": 200,
        "duplicate_annotation": 0,
        "annotation_without_uid": 0,
        "broken_annotation_tar": 0,
    }
    assert not list(index.skips())


def test_the_first_of_two_annotations_counts_and_the_others_are_named(tmp_path, make):
    texts = [json.dumps({"n": n}).encode() for n in range(3)]
    member = f"000000/{make.uid(5)}.json"
    first = make.tar(
        tmp_path / "b.tar", [("x/readme.txt", b"?"), (member, texts[0]), (member, texts[1])]
    )
    second = make.tar(tmp_path / "a.tar", [(member.upper().replace("JSON", "json"), texts[2])])
    index = AnnotationIndex.build(tmp_path / "index", [first, second], 1)
    assert index.read(make.uid(5)) == texts[0]
    assert index.counts["annotations"] == 1
    assert sorted(names(index)) == [
        ("annotation_without_uid", "x/readme.txt"),
        ("duplicate_annotation", make.uid(5)),
        ("duplicate_annotation", make.uid(5)),
    ]
    index = AnnotationIndex.build(tmp_path / "other", [second, first], 1)
    assert index.read(make.uid(5)) == texts[2]


def test_a_broken_tar_keeps_what_it_holds(tmp_path, make):
    path = make.annotations(tmp_path / "a.tar", [1, 2])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(make.uid(2).encode()) + 520])
    index = AnnotationIndex.build(tmp_path / "index", [path], 1)
    assert index.read(make.uid(1)) is not None
    assert index.read(make.uid(2)) is None
    assert (index.counts["annotations"], index.counts["broken_annotation_tar"]) == (1, 1)


def test_an_index_is_kept_until_a_tar_changes(tmp_path, make):
    path = make.annotations(tmp_path / "a.tar", [1])
    AnnotationIndex.build(tmp_path / "index", [path], 1)
    bucket = tmp_path / "index/table/bucket-00000.bin"
    built = bucket.stat().st_ino, bucket.stat().st_mtime_ns
    AnnotationIndex.build(tmp_path / "index", [path], 1)
    assert (bucket.stat().st_ino, bucket.stat().st_mtime_ns) == built
    make.annotations(path, [2])
    os.utime(path, ns=(1, 1))
    index = AnnotationIndex.build(tmp_path / "index", [path], 1)
    assert index.read(make.uid(1)) is None
    assert index.read(make.uid(2)) is not None


def test_an_unfinished_index_is_built_anew(tmp_path, make):
    path = make.annotations(tmp_path / "a.tar", [1])
    AnnotationIndex.build(tmp_path / "index", [path], 1)
    (tmp_path / "index/index.json").unlink()
    (tmp_path / "index/table/bucket-00000.bin").write_bytes(b"half")
    (tmp_path / "index/scans").mkdir()
    assert AnnotationIndex.build(tmp_path / "index", [path], 1).read(make.uid(1)) is not None


def test_errors_name_the_file_and_the_mend(tmp_path, make):
    plain = make.annotations(tmp_path / "a.tar", [1])
    packed = tmp_path / "b.tar"  # compressed under an innocent name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(RefineError, match=r"b\.tar is compressed.*gunzip"):
        AnnotationIndex.build(tmp_path / "index", [plain, packed], 1)
    empty = make.tar(tmp_path / "c.tar", [("0.jpg", b"")])
    with pytest.raises(RefineError, match="hold no annotation: expected NNNNNN"):
        AnnotationIndex.build(tmp_path / "index", [empty], 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    with pytest.raises(RefineError, match=r"--index .*home holds other files \(thesis\.tex\)"):
        AnnotationIndex.build(tmp_path / "home", [plain], 1)
    assert (tmp_path / "home/thesis.tex").exists()


MEASURE = """
import sys, time
from pathlib import Path
from refine.engines.index import AnnotationIndex
def peak():
    # Not getrusage: its maximum is inherited from the parent through exec.
    return next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))
start = time.process_time()
before = peak()
index = AnnotationIndex.build(Path(sys.argv[1]) / "index", [Path(sys.argv[1]) / "a.tar"], 1)
print(before, peak(), index.counts["annotations"], round(1e6 * (time.process_time() - start)))
"""


@pytest.mark.slow
def test_memory_of_a_large_index(tmp_path):
    """300,000 annotations: what building adds to the process is the working set of a bucket, far
    from the hundreds of bytes a dictionary entry takes."""
    n = 300_000
    header = bytearray(tarfile.TarInfo("000000/" + "0" * 32 + ".json").tobuf(tarfile.USTAR_FORMAT))
    header[124:135] = b"%011o" % 2
    header[148:156] = b" " * 8
    body = b"{}" + bytes(510)
    rest = sum(header) - 32 * ord("0")
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.tar", "wb") as tar:
        for _ in range(n):
            uid = rng.bytes(16).hex().encode()
            header[7:39] = uid
            header[148:156] = b"%06o\0 " % (rest + sum(uid))
            tar.write(header + body)
        tar.write(bytes(1024))
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after, found, microseconds = map(int, out.stdout.split())
    assert found == n
    stored = sum(p.stat().st_size for p in (tmp_path / "index/table").iterdir())
    assert stored == n * ENTRY.itemsize
    print(
        f"{(after - before) / 1024:.0f} MiB of memory, {stored / n:.0f} bytes of disk and "
        f"{microseconds / n:.0f} us of CPU a record"
    )
    # One batch of 300,000 entries is 9.2 MiB; grouping and sorting hold a few copies of it.
    assert after - before < 64 * 1024
