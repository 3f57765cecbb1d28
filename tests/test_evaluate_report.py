"""`evaluate` and `evaluate compare`, from a checkpoint to the pages."""

import csv
import json

import numpy as np
import pytest

from hqclip_jax import evaluate
from hqclip_jax.evals.compare import labels
from hqclip_jax.evals.outcome import Failure, Outcome
from tests.evals.colours import write_tar
from tests.test_evaluate import checkpoint, data, run  # noqa: F401
from tests.test_report import Reader

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """Results of the three kinds of sets, with a class and captions that no one should trust."""
    from tests.evals.colours import COLOURS, picture, write_classification

    folder = tmp_path_factory.mktemp("evaluated")
    write_classification(folder / "zs", {c: i for i, c in enumerate(COLOURS)})
    (folder / "zs" / "classnames.txt").write_text("\n".join([*COLOURS][:-1] + [EVIL]))
    members = {}
    for colour in COLOURS:
        members[f"{colour}.png"] = picture(colour) if colour != "cyan" else b"no picture"
        stored = {"captions": [f"a {colour} wall {EVIL}", colour], "negative_caption": f"a {EVIL}"}
        members[f"{colour}.json"] = json.dumps(stored)
    write_tar(folder / "pairs.tar", members)
    sets = [
        {"task": "zeroshot", "name": "imagenet1k", "path": "zs"},
        {"task": "retrieval", "name": f"walls {EVIL}", "path": "pairs.tar"},
        {"task": "hard_negatives", "name": "grey", "path": "pairs.tar"},
    ]
    (folder / "suite.json").write_text(json.dumps({"sets": sets}))
    assert run(checkpoint, folder / "suite.json", folder / "a") == 0
    return folder


