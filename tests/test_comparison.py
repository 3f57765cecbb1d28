import math

import pytest

from hqclip_jax.comparison import _values, number, page, plot
from hqclip_jax.curves import View
from hqclip_jax.runs import Run, RunError
from tests.test_report import Reader
from tests.test_runs import write_run

ROWS = [
    {"step": 10, "time": 1.79e9, "loss": 3.0, "samples": 640, "seconds": 90.0, "time/step": 45.0,
     "time/lost": 45.0},
    {"step": 20, "time": 1.79e9 + 60, "loss": 2.5, "samples": 1280, "seconds": 100.0,
     "time/step": 80.0, "time/lost": 20.0, "resumed_from": 10},
]  # fmt: skip


def runs() -> list[Run]:
    other = [{"step": 10, "loss": 2.0}, {"step": 15, "loss": math.nan}]
    return [
        Run("<first>", ROWS, {"optim.lr": "0.1", "seed": "0"}),
        Run("second", [*ROWS[:1], {"step": 20, "loss": 2.75}], {"optim.lr": "<0.2>", "seed": "0"}),
        Run("broken", other, {}),
        Run("none", [], {}),
    ]


def test_the_page_tells_runs_apart_and_fetches_nothing():
    document = page(View(runs()))
    reader = Reader(document)
    assert "4 runs compared" in document and "<script" not in document and "<first>" not in document
    links = [v for _, name, v in reader.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    cells = reader.cells()
    assert {"<first>", "second", "broken", "none", "<0.2>"} <= set(cells)
    assert "seed" not in cells  # the same in all
    first = cells[cells.index("last report (UTC)") + 1 :][:7]
    assert first == ["<first>", "20", "1,280", "0.03", "1", "0", "2026-09-21 14:14"]
    assert "Where the time went" in document
    assert "--share: 80.0%" in document and "--share: 20.0%" in document


def test_last_values_with_their_differences_from_the_first_run():
    table = _values(View(runs(), ["loss", "samples"]))
    cells = Reader(f"<p>{table}</p>").cells()
    start = cells.index("loss")
    assert cells[start : start + 6] == ["loss", "2.5", "2.75", "+0.25", "no number", "–"]
    start = cells.index("samples")
    assert cells[start : start + 4] == ["samples", "1,280", "640", "-640"]
    assert "end at different steps" in table
    alone = _values(View(runs()[:1]))
    assert "differences" not in alone


def test_a_run_without_the_axis_is_named():
    document = page(View(runs(), ["loss"], "seconds"))
    assert "Not drawn, as they report no seconds: broken, none." in document


def test_files_go_where_they_are_asked_for(tmp_path):
    workdirs = [str(write_run(tmp_path / name, ROWS)) for name in "ab"]
    both = plot(workdirs, None, ["loss"], "step", 1)
    assert both == [tmp_path / "a" / "curves.html", tmp_path / "a" / "curves.png"]
    assert both[1].read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "new" / "it.html"
    assert plot(workdirs, str(out), ["loss"], "step", 1) == [out]
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(RunError, match=r"--out=it\.pdf"):
        plot(workdirs, "it.pdf", [], "step", 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "no number"), (12.8e9, "12,800,000,000"), (3.0, "3"),
     (0.000123456, "0.0001235"), (51234.5, "51,234")],
)  # fmt: skip
def test_numbers_in_tables(value, text):
    assert number(value) == text
