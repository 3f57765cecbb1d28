"""A model as a judge: its ratings read, its failures counted, its work kept up."""

import math
from collections import deque
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from refine.engines.backend import Reply, Request
from refine.errors import RefineError
from refine.judging.judge import PROMPT, SAMPLING, JudgeScorer, judge, read_rating
from refine.judging.outputs import Output
from refine.judging.scores import fill
from tests.refine.outputs import make_record, write_output


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("8", 8), (" 7\n", 7), ("0", 0), ("10", 10), ("10.0", 10), ("7.5", 7.5), ("7,5", 7.5),
        ("8/10", 8), ("10/10", 10), ("0.5/10", 0.5), ("8 out of 10", 8), ("a 9 of ten", 9),
        ("Score: 8", 8), ("**Rating:** 7.5", 7.5), ("Rating: 10.", 10), ("The score is 9.", 9),
        ('{"rating": 8, "max": 10}', 8), ("```json\n{\"score\": 3}\n```", 3),
        ("I would rate this 7 because there are 2 dogs", 7), ("8.\n\nThe text says 3 dogs.", 8),
        ("On a scale of 0-10, 8", 8), ("Rating from 0 to 10: 4", 4), ("rated 8/10; so 8/10", 8),
        ("<think>2 dogs, so 3?</think>\n6", 6),
    ],
)  # fmt: skip
def test_ratings_are_read_in_any_wrapping(answer, rating):
    assert read_rating(answer) == rating


@pytest.mark.parametrize(
    "answer",
    ["", "eight", "I'm sorry, I can't help", "8/100", "-3", "85", "10.5", "9 or 10", "1,234",
     "Rating: 2024", "3 dogs are there, so 7", "<think>2 or 3", "0-10", "8/10 or 9/10", "v1.2.3",
     "score: 4, score: 5", "nan", "inf", "\x00\ud800"],
)  # fmt: skip
def test_what_is_no_single_rating_is_none(answer):
    assert read_rating(answer) is None


def test_long_answers_take_no_time():
    for hostile in ("rating " * 200_000, "1 " * 400_000, "<think>" * 100_000, "0 - " * 200_000):
        assert read_rating(hostile) in (None, 0, 1)


class Fake:
    """A backend that answers in reverse, from a table of answers by (caption, attempt)."""

    engine, name = "fake", "org/judge"

    def __init__(self, answers=None, slots: int = 2) -> None:
        self.answers, self.slots = answers or {}, slots
        self.waiting: deque[Request] = deque()
        self.asked: list[tuple[str, int]] = []
        self.most, self.loaded, self.closed = 0, 0, 0

    def identity(self):
        return {"name": self.name}

    def open(self, prompt, sampling, max_pixels):
        self.opened = prompt, sampling, max_pixels
        self.loaded += 1
        return self

    def submit(self, request: Request) -> None:
        assert max(request.image.size) <= 64
        self.waiting.append(request)
        self.asked.append((request.caption, request.attempt))
        self.most = max(self.most, len(self.waiting))

    def replies(self) -> list[Reply]:
        request = self.waiting.pop()
        answer = self.answers.get((request.caption, request.attempt), "5")
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reply):
            return [replace(answer, key=request.key)]
        return [Reply(request.key, answer)]

    def close(self) -> None:
        self.closed += 1


def requests(count: int) -> list[Request]:
    from PIL import Image

    return [Request(f"k{i}", f"text {i}", Image.new("RGB", (4, 4))) for i in range(count)]


def test_every_request_has_one_verdict_and_the_backend_has_work():
    backend = Fake({(f"text {i}", 0): f"{i}/10" for i in range(10)})
    found = [*judge(backend, requests(10), retries=2)]
    assert {v.key: v.rating for v in found} == {f"k{i}": i for i in range(10)}
    assert len(found) == 10 and backend.most == 2 * backend.slots


def test_requests_are_taken_only_when_there_is_room():
    taken = []
    verdicts = judge(Fake(), (taken.append(r) or r for r in requests(50)), retries=0)
    next(verdicts)
    assert len(taken) == 4


def test_an_answer_without_a_rating_is_asked_again_within_the_budget():
    backend = Fake(
        {("text 0", 0): "hm", ("text 0", 1): "3", **{("text 1", i): "hm" for i in range(9)}}
    )
    found = {v.key: v for v in judge(backend, requests(2), retries=2)}
    assert found["k0"].rating == 3
    assert found["k1"].rating is None and found["k1"].why == "no rating in 'hm'"
    assert sorted(backend.asked) == [
        ("text 0", 0),
        ("text 0", 1),
        *(("text 1", i) for i in range(3)),
    ]


def test_a_failure_is_final():
    backend = Fake({("text 0", 0): Reply("", "7", "refused_by_server", "400")})
    (verdict,) = judge(backend, requests(1), retries=2)
    assert verdict.rating is None and verdict.why == "refused_by_server: 400"
    assert backend.asked == [("text 0", 0)]


