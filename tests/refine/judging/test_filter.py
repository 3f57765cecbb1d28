"""Records that pass rules on their scores, as a data set that is whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hqclip_jax.data.shards import open_source
from refine.__main__ import main
from refine.judging import scoring
from refine.judging.outputs import Output
from refine.judging.scores import CLIP_COLUMNS, About, Scores, fill
from refine.judging.verdicts import least_of_top
from tests.refine.judging.test_judge import Fake
from tests.refine.outputs import make_record, write_output

ROOT = Path(__file__).parents[3]
ABOUT = About("clip-rule", "clip", CLIP_COLUMNS, {"context": 77})
TABLE = {  # number: (desc, neg_desc, tags, neg_tags)
    0: (30, 20, 25, 24),
    1: (10, 5, 25, 10),
    2: (20, 25, 25, 10),
    3: (25, np.nan, 25, np.nan),
    4: (np.nan, np.nan, np.nan, np.nan),
    5: (40, 39, 25, 10),
}


class Table:
    """A CLIP that has its scores from a table, by the number in the alt-text."""

    about = ABOUT

    def __init__(self, *_):
        pass

    def scores(self, output: Output, numbers=None) -> Scores:
        return fill(output, self, numbers)

    def score(self, records):
        for number, record in records:
            row = TABLE[int(record.caption.split()[-1]) % 6]
            yield number, dict(zip(("desc", "neg_desc", "tags", "neg_tags"), row))

    def close(self):
        pass


@pytest.fixture(autouse=True)
def clip(monkeypatch):
    monkeypatch.setattr("refine.judging.clip.Clip", Table)


@pytest.fixture
def source(tmp_path):
    records = [make_record(i) for i in range(6)]
    plan = {"refiner": "vllm:student:0123456789ab"}
    shards = [records[:2], records[2:5], records[5:]]
    return write_output(tmp_path / "source", shards, plan=plan, note="by a student")


def run(source, target, *options) -> int:
    fixed = ("--clip", "x", "--workers", "1")
    return main(["filter", str(source), "--output", str(target), *fixed, *map(str, options)])


def sound(target) -> bool:
    """Whether every shard, record and picture is as it should be."""
    from hqclip_jax.data.check import main as check

    return check([str(target), "--workers", "1"]) == 0


def kept(target, records) -> list[int]:
    return [int(r.caption.split()[-1]) for r in records(target)]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--min-clip", 20), [0, 2, 3, 5]),
        (("--min-clip", 20.5), [0, 3, 5]),
        (("--keep-top", 0.4), [0, 5]),
        (("--keep-top", 0.41), [0, 3, 5]),  # of the five that have a score
        (("--keep-top", 1), [0, 1, 2, 3, 5]),
        (("--min-margin", 4), [0, 1, 2, 3, 5]),
        (("--min-margin", 4, "--bad-negative", "record"), [0, 1, 3]),
        (("--min-clip", 15, "--min-margin", 4, "--bad-negative", "record"), [0, 3]),
    ],
)
def test_rules(source, tmp_path, records, options, numbers):
    assert run(source, tmp_path / "new", *options) == 0
    assert kept(tmp_path / "new", records) == numbers


def test_a_weak_negative_goes_alone_and_the_rest_is_as_it_was(source, tmp_path, records, counts):
    assert run(source, tmp_path / "new", "--min-margin", 4) == 0
    found = {int(r.caption.split()[-1]): r for r in records(tmp_path / "new")}
    for number, record in found.items():
        expected = make_record(number)
        weak = {"neg_desc": (2, 5), "neg_tags": (0,)}
        empty = {name: () for name, numbers in weak.items() if number in numbers}
        assert vars(record) == vars(expected) | empty
    assert counts(tmp_path / "new") == {
        "pairs": 6, "joined": 5, "no_clip_score": 1, "negatives_dropped": 2,
        "negative_tags_dropped": 1,
    }  # fmt: skip


def test_the_new_data_set_is_whole_and_says_where_it_is_from(source, tmp_path, skipped, capsys):
    new = tmp_path / "new"
    assert run(source, new, "--keep-top", 0.4) == 0
    assert sound(new)
    manifest = json.loads((new / "manifest.json").read_text())
    assert (manifest["records"], manifest["engine"]) == (2, "test")
    assert manifest["plan"]["refiner"] == "vllm:student:0123456789ab"
    assert manifest["plan"]["rules"]["keep_top"] == 0.4
    assert manifest["plan"]["scorers"] == {"clip": "clip-rule"}
    assert manifest["filtered"] == {"directory": str(source), "least_of_top": 30}
    assert json.loads((new / "tag_counts.json").read_text()) == {
        "records": 2, "counts": {"picture": 2, "blue": 1, "red": 1},
    }  # fmt: skip
    named = {(skip["reason"], skip["uid"]) for skip in skipped(new)}
    reasons = {1: "not_in_top", 2: "not_in_top", 3: "not_in_top", 4: "no_clip_score"}
    assert named == {(reason, make_record(n).uid) for n, reason in reasons.items()}
    assert sorted(p.name for p in new.iterdir()) == [
        "dataset_info.json", "features.json", "manifest.json",
        "refined-train.array_record-00000-of-00001", "skipped.jsonl", "tag_counts.json",
    ]  # fmt: skip
    import tensorflow_datasets as tfds

    opened = tfds.builder_from_directory(new).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert [row["uid"].decode() for row in opened] == [make_record(n).uid for n in (0, 5)]


def test_a_record_is_counted_under_the_first_rule_that_it_fails(source, tmp_path, counts):
    assert run(source, tmp_path / "new", "--min-clip", 15, "--keep-top", 0.4) == 0
    assert counts(tmp_path / "new") == {
        "pairs": 6, "joined": 2, "no_clip_score": 1, "low_clip_score": 1, "not_in_top": 2,
    }  # fmt: skip


def test_a_judges_rules(source, tmp_path, records, counts, monkeypatch):
    answers = {}
    for n, (desc, neg_desc) in enumerate([(9, 0), (6, 0), (9, 5), ("?", 0), (8, "?"), (7, 3)]):
        record = make_record(n)
        for attempt in range(3):
            answers[", ".join(record.desc) + str(n), attempt] = str(desc)
            answers[", ".join(record.neg_desc) + str(n), attempt] = str(neg_desc)

    class ByNumber(Fake):
        def submit(self, request):
            number = request.key.partition(":")[0]
            super().submit(type(request)(**vars(request) | {"caption": request.caption + number}))

    monkeypatch.setattr(scoring, "_judge", lambda args: ByNumber(answers))
    judged = ("--judge-model", "y", "--min-judge", 7, "--max-negative-judge", 3)
    assert run(source, tmp_path / "new", *judged) == 0
    assert kept(tmp_path / "new", records) == [0, 2, 4, 5]
    assert [bool(r.neg_desc) for r in records(tmp_path / "new")] == [True, False, True, True]
    assert counts(tmp_path / "new") == {
        "pairs": 6, "joined": 4, "no_judge_score": 1, "low_judge_score": 1, "negatives_dropped": 1,
    }  # fmt: skip


def test_small_shards_are_joined_and_large_ones_split(source, tmp_path):
    assert run(source, tmp_path / "one", "--min-clip", 0) == 0
    assert [s.records for s in open_source(tmp_path / "one").shards] == [5]
    assert run(source, tmp_path / "many", "--min-clip", 0, "--shard-mb", 0.001) == 0
    assert [s.records for s in open_source(tmp_path / "many").shards] == [1] * 5


def test_workers_make_no_difference(source, tmp_path, read_tree):
    for name, workers in (("one", 1), ("two", 2)):
        assert run(source, tmp_path / name, "--keep-top", 0.7, "--workers", workers) == 0
    one, two = read_tree(tmp_path / "one"), read_tree(tmp_path / "two")
    assert one == two


def test_a_complete_one_is_left_alone(source, tmp_path, read_tree, capfd):
    assert run(source, tmp_path / "new", "--keep-top", 0.7) == 0
    before = read_tree(tmp_path / "new")
    assert run(source, tmp_path / "new", "--keep-top", 0.7) == 0
    assert read_tree(tmp_path / "new") == before
    assert "complete already" in capfd.readouterr().err
    assert run(source, tmp_path / "new", "--keep-top", 0.6) == 2
    assert "other arguments (rules" in capfd.readouterr().err


@pytest.mark.parametrize(
    "where",
    [
        "refine.judging.sieve.gather",
        "refine.judging.sieve.write_shards",
        "refine.judging.sieve.write_metadata",
    ],
)
def test_a_stop_leaves_nothing_that_looks_finished_and_a_rerun_goes_on(
    source, tmp_path, read_tree, monkeypatch, where
):
    new = tmp_path / "new"
    with monkeypatch.context() as patched:
        patched.setattr(where, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(source, new, "--keep-top", 0.7) == 130
    assert not (new / "manifest.json").exists()
    assert main(["gallery", str(new)]) == 2
    with monkeypatch.context() as patched:
        patched.setattr("refine.judging.sieve.make_part", lambda *_: pytest.fail("made again"))
        assert run(source, new, "--keep-top", 0.7) == 0
    assert run(source, tmp_path / "whole", "--keep-top", 0.7) == 0
    assert read_tree(new) == read_tree(tmp_path / "whole")


def test_other_rules_for_a_half_finished_one_are_refused(source, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        patched.setattr(
            "refine.judging.sieve.gather", lambda *_, **__: (_ for _ in ()).throw(OSError("x"))
        )
        assert run(source, tmp_path / "new", "--keep-top", 0.7) == 2
    assert run(source, tmp_path / "new", "--keep-top", 0.5) == 2
    assert "was begun with other arguments (rules" in capfd.readouterr().err


KILLED = """
import sys
from refine.judging.outputs import Output
from refine.judging.sieve import Rules, Sieve, sift
from tests.refine.judging.test_filter import ABOUT
source = Output.open(__import__("pathlib").Path(sys.argv[1]))
sift(Sieve(source, __import__("pathlib").Path(sys.argv[2]), Rules(min_clip=15), {"clip": ABOUT}))
"""


@pytest.mark.slow
def test_twenty_kills(tmp_path, read_tree):
    """Killed at moments spread over its whole length, the same command ends with the same bytes."""
    records = [make_record(i) for i in range(1200)]
    source = write_output(tmp_path / "source", [records[i : i + 20] for i in range(0, 1200, 20)])
    Table().scores(Output.open(source))
    command = [sys.executable, "-c", KILLED, str(source)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True)
    seconds = time.monotonic() - began
    new, kills = tmp_path / "new", 0
    moments = iter(np.random.default_rng(0).uniform(0.4, 1.0, 20) * seconds)
    while kills < 20:
        process = subprocess.Popen([*command, str(new)], env=environment)
        try:
            process.wait(next(moments))
            new.rename(tmp_path / f"done-{kills}")  # it was done: another one
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (new / "manifest.json").exists() or sound(new)
        kills += 1
    subprocess.run([*command, str(new)], env=environment, check=True)
    for finished in (new, *tmp_path.glob("done-*")):
        assert read_tree(finished) == read_tree(tmp_path / "whole")


def test_nothing_passes(source, tmp_path, capfd):
    assert run(source, tmp_path / "new", "--min-clip", 99) == 2
    assert "no record passes: loosen the rules" in capfd.readouterr().err
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_folder_with_other_things_is_left_alone(source, tmp_path, capfd):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("x")
    assert run(source, tmp_path / "new", "--min-clip", 1) == 2
    assert "holds other files (thesis.txt)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give a rule"),
        (("--bad-negative", "record"), "give a rule"),
        (("--keep-top", "0"), "0 is not a share"),
        (("--keep-top", "1.1"), "1.1 is not a share"),
        (("--min-clip", "nan"), "nan is no number"),
        (("--min-judge", "7"), "need --judge-model"),
    ],
)
def test_arguments_that_make_no_sense(source, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run(source, tmp_path / "new", *options)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_rule_on_clip_needs_a_checkpoint(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["filter", str(source), "--output", str(tmp_path / "new"), "--min-clip", "1"])
    assert "need --clip DIR" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("seed", range(8))
def test_the_least_of_the_top_is_exact(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 10.0 ** rng.integers(-3, 4), 1000).astype(np.float32)
    scores[rng.random(1000) < 0.2] = np.nan
    scores[rng.random(1000) < 0.2] = rng.choice(scores[~np.isnan(scores)])
    there = np.sort(scores[~np.isnan(scores)])[::-1]
    for share in (1e-6, 0.1, 0.5, 0.8, 0.999, 1.0):
        found = least_of_top(lambda: np.array_split(scores, 7), share)
        assert np.float32(found) == there[int(np.ceil(share * len(there))) - 1]


def test_the_least_of_nothing_lets_nothing_pass():
    assert least_of_top(lambda: [np.full(3, np.nan, np.float32)], 0.5) == np.inf
    assert least_of_top(list, 0.5) == np.inf
