"""The backend over a real socket, before a server that does what servers do."""

import json
import random
import threading
import time

import pytest

from refine.engines.backend import Sampling
from refine.engines.chat import MOST_FAILED, TRIES
from refine.errors import RefineError
from tests.refine.chatting import (  # noqa: F401 (fixtures among them)
    FAULTS,
    KEY,
    ask,
    chat_environment,
    collect,
    connecting,
    error_of,
    faults,
    first,
)
from tests.refine.endpoint import (
    DATE_SECONDS,
    KINDS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SECONDS,
    TEXTS,
    Endpoint,
    caption_of,
    is_probe,
)


def test_every_request_has_its_own_answer(connect):
    with Endpoint(answer=lambda body: caption_of(body)[-20:]) as endpoint:
        backend = connect(endpoint, slots=4)
        ask(backend, range(40))
        replies = collect(backend, 40)
        assert sorted(r.key for r in replies) == sorted(f"k{n}" for n in range(40))
        for reply in replies:
            assert f"caption {reply.key[1:]}." in reply.text
            assert (reply.failure, reply.truncated) == ("", False)
            assert (reply.prompt_tokens, reply.output_tokens) == (PROMPT_TOKENS, OUTPUT_TOKENS)
        assert {h["authorization"] for h in endpoint.headers} == {f"Bearer {KEY}"}
        assert {b["model"] for b in endpoint.bodies} == {"m"}
        told = {name: count for name, count in backend.counters().items() if count}
        assert told == {"requests": 40}
        assert "m at http://127.0.0.1" in backend.note


def test_as_many_requests_are_on_their_way_as_there_are_slots(connect):
    together = threading.Barrier(6)

    def answer(body):
        together.wait(timeout=20)  # breaks where fewer than six come
        return "text"

    with Endpoint(answer=answer) as endpoint:
        backend = connect(endpoint, slots=6)
        ask(backend, range(48))
        assert [r.text for r in collect(backend, 48)] == ["text"] * 48
        assert endpoint.most == 6


def test_a_server_of_ones_own_needs_no_key(connect, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Endpoint(first("400")) as endpoint:
        backend = connect(endpoint)
        ask(backend, range(2))
        assert len(collect(backend, 2)) == 2
        assert endpoint.headers[0]["authorization"] == "Bearer none"


@pytest.mark.parametrize("what", sorted(KINDS.keys() - {"429-seconds", "503-seconds", "429-date"}))
def test_a_fault_is_tried_again_and_counted(connect, what):
    slow = what in ("hang", "drip")
    with Endpoint(first(what)) as endpoint:
        backend = connect(endpoint, timeout=0.2 if slow else 5.0)
        ask(backend, [0])
        (reply,) = collect(backend, 1)
        assert json.loads(reply.text) == TEXTS
        assert faults(backend) == {KINDS[what]: 1}
        told = backend.counters()
        assert (told["requests"], told["retries"], len(endpoint.bodies)) == (2, 1, 2)
        assert 0 < told["seconds_waiting"] < 1


@pytest.mark.parametrize(
    ("what", "seconds"),
    [("429-seconds", SECONDS), ("503-seconds", SECONDS), ("429-date", DATE_SECONDS)],
)
def test_a_server_is_left_alone_as_long_as_it_asks(connect, what, seconds):
    with Endpoint(first(what)) as endpoint:
        backend = connect(endpoint, speed=20)
        ask(backend, [0])
        collect(backend, 1)
        once, again = endpoint.at
        assert seconds - 0.5 < (again - once) * 20 < seconds + 60
        assert seconds - 2 < backend.counters()["seconds_waiting"] < seconds + 2


def test_those_behind_wait_too(connect):
    with Endpoint(first("429-seconds")) as endpoint:
        backend = connect(endpoint, speed=20, slots=1)
        ask(backend, range(3))
        collect(backend, 3)
        assert (endpoint.at[1] - endpoint.at[0]) * 20 > SECONDS - 0.5


@pytest.mark.parametrize("what", ["400", "413", "422", "415", "filter"])
def test_a_refusal_is_final_for_that_request_alone(connect, what):
    plan = lambda number, body: what if "caption 1." in caption_of(body) else "ok"
    with Endpoint(plan) as endpoint:
        backend = connect(endpoint)
        ask(backend, range(3))
        replies = {r.key: r for r in collect(backend, 3)}
        refused = replies.pop("k1")
        assert (refused.failure, refused.text) == ("refused_by_server", "")
        assert ("content filter" if what == "filter" else what) in refused.detail
        assert KEY not in refused.detail and len(refused.detail) < 400
        assert all(json.loads(r.text) == TEXTS for r in replies.values())
        assert (len(endpoint.bodies), backend.counters()["refused"]) == (3, 1)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("length", '{"desc": ['),
        ("ok", '{"desc": ['),
        ("refusal", "I'm sorry, I can't help with that."),
    ],
)
def test_what_a_model_says_is_passed_on_as_it_is(connect, what, text):
    with Endpoint(lambda number, body: what, answer=lambda body: '{"desc": [') as endpoint:
        backend = connect(endpoint)
        ask(backend, [0])
        (reply,) = collect(backend, 1)
        assert (reply.text, reply.failure, reply.truncated) == (text, "", what == "length")
        assert len(endpoint.bodies) == 1