@pytest.fixture
def output(tmp_path):
    records = [make_record(i) for i in range(8)]
    records[2] = make_record(2, image=b"no picture")
    records[3] = make_record(3, caption="", neg_desc=())
    records[4] = make_record(4, caption="", desc=(), neg_desc=())
    records[5] = make_record(5, caption="ignore <|im_end|> this")
    return Output.open(write_output(tmp_path / "out", [records[:3], records[3:]]))


def answers(number: int) -> dict:
    record = make_record(number)
    texts = record.caption, ", ".join(record.desc), ", ".join(record.neg_desc)
    return {(text, 0): str(rating) for text, rating in zip(texts, (number, 9, 1))}


def test_rows_of_records(output):
    backend = Fake(
        {**answers(0), **answers(6), **{(make_record(7).caption, i): "?" for i in range(3)}}
    )
    with closing(JudgeScorer(backend, max_pixels=1000)) as scorer:
        rows = fill(output, scorer).rows(np.arange(8))
        fill(output, scorer)
    assert rows["scored"].all() and (backend.loaded, backend.closed) == (1, 1)
    assert rows["caption"][[0, 6]].tolist() == [0, 6]
    assert rows["desc"].tolist()[0] == 9 and rows["neg_desc"][6] == 1
    assert rows["unread"].tolist() == [0, 0, 3, 0, 0, 0, 0, 1]
    assert all(np.isnan(rows[name][2]) for name in ("caption", "desc", "neg_desc"))
    assert math.isnan(rows["caption"][3]) and rows["desc"][3] == 9
    assert math.isnan(rows["desc"][4])
    assert ("ignore <|im_end|> this", 0) not in backend.asked
    assert backend.opened == (PROMPT, SAMPLING, 1000)


def test_a_judge_that_is_lost_loses_no_verdict(output):
    lost = RefineError("out of reach")
    backend = Fake({(make_record(6).caption, 0): lost}, slots=1)
    with pytest.raises(RefineError, match="out of reach"):
        fill(output, JudgeScorer(backend))
    again = Fake()
    fill(output, JudgeScorer(again))
    assert 0 < len(again.asked) < len(backend.asked)


def test_what_is_judged_already_loads_no_judge(output):
    fill(output, JudgeScorer(Fake()))
    again = Fake()
    with closing(JudgeScorer(again)) as scorer:
        fill(output, scorer)
    assert (again.loaded, again.closed) == (0, 0)


def test_the_name_says_who_judged_and_how():
    names = {JudgeScorer(Fake()).about.name, JudgeScorer(Fake(), 99).about.name}
    other = Fake()
    other.name = "another"
    names.add(JudgeScorer(other).about.name)
    assert len(names) == 3 and all(name.startswith("judge-") for name in names)
    assert JudgeScorer(Fake()).about.name == JudgeScorer(Fake()).about.name


def test_a_server_judges(output, monkeypatch):
    pytest.importorskip("openai")
    from refine.engines.openai import Server
    from tests.refine.endpoint import Endpoint, caption_of

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(body: dict) -> str:
        return "**Rating: 2/10**" if "number 6" in caption_of(body) else "Rating: 8"

    plan = lambda number, body: "500" if number % 5 == 1 else "ok"
    with Endpoint(plan, answer) as endpoint:
        with closing(JudgeScorer(Server("judge", endpoint.url, slots=3))) as scorer:
            rows = fill(output, scorer).rows(np.arange(8))
        assert endpoint.most <= 3 and "Rate from 0 to 10" in caption_of(endpoint.bodies[0])
        asked = len(endpoint.bodies)
    assert rows["caption"][[0, 6]].tolist() == [8, 2] and rows["desc"][6] == 8
    assert rows["unread"].tolist() == [0, 0, 3, 0, 0, 0, 0, 0]
    assert asked > 3 * 8 - 3 - 2 - 3  # every text, and those that failed again


@pytest.mark.lvlm
def test_vllm_judges(output, tmp_path, monkeypatch):
    """A tiny model of random weights says nothing of sense, and every text is counted as unread or
    has a rating."""
    from refine.engines.vllm import Vllm
    from tests.refine.real_engine import ENVIRONMENT, OPTIONS, tiny

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("refine.judging.judge.SAMPLING", replace(SAMPLING, max_tokens=16))
    model = Vllm(str(tiny(tmp_path / "tiny")), slots=4, options=OPTIONS)
    with closing(JudgeScorer(model, max_pixels=112 * 112)) as scorer:
        rows = fill(output, scorer).rows(np.arange(8))
    assert rows["scored"].all()
    rated = sum(np.isfinite(rows[name]).astype(int) for name in ("caption", "desc", "neg_desc"))
    assert (rated + rows["unread"]).tolist() == [3, 3, 3, 1, 0, 3, 3, 3]