def test_all_files_are_written_and_agree(evaluated):
    out = evaluated / "a"
    assert sorted(p.name for p in out.iterdir()) == [
        "items", "report.html", "results.csv", "results.json",
    ]  # fmt: skip
    stored = json.loads((out / "results.json").read_text())
    assert (
        stored["datacomp"]["imagenet"]["mean"] == stored["results"]["imagenet1k"]["scores"]["top1"]
    )
    assert (stored["step"], stored["samples"]) == (3, 3 * 4096)
    with (out / "results.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            scores = stored["results"][line["set"]]["scores"]
            assert float(line["value"]) == scores[line["score"]]
            if line["low"]:
                assert float(line["low"]) <= float(line["value"]) <= float(line["high"])
    assert len([*(out / "items").iterdir()]) == 3


def test_the_report_shows_sets_pictures_and_what_was_left_out(evaluated):
    page = (evaluated / "a" / "report.html").read_text()
    assert "<script" not in page
    reader = Reader(page)
    told = {*reader.cells()}
    assert {"Beside the paper", "Left out", "imagenet1k", "grey", "+ HQ-CLIP, ViT-B/32"} <= told
    assert any("image does not decode" in text for text in told)
    assert any(text.startswith("Text to image") for text in told)
    sources = [value for tag, name, value in reader.attributes if (tag, name) == ("img", "src")]
    assert len(sources) > 10 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert "no picture" not in told  # all that was asked for was found


def test_no_report_reads_no_set_twice(checkpoint, evaluated, monkeypatch):
    def never(*_):
        raise AssertionError("a second pass")

    monkeypatch.setattr(evaluate, "pictures", never)
    assert run(checkpoint, evaluated / "zs", evaluated / "quick", "--no-report") == 0
    names = sorted(p.name for p in (evaluated / "quick").iterdir())
    assert names == ["items", "results.csv", "results.json"]


def test_scores_that_are_no_numbers_fail_their_set_alone():
    class Broken:
        name = "broken"

        def run(self, embedder):
            return Outcome({"top1": float("nan"), "n": 0}, "top1")

    class Embedder:
        on_embedded = None

    results = evaluate.run_suite(Embedder(), [Broken()])
    assert results == {"broken": Failure("these scores are no numbers: top1")}


def compare(*arguments):
    return evaluate.main(["compare", *map(str, arguments)])


def other_answers(folder, to):
    """A copy of the results in which one more class of five is found."""
    stored = json.loads((folder / "results.json").read_text())
    (to / "items").mkdir(parents=True)
    for file in (folder / "items").iterdir():
        with np.load(file) as arrays:
            fields = dict(arrays)
        if file.name == "imagenet1k.npz":
            for score in ("top1", "mean_per_class"):
                wrong = np.flatnonzero(fields[f"{score}.values"] == 0)
                fields[f"{score}.values"][wrong[0]] = 1
                stored["results"]["imagenet1k"]["scores"][score] += 0.2
        np.savez(to / "items" / file.name, **fields)
    (to / "results.json").write_text(json.dumps(stored))


def test_compare_end_to_end(evaluated, capsys):
    other_answers(evaluated / "a", evaluated / "b")
    out = evaluated / "compared"
    assert compare(evaluated / "a", evaluated / "b", f"--out={out}", "--pictures", "--all") == 0
    printed = capsys.readouterr().out
    assert "b (B) against a (A)" in printed and "unclear" in printed
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.json"]
    (told,) = json.loads((out / "compare.json").read_text())["comparisons"]
    top1 = told["scores"]["imagenet1k"]["top1"]
    assert top1["difference"]["value"] == pytest.approx(0.2)
    assert (top1["won"], top1["lost"], top1["both"], top1["main"]) == (1, 0, 5, True)
    assert top1["difference"]["verdict"] == "unclear"  # of one changed answer
    assert told["datacomp"]["imagenet"]["difference"]["value"] == pytest.approx(0.2)
    assert told["scores"]["grey"]["accuracy"]["difference"]["value"] == 0
    page = (out / "compare.html").read_text()
    assert "<script" not in page
    reader = Reader(page)
    assert {"B won 1:", "What changed sides: b against a"} <= {*reader.cells()}
    assert len([1 for tag, name, _ in reader.attributes if (tag, name) == ("img", "src")]) == 1


def test_compare_of_three_and_a_set_that_one_of_them_lacks(checkpoint, evaluated, capsys):
    if not (evaluated / "b").exists():
        other_answers(evaluated / "a", evaluated / "b")
    stored = json.loads((evaluated / "a" / "results.json").read_text())
    stored["results"] = {"imagenet1k": stored["results"]["imagenet1k"]}
    other = evaluated / "fewer"
    (other / "items").mkdir(parents=True, exist_ok=True)
    (other / "results.json").write_text(json.dumps(stored))
    file = "items/imagenet1k.npz"
    (other / file).write_bytes((evaluated / "a" / file).read_bytes())
    assert compare(evaluated / "a", evaluated / "b", other) == 1
    assert "not compared: the second was not evaluated on it" in " ".join(
        capsys.readouterr().out.split()
    )
    whole = json.loads((other / "compare.json").read_text())
    assert [c["b"]["name"] for c in whole["comparisons"]] == ["b", "fewer"]
    assert [*whole["comparisons"][1]["scores"]] == ["imagenet1k"]


def test_compare_says_what_is_wrong(evaluated, tmp_path, capsys):
    assert compare(evaluated / "a", tmp_path) == 2
    assert "results.json is missing: give the --out folder" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"results": {"x": {"error": "e"}}}))
    assert compare(evaluated / "a", tmp_path) == 2
    assert "nothing was compared" in capsys.readouterr().out
    for arguments in ([evaluated / "a"], [evaluated / "a", evaluated / "a"], []):
        with pytest.raises(SystemExit) as e:
            compare(*arguments)
        assert e.value.code == 2
    assert "a folder is named twice" in capsys.readouterr().err


def test_help_of_both_teaches(capsys):
    for arguments, parts in (
        (["--help"], ("report.html", "evaluate compare runs/eval/a", "--no-report")),
        (["compare", "--help"], ("below 0", "10,000 resamples", "exit status", "--pictures")),
    ):
        with pytest.raises(SystemExit) as e:
            evaluate.main(arguments)
        assert e.value.code == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in parts)


def test_labels_are_short_and_differ(tmp_path):
    assert labels(["runs/a/eval", "runs/b/eval"]) == ["a/eval", "b/eval"]
    assert labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert labels(["runs", "runs/b"]) == ["runs", "runs/b"]
