import csv
import json

import numpy as np
import pytest

from hqclip_jax.evals.outcome import Failure, Items, Outcome
from hqclip_jax.evals.results import (
    ResultsError,
    not_numbers,
    read_results,
    scores_of,
    write_results,
)

KEYS = np.array(["/d/0.tar:a", "/d/0.tar:b", "/d/0.tar:ü"])


def outcome() -> Outcome:
    scores = {
        "top1": 2 / 3, "top1_chance": 0.1, "mean_per_class": 0.5, "mean_per_class_chance": 0.1,
        "tie_rate": 0.0, "top1/a=1": 0.5, "n/a=1": 2, "n": 3, "classes": 10,
    }  # fmt: skip
    values = np.array([1, 1, 0], np.float32)
    items = {
        "top1": Items(KEYS, values, clusters=np.array([0, 0, 1])),
        "mean_per_class": Items(KEYS, values, np.array([4, 4, 9])),
    }
    found = Outcome(scores, "top1", items)
    found.skips.add("image does not decode", "/d/0.tar:c")
    return found


def write(folder, results):
    scores = {n: scores_of(r) for n, r in results.items() if isinstance(r, Outcome)}
    return write_results(folder, {"step": 3}, results, scores)


def test_csv_round_trip(tmp_path):
    evil = 'set, "quoted"\n<b>'
    write(tmp_path, {evil: outcome(), "gone": Failure("x, y\nis missing")})
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = [*csv.DictReader(file)]
    assert [line["set"] for line in lines] == [evil] * 4 + ["gone"]
    read = {line["score"]: line for line in lines[:4]}
    for score in scores_of(outcome()):
        line = read[score.name]
        assert float(line["value"]) == score.value
        assert line["main"] == str(int(score.name == "top1"))
        for field in ("chance", "low", "high"):
            value = getattr(score, field)
            assert (float(line[field]) if line[field] else None) == value
        assert (int(line["n"]), line["left_out"], line["error"]) == (score.n, "1", "")
    assert lines[4]["error"] == "x, y\nis missing" and lines[4]["value"] == ""


def test_counts_and_chance_levels_are_no_scores():
    found = {s.name: s for s in scores_of(outcome())}
    assert [*found] == ["top1", "mean_per_class", "tie_rate", "top1/a=1"]
    assert found["tie_rate"].low is None  # nobody kept the answers
    # Nor which of a category's are about one picture, so that Wilson's would be too narrow.
    assert found["top1/a=1"].n == 2 and found["top1/a=1"].low is None
    assert found["top1"].main and not found["mean_per_class"].main


def test_answers_round_trip_whatever_the_sets_name(tmp_path):
    name = "../<script>/a b"
    write(tmp_path / "out", {name: outcome()})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (file,) = (tmp_path / "out" / "items").iterdir()
    with np.load(file, allow_pickle=False) as arrays:
        assert {a.dtype.kind for a in arrays.values()} <= {"U", "f", "i"}
    stored = read_results(tmp_path / "out")
    assert stored.about["step"] == 3
    read = stored.items(name)
    for score, items in outcome().items.items():
        for field in ("keys", "values", "groups", "clusters"):
            expected, found = getattr(items, field), getattr(read[score], field)
            assert (expected is None) == (found is None)
            assert expected is None or np.array_equal(expected, found)


def test_json_holds_left_out_and_columns_and_nothing_temporary_stays(tmp_path):
    path = write(tmp_path, {"imagenet1k": outcome(), "gone": Failure("e")})
    whole = json.loads(path.read_text())
    assert whole["results"]["gone"] == {"error": "e"}
    assert whole["results"]["imagenet1k"]["left_out"] == {
        "image does not decode": {"count": 1, "first": ["/d/0.tar:c"]}
    }
    assert whole["datacomp"]["imagenet"] == {
        "mean": pytest.approx(2 / 3), "have": 1, "of": 1, "missing": [],
    }  # fmt: skip
    assert whole["datacomp"]["average38"]["of"] == 38
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "imagenet1k.npz", "items", "results.csv", "results.json",
    ]  # fmt: skip


def test_no_file_ever_says_nan(tmp_path):
    broken = Outcome({"top1": float("nan"), "n": 1}, "top1")
    assert not_numbers(broken) == ["top1"] and not_numbers(outcome()) == []
    with pytest.raises(ValueError):
        write(tmp_path, {"x": broken})
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: f.unlink(), "is missing: evaluate again"),
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "is broken"),
        (lambda f: f.write_bytes(b""), "is broken"),
        (lambda f: np.savez(f, **{"top1.keys": KEYS}), "no answers, or not one for each key"),
        (
            lambda f: np.savez(f, **{"top1.keys": KEYS[:2], "top1.values": np.ones(3)}),
            "not one for each key",
        ),
        (
            lambda f: np.savez(f, **{"top1.keys": KEYS[[0, 0]], "top1.values": np.ones(2)}),
            "have one key",
        ),
        (
            lambda f: np.savez(f, **{"top1.keys": KEYS, "top1.values": np.ones(3)}),
            "different evaluations",
        ),
        (
            lambda f: np.savez(f, **{"top1.keys": np.array([object()]), "top1.values": np.ones(1)}),
            "is broken",
        ),
    ],
)
def test_damaged_answers_say_what_is_wrong(tmp_path, damage, message):
    write(tmp_path, {"x": outcome()})
    damage(tmp_path / "items" / "x.npz")
    with pytest.raises(ResultsError, match=message):
        read_results(tmp_path).items("x")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "is missing: give the --out folder"),
        ("{", "is not JSON"),
        ("[]", "another version"),
        ('{"results": {"x": {"top1": 1.0}}}', "another version"),
    ],
)
def test_other_folders_say_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_results(tmp_path)
