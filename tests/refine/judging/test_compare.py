"""Outputs compared: on the same pictures, with scores that are kept, told in four forms."""

import csv
import json
import re

import numpy as np
import pytest

from refine.__main__ import main
from refine.errors import RefineError
from refine.judging import scoring
from refine.judging.comparison import Prices, label
from refine.judging.outputs import Output
from refine.judging.scores import CLIP_COLUMNS, About, Scores, fill
from tests.refine.judging.test_judge import Fake
from tests.refine.outputs import make_record, write_output

JUDGE = scoring._judge
STATS = {
    "answers": 10, "prompt_tokens": 5_000, "output_tokens": 2_000, "seconds": 36.0,
    "images_per_second": 0.28,
}  # fmt: skip


class Rule:
    """A CLIP that sees the length of a text: 20 for the alt-text, 30 and 10 for the descriptions,
    one more where a description says "very"."""

    asked = 0

    def __init__(self, *_):
        self.about = About("clip-rule", "clip", CLIP_COLUMNS, {"context": 12})

    def scores(self, output: Output, numbers=None) -> Scores:
        return fill(output, self, numbers)

    def score(self, records):
        for number, record in records:
            Rule.asked += 1
            row = dict.fromkeys(CLIP_COLUMNS, np.nan)
            very = "very" in record.desc[0]
            row |= {"caption": 20, "desc": 30 + very, "neg_desc": 10, "desc_tokens": 12 + very}
            yield number, row

    def close(self):
        pass


@pytest.fixture(autouse=True)
def scorers(monkeypatch):
    """Stand-ins for a checkpoint and for a judge that rates everything 5."""
    monkeypatch.setattr("refine.judging.clip.Clip", Rule)
    monkeypatch.setattr(scoring, "_judge", lambda args: Fake(slots=4))
    Rule.asked = 0


@pytest.fixture
def pair(tmp_path):
    plain = [make_record(i) for i in range(30)]
    very = [make_record(i, desc=("the picture is very clear.",)) for i in range(29, 4, -1)]
    one = write_output(tmp_path / "plain", [plain[:11], plain[11:]], engine_stats=STATS)
    rejected = [{"reason": "refusal"}] * 3 + [{"reason": "<b>odd"}] * 2
    return one, write_output(tmp_path / "very", [very], rejected)


def run(*arguments) -> int:
    return main(["compare", *map(str, arguments), "--workers", "1"])


def test_the_same_pictures_of_both(pair, tmp_path, capsys):
    options = ("--clip", "x", "--judge-model", "y", "--limit", 10)
    assert run(*pair, "--out", tmp_path / "cmp", *options) == 0
    told = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert told["pictures"] == 10 and [o["label"] for o in told["outputs"]] == ["plain", "very"]
    means = {key: [e["mean"][0] for e in found] for key, found in told["measures"].items()}
    assert means["clip_caption"] == [20, 20] and means["clip_neg_desc"] == [10, 10]
    assert means["clip_desc"] == [30, 31] and means["clip_margin"] == [20, 21]
    assert means["clip_right"] == [1, 1] and means["cut_desc"] == [0, 1]
    assert means["judge_desc"] == [5, 5] and means["sentences"] == [2, 1]
    assert told["measures"]["clip_desc"][1]["difference"] == [1, 1, 1]
    assert told["measures"]["clip_desc"][0] == {"mean": [30, 30, 30], "n": 10, "difference": None}
    shown = capsys.readouterr().out
    assert "30.0 ±0.0" in shown and "+1.0 ±0.0" in shown


def test_scores_are_asked_for_once(pair, tmp_path):
    assert run(*pair, "--out", tmp_path / "cmp", "--clip", "x", "--limit", 10) == 0
    assert Rule.asked == 20
    assert run(*pair, "--out", tmp_path / "cmp", "--clip", "x", "--limit", 12) == 0
    assert Rule.asked == 24  # the first ten are among them


def test_of_the_whole_output(pair, tmp_path):
    assert run(*pair, "--out", tmp_path / "cmp", "--token-price", "plain=2:10") == 0
    told = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    plain, very = told["outputs"]
    assert (plain["records"], plain["quarantined"], plain["validity"]) == (30, 0, 1)
    assert (very["records"], very["quarantined"]) == (25, 5)
    assert very["validity"] == pytest.approx(25 / 30, abs=1e-6)
    assert very["quarantine"] == {"refusal": 3, "<b>odd": 2}
    assert plain["distinct_tags"] == 4 and plain["covered_tags"] == 1
    assert (plain["prompt_tokens"], plain["output_tokens"]) == (500, 200)
    assert plain["usd_per_thousand"] == pytest.approx(1000 * (5e3 * 2 + 2e3 * 10) / 1e6 / 10)
    assert very["usd_per_thousand"] is None and very["images_per_second"] is None
    assert told["pictures"] == 25


