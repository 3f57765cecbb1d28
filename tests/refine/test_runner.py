"""Whole runs over rendered tars: counts, order, restart, refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path, make):
    """Three tars of pairs 0-29 and their annotations in another order, in two tars."""
    order = np.random.default_rng(0).permutation(30)
    for i in range(3):
        make.pairs(tmp_path / f"pairs/{i}.tar", range(10 * i, 10 * i + 10))
    for i, numbers in enumerate(np.split(order, 2)):
        make.annotations(tmp_path / f"notes/{i}.tar", numbers)
    return (
        "--input",
        tmp_path / "pairs",
        "--engine",
        "annotations",
        "--annotations",
        tmp_path / "notes",
    )


def test_every_field_of_a_record(tmp_path, make, small, refine, records):
    out = tmp_path / "out"
    assert refine(*small, "--output", out, "--annotator", "m") == 0
    found = records(out)
    assert [r.uid for r in found] == [make.uid(n) for n in range(30)]
    for n, record in enumerate(found):
        assert vars(record) == {
            "uid": make.uid(n),
            "image": make.image(n),
            "caption": f"A red apple no {n}",
            "desc": (f"an apple of number {n}.", "it is & red."),
            "neg_desc": (f"a pear of number {n}.",),
            "tags": (f"tag {n % 3}", "Fruit"),
            "neg_tags": ("stone",),
            "width": 24,
            "height": 16,
            "source": f"{n // 10}.tar",
            "refiner": "annotations:m:-",
        }
    tags = json.loads((out / "tag_counts.json").read_text())
    assert tags == {"records": 30, "counts": {"fruit": 30, "tag 0": 10, "tag 1": 10, "tag 2": 10}}
    assert sorted(p.name for p in out.iterdir()) == [
        "dataset_info.json", "features.json", "manifest.json",
        "refined-train.array_record-00000-of-00001", "skipped.jsonl", "tag_counts.json",
    ]  # fmt: skip


def test_everything_that_is_no_record_is_counted_and_named(
    tmp_path, make, refine, counts, skipped, records
):
    good = [make.pair(n) for n in range(20)]
    good[3][0] = ("000000003.jpg", make.image(3)[:-60])
    good[4] = good[4][1:]  # no image
    good[5][2] = ("000000005.json", b"{")
    good[6][2] = ("000000006.json", b"{}")
    good[7][0] = ("000000007.jpg", make.image(7, size=(400, 400)))
    first = make.tar(tmp_path / "0.tar", [m for pair in good[:10] for m in pair])
    second = make.tar(
        tmp_path / "1.tar", [m for pair in (*good[10:], make.pair(2), make.pair(3)) for m in pair]
    )
    third = make.pairs(tmp_path / "2.tar", [11, 50])
    data = third.read_bytes()
    third.write_bytes(data[: data.index(b"000000050.json") + 520])
    notes = make.annotations(tmp_path / "a.tar", [*range(10), *range(12, 20), 12, 60, 61])
    broken = json.dumps(make.texts(11) | {"desc": "no list"}).encode()
    more = make.tar(tmp_path / "b.tar", [(f"0/{make.uid(11)}.json", broken), ("0/x.json", b"{}")])
    out = tmp_path / "out"
    assert refine(
        "--engine", "annotations", "--input", first, second, third, "--annotations", notes, more,
        "--output", out, "--skip-pixels", 159_999,
    ) == 0  # fmt: skip
    assert counts(out) == {
        "pairs": 24,
        "joined": 14,
        "duplicate_uid": 1,  # 2; the second 3 is good and the first was not
        "missing_annotation": 1,  # 10
        "malformed_annotation": 2,  # 11, twice
        "missing_image": 1,
        "corrupt_image": 1,
        "image_too_large": 1,
        "malformed_json": 1,
        "no_uid": 2,  # 6, and 50, whose JSON is cut off
        "broken_tar": 1,
        "annotations": 21,
        "annotation_without_pair": 4,  # 5 and 6, whose uid could not be read; 60, 61
        "duplicate_annotation": 1,
        "annotation_without_uid": 1,
    }
    named = [(s["reason"], s.get("source"), s.get("uid")) for s in skipped(out)]
    uid = make.uid
    assert named[:-6] == [
        ("corrupt_image", "0.tar", uid(3)),
        ("missing_image", "0.tar", uid(4)),
        ("malformed_json", "0.tar", None),
        ("no_uid", "0.tar", None),
        ("image_too_large", "0.tar", uid(7)),
        ("missing_annotation", "1.tar", uid(10)),
        ("malformed_annotation", "1.tar", uid(11)),
        ("duplicate_uid", "1.tar", uid(2)),
        ("malformed_annotation", "2.tar", uid(11)),
        ("no_uid", "2.tar", None),
        ("broken_tar", "2.tar", None),
    ]
    assert named[-6:-4] == [
        ("annotation_without_uid", "b.tar", None),
        ("duplicate_annotation", None, uid(12)),
    ]
    assert {u for _, _, u in named[-4:]} == {uid(5), uid(6), uid(60), uid(61)}
    kept = [0, 1, 2, 8, 9, *range(12, 20), 3]
    assert [r.uid for r in records(out)] == [uid(n) for n in kept]
    assert {r.source for r in records(out)} == {"0.tar", "1.tar"}


@pytest.mark.parametrize("plain", [False, True])
def test_a_subset_keeps_its_uids(tmp_path, make, small, refine, counts, skipped, records, plain):
    wanted = [*range(5, 15), 100, 101]
    uids = make.subset(tmp_path / "u.npy", wanted, plain)
    make.annotations(tmp_path / "notes/2.tar", [100, 200])
    out = tmp_path / "out"
    assert refine(*small, "--uids", uids, "--output", out) == 0
    assert [r.uid for r in records(out)] == [make.uid(n) for n in range(5, 15)]
    assert counts(out) == {
        "pairs": 30,
        "joined": 10,
        "not_in_subset": 20,
        "annotations": 32,
        "annotation_without_pair": 1,  # 100; 200 is not wanted
        "uids_without_pair": 2,
    }
    assert skipped(out) == [{"reason": "annotation_without_pair", "uid": make.uid(100)}]


@pytest.mark.parametrize("buckets", [8, 2])
def test_counts_hold_whichever_table_has_more_buckets(
    tmp_path, make, small, refine, counts, skipped, monkeypatch, buckets
):
    from refine import uids

    monkeypatch.setattr(uids, "BUCKET_ROWS", buckets)
    make.annotations(tmp_path / "notes/2.tar", range(100, 140))
    if buckets == 2:
        make.pairs(tmp_path / "pairs/3.tar", [*range(30), *range(1000, 1100)])
    assert refine(*small, "--output", tmp_path / "out") == 0
    found = counts(tmp_path / "out")
    assert (found["joined"], found["annotation_without_pair"]) == (30, 40)
    assert found.get("duplicate_uid", 0) == (30 if buckets == 2 else 0)
    absent = {
        s["uid"] for s in skipped(tmp_path / "out") if s["reason"] == "annotation_without_pair"
    }
    assert absent == {make.uid(n) for n in range(100, 140)}


def test_the_result_does_not_depend_on_the_workers(tmp_path, make, small, refine, read_tree):
    make.pairs(tmp_path / "pairs/3.tar", [4, 40])  # a duplicate, so that a shard is copied
    make.annotations(tmp_path / "notes/3.tar", [40])
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        assert refine(*small, "--output", out, "--shard-mb", "0.004", workers=workers) == 0
    one, two = read_tree(tmp_path / "out1"), read_tree(tmp_path / "out2")
    assert one == two
    assert len([name for name in one if "array_record" in name]) > 4


def test_limit_reads_the_first_pairs_in_order(tmp_path, make, small, refine, counts, records):
    out = tmp_path / "out"
    assert refine(*small, "--limit", 13, "--output", out, workers=2) == 0
    assert [r.uid for r in records(out)] == [make.uid(n) for n in range(13)]
    assert counts(out) == {"pairs": 13, "joined": 13, "annotations": 30}


def test_a_complete_output_is_left_and_other_arguments_refused(
    tmp_path, make, small, refine, read_tree, capfd
):
    out = tmp_path / "out"
    assert refine(*small, "--output", out) == 0
    before = read_tree(out)
    assert refine(*small, "--output", out, workers=2) == 0
    assert "complete already" in capfd.readouterr().err
    for other in (
        (*small, "--annotator", "m"),
        (*small, "--limit", 5),
        (*small, "--shard-mb", 1),
        (*small, "--name", "x"),
        (*small[:2], "--engine", "rules"),
        ("--input", tmp_path / "pairs/0.tar", *small[2:]),
    ):
        assert refine(*other, "--output", out) == 2
        message = capfd.readouterr().err
        assert "begun with other arguments" in message and "choose another --output" in message
    assert read_tree(out) == before


def test_a_begun_output_is_not_mixed_with_changed_inputs(tmp_path, make, small, refine, capfd):
    out = tmp_path / "out"
    assert refine(*small, "--output", out) == 0
    begun = tmp_path / "begun"
    (begun / ".parts").mkdir(parents=True)
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    (begun / ".parts/run.json").write_text(json.dumps(plan | {"input": "of another day"}))
    assert refine(*small, "--output", begun) == 2
    assert "other arguments (input" in capfd.readouterr().err


def test_an_output_that_holds_something_else_is_refused(tmp_path, small, refine, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert refine(*small, "--output", out) == 2
    assert "holds other files (thesis.tex)" in capfd.readouterr().err
    (out / "manifest.json").write_text("{}")
    assert refine(*small, "--output", out) == 2
    assert "manifest.json is not of `refine run`" in capfd.readouterr().err


def test_two_runs_do_not_write_to_one_output(tmp_path, small, refine, capfd):
    from refine.storage import locked

    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    with locked(out / ".parts/lock", wait=False):
        assert refine(*small, "--output", out) == 2
    assert "another run is writing" in capfd.readouterr().err
    assert refine(*small, "--output", out) == 0


def test_no_record_at_all_is_an_error_that_says_where_to_look(tmp_path, make, refine, capfd):
    tar = make.tar(tmp_path / "0.tar", [m for m in make.pair(0) if "jpg" not in m[0]])
    out = tmp_path / "out"
    assert refine("--engine", "rules", "--input", tar, "--output", out) == 2
    assert "no pair became a record" in capfd.readouterr().err
    assert "missing_image" in (out / "skipped.jsonl").read_text()
    assert not (out / "manifest.json").exists()


def test_a_shared_index_is_kept(tmp_path, small, refine, read_tree):
    for out in ("a", "b"):
        assert refine(*small, "--output", tmp_path / out, "--index", tmp_path / "index") == 0
    assert (tmp_path / "index/index.json").exists()
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b")


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "refine", "run", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, happened) -> bool:
    """Kills when something has happened; False if the process was faster."""
    while process.poll() is None:
        if happened():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("moment", ["first part", "tenth part", "third shard"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, make, refine, read_tree, moment):
    for i in range(20):
        numbers = [*range(40 * i, 40 * i + 40), 40 * i - 1 if i % 3 == 2 else 10_000 + i]
        make.pairs(tmp_path / f"pairs/{i:02d}.tar", numbers)
    make.annotations(tmp_path / "notes/0.tar", range(20 * 40))
    arguments = (
        "--input", tmp_path / "pairs", "--engine", "annotations",
        "--annotations", tmp_path / "notes", "--shard-mb", "0.05",
    )  # fmt: skip
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    assert refine(*arguments, "--output", unbroken) == 0

    def happened() -> bool:
        parts = len(list((out / ".parts").glob("??????")))
        shards = len(list(out.glob("*.array_record-*")))
        return {
            "first part": parts >= 1,
            "tenth part": parts >= 10,
            "third shard": shards >= 3,
        }[moment]

    workers = 2 if moment == "tenth part" else 1
    for _ in range(10):
        if kill_when(start(*arguments, "--output", out, "--workers", workers), happened):
            break
        shutil.rmtree(out)  # it was done before the kill: once more
    assert not (out / "manifest.json").exists()
    assert (out / ".parts/run.json").exists()
    assert refine(*arguments, "--output", out, workers=1) == 0
    assert read_tree(out) == read_tree(unbroken)


def test_finished_tars_are_not_read_again(tmp_path, make, small, refine, read_tree, monkeypatch):
    from refine import runner

    out = tmp_path / "out"
    assert refine(*small, "--output", tmp_path / "unbroken") == 0
    monkeypatch.setattr(runner, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert refine(*small, "--output", out) == 130
    monkeypatch.undo()
    shutil.rmtree(out / ".parts/000001")
    (out / ".parts/000001.tmp-77").mkdir()
    made = []
    original = runner.make_part
    monkeypatch.setattr(runner, "make_part", lambda m, n: made.append(n) or original(m, n))
    assert refine(*small, "--output", out) == 0
    assert made == [1]
    assert read_tree(out) == read_tree(tmp_path / "unbroken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written(tmp_path, small, refine, capfd):
    tmp_path.joinpath("locked").mkdir(mode=0o500)
    assert refine(*small, "--output", tmp_path / "locked/out") == 2
    assert "can't be written: Permission denied" in capfd.readouterr().err


def test_an_output_under_a_file(tmp_path, small, refine, capfd):
    (tmp_path / "file").write_text("")
    assert refine(*small, "--output", tmp_path / "file/out") == 2
    assert "can't be written: Not a directory" in capfd.readouterr().err