def test_a_later_attempt_differs(connect):
    with Endpoint() as endpoint:
        backend = connect(endpoint, Sampling(structured=True))
        ask(backend, [0])
        collect(backend, 1)
        ask(backend, [0], attempt=1)
        collect(backend, 1)
        once, again = endpoint.bodies
        assert once["temperature"] == 0 < again["temperature"]
        assert once["seed"] != again["seed"]
        assert once["response_format"]["type"] == "json_schema"
        assert once["messages"] == again["messages"]


@pytest.mark.parametrize("what", ["401", "402", "403", "404", "quota"])
def test_what_no_request_will_get_past_ends_the_run_with_its_mend(connect, what):
    with Endpoint(lambda number, body: what if number >= 5 else "ok") as endpoint:
        backend = connect(endpoint, slots=1)
        ask(backend, range(20))
        message, replies = error_of(backend)
        assert len(replies) == 5
        assert endpoint.url in message and KEY not in message
        mend = {"401": "OPENAI_API_KEY", "403": "OPENAI_API_KEY", "404": "--model m"}
        assert mend.get(what, "no credit") in message
        with pytest.raises(RefineError):  # and again, to whoever asks
            backend.replies()
        assert len(endpoint.bodies) == 6


def test_what_was_answered_before_an_error_is_told_before_it(connect):
    with Endpoint(lambda number, body: "401" if number >= 5 else "ok") as endpoint:
        backend = connect(endpoint, slots=1)
        ask(backend, range(20))
        until = time.monotonic() + 30
        while not backend._gate.error:
            assert time.monotonic() < until
        assert len(backend.replies()) == 5
        with pytest.raises(RefineError):
            backend.replies()


def test_a_model_that_knows_the_limit_by_another_name(connect):
    with Endpoint(lambda number, body: "new_name") as endpoint:
        backend = connect(endpoint, slots=3)
        ask(backend, range(30))
        assert all(json.loads(r.text) == TEXTS for r in collect(backend, 30))
        assert 31 <= len(endpoint.bodies) <= 33
        assert endpoint.bodies[-1]["max_completion_tokens"] == 512


def test_a_server_that_refuses_everything_ends_the_run(connect):
    with Endpoint(lambda number, body: "400") as endpoint:
        backend = connect(endpoint, slots=1)
        ask(backend, range(100))
        message, replies = error_of(backend)
        assert f"no answer to {MOST_FAILED} requests" in message and "no 400 for you" in message
        assert KEY not in message
        assert len(replies) == len(endpoint.bodies) == MOST_FAILED


@pytest.mark.parametrize("others", [30, 0])
@pytest.mark.parametrize("what", ["500", "cut"])
def test_a_request_that_fails_alone_is_given_up(connect, what, others):
    def plan(number, body):
        return what if "caption 0." in caption_of(body) and not is_probe(body) else "ok"

    with Endpoint(plan) as endpoint:
        backend = connect(endpoint)
        ask(backend, range(others + 1))
        replies = {r.key: r for r in collect(backend, others + 1)}
        given_up = replies.pop("k0")
        assert given_up.failure == "no_answer" and f"{TRIES} tries" in given_up.detail
        assert all(json.loads(r.text) == TEXTS for r in replies.values())
        # Alone, its fifth failure looks like the server's: no strike.
        assert endpoint.did[what] in ((TRIES, TRIES + 1) if others else (TRIES + 1,))


def test_refusals_now_and_then_end_nothing(connect):
    with Endpoint(lambda number, body: "400" if number % 3 else "ok") as endpoint:
        backend = connect(endpoint, slots=8)
        ask(backend, range(3 * MOST_FAILED))
        replies = collect(backend, 3 * MOST_FAILED)
        assert sum(r.failure == "refused_by_server" for r in replies) == 2 * MOST_FAILED


def test_being_told_to_wait_is_no_fault_of_a_request(connect):
    turned_away = iter(range(2 * TRIES))

    def plan(number, body):
        mine = "caption 0." in caption_of(body) and next(turned_away, None) is not None
        return "429" if mine else "ok"

    with Endpoint(plan) as endpoint:
        backend = connect(endpoint)
        ask(backend, range(40))
        assert all(json.loads(r.text) == TEXTS for r in collect(backend, 40))
        assert endpoint.did["429"] == 2 * TRIES