def test_a_table_for_spreadsheets(pair, tmp_path):
    assert run(*pair, "--out", tmp_path / "cmp", "--clip", "x", "--limit", 5) == 0
    with open(tmp_path / "cmp" / "compare.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    (row,) = (r for r in rows if (r["measure"], r["output"]) == ("clip_desc", "very"))
    assert (row["value"], row["n"], row["difference"]) == ("31.0", "5", "1.0")
    assert {r["output"] for r in rows} == {"plain", "very"}


def test_the_page_escapes_shows_plots_and_says_what_was_published(pair, tmp_path):
    directory = pair[0].rename(tmp_path / "<img src=x onerror=alert(1)>")
    options = ("--clip", "x", "--judge-model", "y")
    assert run(directory, pair[1], "--out", tmp_path / "cmp", *options) == 0
    page = (tmp_path / "cmp" / "compare.html").read_text()
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<b>odd" not in page and "&lt;b&gt;odd" in page
    assert page.index("Content-Security-Policy") < page.index("<style")
    assert len(re.findall("<svg ", page)) == 9
    assert "alt-text 25.4" in page and "student 8.4" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower()


def test_without_scorers_there_are_no_scores(pair, tmp_path):
    assert run(*pair, "--out", tmp_path / "cmp") == 0
    told = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert not [key for key in told["measures"] if key.startswith(("clip", "judge"))]
    page = (tmp_path / "cmp" / "compare.html").read_text()
    assert "25.4" not in page and "CLIP score" not in page


def test_one_output_alone(pair, tmp_path):
    assert run(pair[0], "--out", tmp_path / "cmp", "--clip", "x", "--limit", 4) == 0
    told = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert told["pictures"] == 4 and told["measures"]["clip_desc"][0]["difference"] is None


def test_records_without_texts(tmp_path):
    bare = [
        make_record(i, caption="", desc=(), neg_desc=(), tags=(), neg_tags=()) for i in range(4)
    ]
    out = write_output(tmp_path / "bare", [bare])
    assert run(out, "--out", tmp_path / "cmp") == 0
    told = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert told["measures"]["words_desc"][0]["mean"] == [None, None, None]
    assert told["measures"]["has_tags"][0]["mean"][0] == 0


def test_prices():
    found = Prices.of(["a", "b"], [("", (1.0, 2.0)), ("b", (3.0, 4.0))], [("a", 10.0)])
    assert found == {"a": Prices(1.0, 2.0, 10.0), "b": Prices(3.0, 4.0, None)}
    assert found["b"].per_thousand(STATS) == pytest.approx(2.3)
    assert found["a"].per_thousand(STATS) == pytest.approx(0.9 + 10.0)
    assert Prices().per_thousand(STATS | {"cost_usd": 0.5}) == 50
    assert found["b"].per_thousand(STATS | {"cost_usd": 0.5}) == pytest.approx(2.3)
    assert np.isnan(Prices().per_thousand(STATS)) and np.isnan(found["a"].per_thousand({}))
    with pytest.raises(RefineError, match="no output 'c' to price: they are a, b"):
        Prices.of(["a", "b"], [], [("c", 1.0)])


def test_labels(tmp_path):
    assert label([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    both = [tmp_path / "x" / "a", tmp_path / "y" / "a"]
    assert label(both) == [str(path) for path in both]
    with pytest.raises(RefineError, match="named twice"):
        label([tmp_path / "a", tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--token-price", "3"), "'3' is not [NAME=]IN:OUT"),
        (("--token-price", "a=1:-2"), "'-2' is no price"),
        (("--gpu-price", "x=y"), "'y' is no price in dollars"),
        (("--limit", "0"), "0 is not 1 or more"),
    ],
)
def test_arguments_that_make_no_sense(pair, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*pair, "--out", tmp_path / "cmp", *arguments)
    assert message in capsys.readouterr().err


def test_outputs_of_other_pairs(pair, tmp_path, capfd):
    other = write_output(tmp_path / "other", [[make_record(i) for i in range(50, 53)]])
    assert run(pair[0], other, "--out", tmp_path / "cmp") == 2
    assert "no uid is in all of plain, other" in capfd.readouterr().err


def test_a_judge_that_can_not_be_is_told_before_anything_is_scored(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_judge", JUDGE)
    options = ("--clip", "x", "--judge-model", "y", "--judge-url", "http://localhost/v1")
    with pytest.raises(SystemExit):
        run(*pair, "--out", tmp_path / "cmp", *options)
    options = (*options[:-1], "no address", "--judge-engine", "openai")
    assert run(*pair, "--out", tmp_path / "cmp", *options) == 2
    assert Rule.asked == 0
