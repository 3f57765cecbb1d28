"""Asking a model, without a model: what is asked, how often, what is kept, what is left out."""

import json

import pytest

from refine import asking
from refine.asking import Finished, Tally, ask
from refine.engines.backend import Sampling
from refine.engines.lvlm import Lvlm
from refine.errors import RefineError
from refine.inputs.find import find
from refine.journal import journal_folder, read_answers
from refine.parallel import Workers
from refine.parts import Job
from refine.prompts import load_prompt
from tests.refine.fake_model import Fake


@pytest.fixture
def job_of(tmp_path, make):
    """A job over tars whose alt-texts are given, a list of them for each tar."""

    def build(*captions: list[str], retries: int = 2, max_pixels: int = 300, **fake) -> Job:
        number = 0
        for i, texts in enumerate(captions):
            members = []
            for text in texts:
                pair = make.pair(number)
                members += [pair[0], (pair[1][0], text.encode()), pair[2]]
                number += 1
            make.tar(tmp_path / f"in/{i}.tar", members)
        parts = tmp_path / "out/.parts"
        parts.mkdir(parents=True, exist_ok=True)
        engine = Lvlm(
            model=Fake(tmp_path / "asked.txt", **fake),
            prompt=load_prompt("student-v1"),
            sampling=Sampling(retries=retries),
            max_pixels=max_pixels,
            parts=parts,
        )
        inputs = tuple(find([str(tmp_path / "in")]))
        return Job(inputs, {}, parts, engine, None, 10_000, 10**9)

    return build


def run(job: Job, numbers=None) -> list:
    numbers = range(len(job.inputs)) if numbers is None else numbers
    with Workers(1, job.open) as workers:
        return list(ask(job.open(), job.engine.backend, workers, numbers))


def answers(job: Job, number: int) -> list:
    return list(read_answers(journal_folder(job.parts, number))[0].values())


def test_every_pair_is_asked_once_and_every_part_finished(job_of):
    job = job_of([f"text {n}" for n in range(20)], [], [f"text {n}" for n in range(20, 33)])
    events = run(job)
    assert sorted(e.number for e in events if isinstance(e, Finished)) == [0, 1, 2]
    assert sum(e.answers for e in events if isinstance(e, Tally)) == 33
    asked = job.engine.model.asked()
    assert len(asked) == len(set(asked)) == 33
    told = [a.texts.desc[-1] for n in (0, 2) for a in answers(job, n)]
    assert sorted(told) == sorted(f"the number is {n}." for n in range(33))
    assert {a.refiner for a in answers(job, 0)} == {job.engine.refiner}


def test_what_does_not_pass_is_asked_again_within_the_budget(job_of):
    job = job_of(["twice 1", "never 2", "endless 3", "refused 4", "text 5"], retries=2)
    tally = [e for e in run(job) if isinstance(e, Tally)]
    assert sum(t.answers for t in tally) == 5 and sum(t.rejected for t in tally) == 3
    by_attempts = {a.reason or a.texts.desc[-1]: a for a in answers(job, 0)}
    assert {reason: a.attempts for reason, a in by_attempts.items()} == {
        "the number is 1.": 2, "refusal": 3, "truncated": 3, "refused_by_server": 1,
        "the number is 5.": 1,
    }  # fmt: skip
    assert by_attempts["refusal"].raw == "I'm sorry, I can't help with that."
    assert by_attempts["refusal"].prompt_tokens == 15
    assert by_attempts["the number is 1."].output_tokens == 23
    assert by_attempts["refused_by_server"].detail == "status 400"
    sums = read_answers(journal_folder(job.parts, 0))[1]
    assert sums["retried_refusal"] == 3 and sums["retried_truncated"] == 2
    assert sums["calls"] == 10


def test_what_is_answered_is_not_asked_again(job_of):
    job = job_of([f"text {n}" for n in range(12)])
    run(job)
    (file,) = journal_folder(job.parts, 0).iterdir()
    lines = [line for line in file.read_text().splitlines(True) if "sums" not in line]
    file.write_text("".join(lines[:7]))
    before = len(job.engine.model.asked())
    run(job)
    again = job.engine.model.asked()[before:]
    assert sorted(again) == sorted(json.loads(line)["key"] for line in lines[7:])
    assert len(answers(job, 0)) == 12


def test_one_pair_twice_is_one_question_and_in_two_parts_two(job_of, make, tmp_path):
    job = job_of(["text 0"], [])
    same = make.pair(0, key="a") + make.pair(0, key="b")
    make.tar(tmp_path / "in/0.tar", same)
    make.tar(tmp_path / "in/1.tar", same)
    run(job)
    assert len(job.engine.model.asked()) == 2
    assert len(answers(job, 0)) == len(answers(job, 1)) == 1


def test_a_picture_that_cannot_be_shown_is_answered_without_asking(job_of, make, tmp_path):
    job = job_of(["text 0"])
    large = make.pair(2)
    large[0] = ("000000002.jpg", make.image(2, size=(200, 200)))
    broken = make.pair(1)
    broken[0] = ("000000001.jpg", make.image(1)[:-70])
    make.tar(tmp_path / "in/0.tar", make.pair(0) + broken + large)
    run(job)
    assert len(job.engine.model.asked()) == 1
    found = {a.reason: a.attempts for a in answers(job, 0)}
    assert found == {"": 1, "corrupt_image": 0, "image_too_large": 0}


def test_the_backend_always_has_more_than_a_round_while_there_is_more(job_of, monkeypatch):
    seen = []
    original = asking.Asking._take

    def take(self, reply):
        seen.append((len(self._asked), self.feed.ended))
        return original(self, reply)

    monkeypatch.setattr(asking.Asking, "_take", take)
    # All is prepared before the first answer is taken, so that nothing depends on speed.
    monkeypatch.setattr(asking.Feed, "take", lambda self, wait, of=asking.Feed.take: of(self, True))
    job = job_of([f"text {n}" for n in range(30)], [f"text {n}" for n in range(30, 50)], slots=5)
    run(job)
    assert len(seen) == 50
    assert {under_way for under_way, ended in seen if not ended} == {8, 9, 10}
    assert sum(not ended for _, ended in seen) >= 40


def test_an_error_of_the_reader_or_the_model_ends_the_asking(job_of, tmp_path):
    job = job_of(["text 0"], broken="the model is gone")
    with pytest.raises(RefineError, match="the model is gone"):
        run(job)
    job = job_of(["text 0"], ["text 1"])
    (tmp_path / "in/1.tar").write_bytes(b"\x1f\x8b compressed")
    with pytest.raises(RefineError, match="gunzip"):
        run(job)