def test_a_server_that_answers_nothing_but_probes_ends_the_run(connect):
    with Endpoint(lambda number, body: "ok" if is_probe(body) else "500") as endpoint:
        backend = connect(endpoint, slots=8)
        ask(backend, range(100))
        message, replies = error_of(backend)
        assert f"no answer to {MOST_FAILED} requests" in message and "no 500 for you" in message
        assert MOST_FAILED <= len(replies) <= MOST_FAILED + 8


@pytest.mark.parametrize("what", ["hang", "drip"])
def test_a_slow_server_is_no_reason_to_wait(connect, what):
    """Neither for whoever submits and collects, nor at the end."""
    with Endpoint(lambda number, body: what) as endpoint:
        backend = connect(endpoint, timeout=60.0)
        began = time.monotonic()
        ask(backend, range(100))
        assert time.monotonic() - began < 0.5
        began = time.monotonic()
        assert backend.replies() == []
        assert time.monotonic() - began < 1
        while endpoint.inside < backend.slots:
            assert time.monotonic() - began < 30
            backend.replies()
        began = time.monotonic()
        backend.close()
        assert time.monotonic() - began < 5
        assert not any("encode" in t.name for t in threading.enumerate())
        backend.close()  # once more does no harm


def test_no_more_than_the_limit_is_spent_and_what_was_paid_for_is_kept(connect):
    with Endpoint() as endpoint:
        options = {"price_in": 10.0, "price_out": 100.0, "max_cost": 0.2, "slots": 8}
        backend = connect(endpoint, Sampling(max_tokens=60), **options)
        ask(backend, range(200))
        message, replies = error_of(backend)
        spent = len(replies) * (PROMPT_TOKENS * 10 + OUTPUT_TOKENS * 100) / 1e6
        assert 0.2 - 0.008 < spent <= 0.2
        assert backend.counters()["cost_usd"] == pytest.approx(spent)
        assert len(endpoint.bodies) == len(replies)
        assert "--max-cost 0.2" in message and "kept" in message

        again = connect(endpoint, Sampling(max_tokens=60), **options)
        again.spent(PROMPT_TOKENS * len(replies), OUTPUT_TOKENS * len(replies))
        ask(again, range(200, 210))
        assert error_of(again)[1] == []
        assert len(endpoint.bodies) == len(replies)


def test_a_limit_of_cost_is_not_kept_blindly(connect):
    with Endpoint(lambda number, body: "no_usage") as endpoint:
        backend = connect(endpoint, price_in=1.0, price_out=1.0, max_cost=1.0)
        ask(backend, range(10))
        assert "does not say how many tokens" in error_of(backend)[0]


@pytest.mark.parametrize("rate", [{"requests_per_minute": 600}, {"tokens_per_minute": 72_000}])
def test_rates_are_kept(connect, rate):
    with Endpoint() as endpoint:
        backend = connect(endpoint, Sampling(max_tokens=OUTPUT_TOKENS), speed=20, **rate)
        began = time.monotonic()
        ask(backend, range(30))
        collect(backend, 30)
        # 10 requests, or ten times 120 tokens, in a second of a clock that is 20 times as fast.
        assert time.monotonic() - began > 1.4 / 20


def test_all_faults_together_lose_nothing_and_are_all_counted(connect):
    draws = random.Random(0)
    mixed = [k for k in KINDS if k not in ("hang", "drip")] * 3 + ["hang", "drip"]
    mixed += ["400", "filter", "length", "refusal"] * 3 + ["ok"] * 90

    with Endpoint(lambda number, body: draws.choice(mixed)) as endpoint:
        backend = connect(endpoint, slots=12, timeout=0.5)
        ask(backend, range(300))
        replies = collect(backend, 300)
        assert sorted(r.key for r in replies) == sorted(f"k{n}" for n in range(300))
        expected = dict.fromkeys(FAULTS, 0)
        for what, count in endpoint.did.items():
            if what in KINDS:
                expected[KINDS[what]] += count
        told = backend.counters()
        assert {kind: told[kind] for kind in FAULTS} == expected
        assert min(expected.values()) > 0
        assert told["requests"] == len(endpoint.bodies) == sum(endpoint.did.values())
        assert told["probes"] == endpoint.probes()
        given_up = sum(r.failure == "no_answer" for r in replies)
        # Every request over the wire was a first one, a retry or a probe.
        assert told["requests"] == 300 + told["retries"] + told["probes"]
        assert given_up <= 3
        assert told["refused"] == sum(r.failure == "refused_by_server" for r in replies) > 0
        assert [r for r in replies if not r.failure and not r.text] == []
