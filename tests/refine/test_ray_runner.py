"""Parts made on a real Ray cluster of one machine, with a model that answers by rule."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from refine.engines.backend import Sampling
from refine.engines.lvlm import Lvlm
from refine.errors import RefineError
from refine.inputs.find import find
from refine.parts import Job
from refine.prompts import load_prompt
from refine.ray_runner import OnRay
from refine.sink import Part, part_directory
from tests.refine.fake_model import Fake

pytestmark = pytest.mark.lvlm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def job_of(tmp_path, make):
    def build(tars: int, pairs: int, **fake) -> Job:
        for i in range(tars):
            make.pairs(tmp_path / f"in/{i}.tar", range(i * pairs, (i + 1) * pairs))
        parts = tmp_path / "out/.parts"
        parts.mkdir(parents=True)
        model = Fake(tmp_path / "asked.txt", **fake)
        engine = Lvlm(model, load_prompt("student-v1"), Sampling(), 300, parts)
        return Job(tuple(find([str(tmp_path / "in")])), {}, parts, engine, None, 10_000, 10**9)

    return build


def complete(job: Job, pairs: int) -> bool:
    found = [Part.load(part_directory(job.parts, n)) for n in range(len(job.inputs))]
    return [part.counts["joined"] for part in found] == [pairs] * len(found)


def test_actors_make_all_parts(cluster, job_of):
    job = job_of(6, 10)
    assert OnRay(2, 0, 1).make_parts(job, range(6)) == 60
    assert complete(job, 10)
    assert len(job.engine.model.asked()) == 60
    assert not list(job.parts.glob("*.journal"))


def test_a_killed_actors_work_goes_to_another_and_its_answers_stay(cluster, job_of):
    job = job_of(3, 40, slots=2, pause=0.01)
    asked, killed = job.engine.model.asked, []

    def kill() -> None:
        until = time.monotonic() + 60
        while len(asked()) < 50 and time.monotonic() < until:
            time.sleep(0.005)
        killed.append(int(asked(pids=True)[-1]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    OnRay(1, 0, 1).make_parts(job, range(3))
    killer.join()
    assert complete(job, 40)
    assert {int(pid) for pid in asked(pids=True)} > set(killed)  # another went on
    assert len(set(asked())) == 120
    assert len(asked()) - 120 <= 2 * 2  # what was under way


def test_a_model_that_cannot_be_opened_ends_the_run(cluster, job_of):
    job = job_of(1, 2, broken="--model x: no such folder")
    with pytest.raises(RefineError, match="--model x: no such folder"):
        OnRay(1, 0, 1).make_parts(job, [0])
