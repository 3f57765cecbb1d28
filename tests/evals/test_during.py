import json
import os
import signal

import numpy as np
import pytest

from hqclip_jax import evaluate
from hqclip_jax import train as train_lib
from hqclip_jax.checkpoint import Checkpoints
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.zeroshot import ZeroShot
from hqclip_jax.telemetry import read_metrics
from tests.test_train import arguments, error_of, params

from .colours import write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


def command(dataset, workdir, suite, duration="4 steps", **more):
    fields = {"evals.suites": suite, "evals.every": "2 steps", "evals.batch": 4} | more
    return arguments(dataset, workdir, duration, **fields)


def results(workdir, step):
    return json.loads((workdir / "evals" / str(step) / "results.json").read_text())


@pytest.fixture(scope="module")
def unbroken(dataset, suite, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    assert train_lib.main(command(dataset, workdir, suite)) == 0
    return workdir


def test_scores_are_written_and_are_those_of_evaluate(unbroken, suite, tmp_path):
    assert sorted(p.name for p in (unbroken / "evals").iterdir()) == ["2", "4"]
    for step in (2, 4):
        asked = [f"--checkpoint={unbroken}", f"--suite={suite}", f"--step={step}", "--batch=4"]
        assert evaluate.main([*asked, f"--out={tmp_path / str(step)}"]) == 1  # one set is gone
        after = json.loads((tmp_path / str(step) / "results.json").read_text())["results"]
        during = results(unbroken, step)["results"]
        assert during == {name: after[name] for name in ("colours", "walls")}
    rows = [row for row in read_metrics(unbroken) if "eval/colours/top1" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["eval/walls/recall_at_1"] == during["walls"]["scores"]["recall_at_1"]
    assert not any("chance" in name or name.endswith("/n") for name in rows[0])
    assert read_metrics(unbroken)[-2]["time/evaluation"] > 0  # of step 2's


def test_training_is_as_without(unbroken, dataset, tmp_path):
    assert train_lib.main(arguments(dataset, tmp_path, "4 steps")) == 0
    for a, b in zip(params(tmp_path), params(unbroken)):
        np.testing.assert_array_equal(a, b)


def test_a_set_that_fails_ends_nothing(dataset, suite, tmp_path, monkeypatch):
    def run(self, embedder):
        raise ZeroDivisionError("none")

    monkeypatch.setattr(ZeroShot, "run", run)
    assert train_lib.main(command(dataset, tmp_path, suite, "1 steps")) == 0
    found = results(tmp_path, 1)["results"]
    assert found["colours"] == {"error": "ZeroDivisionError: none"}
    assert found["walls"]["scores"]["n"] == 5


@pytest.mark.parametrize("step", [2, 4])
def test_a_stop_in_an_evaluation_saves_and_the_next_start_makes_it_up(
    dataset, suite, unbroken, tmp_path, monkeypatch, step
):
    real, fetched = Embedder._fetch, []

    def fetch(self, *args):
        fetched.append(1)
        if len(fetched) == {2: 2, 4: 7}[step]:  # an evaluation takes five batches
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Embedder, "_fetch", fetch)
        status = train_lib.main(command(dataset, tmp_path, suite))
    assert status == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path, read_only=True).latest() == step
    assert not (tmp_path / "evals" / str(step)).exists()
    assert train_lib.main(command(dataset, tmp_path, suite)) == 0
    for each in (2, 4):
        assert results(tmp_path, each)["results"] == results(unbroken, each)["results"]
    scored = [row["step"] for row in read_metrics(tmp_path) if "eval/colours/top1" in row]
    assert scored == [2, 4]
    for a, b in zip(params(tmp_path), params(unbroken)):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_scored_again(dataset, suite, unbroken, monkeypatch):
    monkeypatch.setattr(ZeroShot, "run", lambda *_: pytest.fail("scored again"))
    written = (unbroken / "evals" / "4" / "results.json").stat().st_mtime_ns
    assert train_lib.main(command(dataset, unbroken, suite)) == 0
    assert (unbroken / "evals" / "4" / "results.json").stat().st_mtime_ns == written


def test_a_suite_that_there_is_not_is_refused_at_start(dataset, tmp_path, capsys):
    error = error_of(capsys, command(dataset, tmp_path / "run", "imagnet"))
    assert "evals.suites=imagnet is no folder" in error and "did you mean 'imagenet'" in error
    error = error_of(capsys, command(dataset, tmp_path / "run", "imagenet"))
    assert "needs evals.data=ROOT" in error


def test_two_suites_with_a_set_of_one_name_are_refused(dataset, suite, tmp_path, capsys):
    error = error_of(capsys, command(dataset, tmp_path / "run", f"{suite},{suite}"))
    assert "two sets named colours, gone, walls" in error
