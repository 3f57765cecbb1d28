import json
import math
from pathlib import Path

import numpy as np
import pytest

from hqclip_jax import runs
from hqclip_jax.runs import RunError, differing, load


def write_run(workdir: Path, rows: list[dict], config: dict | None = None) -> Path:
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    return workdir


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/w/a"], ["a"]),
        (["/w/a/train", "/w/b/train"], ["a", "b"]),
        (["/w/a/1", "/w/a/2", "/w/b/1"], ["a/1", "a/2", "b/1"]),
        (["/w/a", "/w/a/b"], ["a", "a/b"]),
        (["/v/x", "/w/x"], ["v", "w"]),
    ],
)
def test_names_are_what_tells_runs_apart(paths, names):
    assert runs._names([Path(p) for p in paths]) == names


def test_series_restarts_and_last_values(tmp_path):
    (run,) = load([write_run(tmp_path / "a", [
        {"step": 10, "loss": 2.0, "samples": 100},
        {"step": 20, "loss": None, "samples": 200, "mfu": 0.5},
        {"step": 30, "loss": 1.0, "samples": 300, "resumed_from": 15, "note": "text"},
    ])])  # fmt: skip
    xs, ys = run.series("loss", "samples")
    np.testing.assert_array_equal(xs, [100, 200, 300])
    np.testing.assert_array_equal(ys, [2, math.nan, 1])
    assert run.series("absent", "step")[0].shape == (0,)
    assert run.restarts("step") == [15] and run.restarts("samples") == [150]
    assert run.last("mfu") == 0.5 and run.last("absent") is None
    assert run.broken("loss") == 1 and run.broken("mfu") == 0
    assert run.metrics() == {"loss", "samples", "mfu"}


def test_goodput_is_derived(tmp_path):
    rows = [{"step": 1, "seconds": 200.0, "time/step": 150.0}, {"step": 2, "time/step": 9.0}]
    (run,) = load([write_run(tmp_path / "a", rows)])
    assert run.series("goodput", "step")[1].tolist() == [0.75]


def test_fields_that_differ(tmp_path):
    one = {"optim": {"lr": 1e-3, "batch": 64}, "seed": 0, "init_from": ""}
    two = {"optim": {"lr": 5e-4, "batch": 64}, "seed": 0, "init_from": "runs/x", "new": {"a": 1}}
    row = [{"step": 1, "loss": 1.0}]
    paths = [write_run(tmp_path / "1", row, one), write_run(tmp_path / "2", row, two)]
    known = [
        ("optim.lr", ["0.001", "0.0005"]),
        ("init_from", ["(empty)", "runs/x"]),
        ("new.a", ["–", "1"]),
    ]
    assert differing(load(paths)) == known
    # A run that says nothing of its configuration does not make every field differ.
    paths.append(write_run(tmp_path / "3", row))
    assert differing(load(paths)) == [(name, [*values, "–"]) for name, values in known]


def test_a_damaged_configuration_is_left_out_and_said(tmp_path, caplog):
    path = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    (path / "config.json").write_text("{")
    assert load([path])[0].config == {}
    assert "config.json is left out" in caplog.text


def test_what_holds_no_run_is_named(tmp_path):
    good = write_run(tmp_path / "runs" / "good", [{"step": 1, "loss": 1.0}])
    empty = write_run(tmp_path / "runs" / "none", [])
    with pytest.raises(RunError, match="gone: no such directory"):
        load([good, tmp_path / "gone"])
    with pytest.raises(RunError, match=r"no metrics\.jsonl.*runs below it: .*good, .*none"):
        load([tmp_path / "runs"])
    with pytest.raises(RunError, match="none: no reports yet"):
        load([empty])
    with pytest.raises(RunError, match="good is given twice"):
        load([good, tmp_path / "runs" / "none" / ".." / "good"])
    assert [len(run.rows) for run in load([good, empty])] == [1, 0]
