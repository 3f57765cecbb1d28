"""Two real processes that train, evaluate meanwhile, and evaluate afterwards."""

import json
import signal

import pytest

from tests.processes import Processes
from tests.test_train import arguments

from .colours import write_suite

pytestmark = pytest.mark.slow


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path)


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_two_processes_score_as_one_while_and_after_they_train(dataset, suite, tmp_path, axis):
    workdir = tmp_path / "run"
    fields = {
        "mesh.fsdp": 1,
        f"mesh.{axis}": 2,
        "evals.suites": suite,
        "evals.every": "1 steps",
        "evals.batch": 2,
    }
    train = ["-m", "hqclip_jax.train", *arguments(dataset, workdir, "2 steps", **fields)]
    with Processes([[*train, "--distributed"]] * 2, tmp_path / "train") as run:
        # One of the two is stopped in the evaluation of the first step.
        run.until(lambda: "colours: done" in run.logs[1].read_text())
        run.send(signal.SIGTERM, 1)
        assert set(run.ended()) <= {128 + signal.SIGTERM}, run.printed()
    with Processes([[*train, "--distributed"]] * 2, tmp_path / "train") as run:
        assert run.ended() == [0, 0], run.printed()
    during = {step: results(workdir / "evals" / step) for step in ("1", "2")}
    assert all(found["colours"]["scores"]["n"] == 5 for found in during.values())
    evaluate = ["-m", "hqclip_jax.evaluate", f"--checkpoint={workdir}", f"--suite={suite}"]
    for count in (1, 2):
        out = tmp_path / f"out-{count}"
        command = [*evaluate, f"--out={out}", "--batch=2", *["--distributed"] * (count > 1)]
        with Processes([command] * count, out / "logs") as run:
            assert run.ended() == [1] * count, run.printed()  # one set is gone
        found = results(out)
        assert "missing" in found.pop("gone")["error"]
        assert found == during["2"]
