"""Engines in processes of their own: work handed out, deaths survived, parts sealed."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from refine.engines.backend import Sampling
from refine.engines.lvlm import Lvlm
from refine.errors import RefineError
from refine.fleet import Local, visible_gpus
from refine.inputs.find import find
from refine.parts import Job
from refine.prompts import load_prompt
from refine.sink import Part, part_directory
from tests.refine.fake_model import Fake


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


def parts_of(job: Job) -> list[Part]:
    return [Part.load(part_directory(job.parts, n)) for n in range(len(job.inputs))]


def test_two_engines_make_all_parts(job_of):
    job = job_of(5, 9)
    assert Local(2, 0, 2).make_parts(job, range(5)) == 45
    assert [part.counts["joined"] for part in parts_of(job)] == [9] * 5
    assert sum(part.sums["answers"] for part in parts_of(job)) == 45
    assert not list(job.parts.glob("*.journal"))
    asked = job.engine.model.asked()
    assert len(asked) == len(set(asked)) == 45


def test_an_engine_that_dies_is_replaced_and_nothing_answered_is_asked_again(job_of, capfd):
    job = job_of(3, 20, die=(25, 50), slots=2)
    Local(1, 0, 1).make_parts(job, range(3))
    assert [part.counts["joined"] for part in parts_of(job)] == [20] * 3
    told = capfd.readouterr().err
    assert told.count("exit code -9): it is started anew") == 2
    asked = job.engine.model.asked()
    assert len(set(asked)) == 60
    assert len(asked) - 60 <= 2 * 2 * 2  # deaths × what is under way


def test_no_process_of_an_engine_outlives_it(job_of, tmp_path):
    # vLLM's own process would keep the GPU's memory from the engine that is started anew.
    children = tmp_path / "children.txt"
    job = job_of(1, 20, die=(10,), child=children)
    Local(1, 0, 1).make_parts(job, [0])
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_no_process_of_an_engine_outlives_a_killed_command(job_of, tmp_path):
    children = tmp_path / "children.txt"
    job = job_of(1, 500, child=children, pause=0.02)
    context = multiprocessing.get_context("spawn")
    command = context.Process(target=Local(1, 0, 1).make_parts, args=(job, [0]))
    command.start()
    wait_until(lambda: len(job.engine.model.asked()) > 5)
    command.kill()
    command.join()
    (pid,) = map(int, children.read_text().split())
    wait_until(lambda: not alive(pid))


def wait_until(happened, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_engine_that_always_dies_ends_the_run(job_of):
    job = job_of(1, 5, die=tuple(range(1, 100)))
    with pytest.raises(RefineError, match=r"died .exit code -9. 3 times in a row"):
        Local(1, 0, 1).make_parts(job, [0])


def test_a_model_that_cannot_be_opened_is_told(job_of):
    job = job_of(2, 2, broken="--model x: no such folder")
    with pytest.raises(RefineError, match="--model x: no such folder"):
        Local(2, 0, 2).make_parts(job, [0, 1])


def test_quarantine_and_reasons_reach_the_part(job_of, make, tmp_path):
    job = job_of(1, 1)
    pairs = []
    for number, text in enumerate(["never 0", "text 1", "refused 2"]):
        pair = make.pair(number)
        pairs += [pair[0], (pair[1][0], text.encode()), pair[2]]
    make.tar(tmp_path / "in/0.tar", pairs)
    Local(1, 0, 1).make_parts(job, [0])
    (part,) = parts_of(job)
    assert part.counts == {"pairs": 3, "joined": 1, "refusal": 1, "refused_by_server": 1}
    lines = [json.loads(line) for line in (part.directory / "quarantine.jsonl").open()]
    assert sorted((q["uid"], q["reason"], q["attempts"]) for q in lines) == sorted(
        [(make.uid(0), "refusal", 3), (make.uid(2), "refused_by_server", 1)]
    )
    assert {q["caption"] for q in lines} == {"never 0", "refused 2"}


def test_visible_gpus_are_those_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
