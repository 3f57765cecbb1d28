"""The backend before a server that goes down: it waits, asks little, and loses nothing."""

import json

import pytest

from tests.refine.chatting import (  # noqa: F401 (fixtures among them)
    KEY,
    ask,
    chat_environment,
    collect,
    connecting,
    error_of,
    faults,
)
from tests.refine.endpoint import KINDS, OUTPUT_TOKENS, PROMPT_TOKENS, TEXTS, Endpoint


class Outage:
    """A plan: after some answers every request fails until so many have."""

    def __init__(self, what, begin, length):
        self.what, self.begin, self.length = what, begin, length
        self.failed = 0

    def __call__(self, number, body):
        if number < self.begin or self.failed >= self.length:
            return "ok"
        self.failed += 1
        return self.what


@pytest.mark.parametrize("what", ["503", "429", "drop", "html", "503-seconds"])
def test_while_the_server_is_down_it_is_asked_little(connect, what, capfd):
    outage = Outage(what, 40, 60)
    with Endpoint(outage) as endpoint:
        backend = connect(endpoint, slots=16, price_in=1.0, price_out=10.0)
        ask(backend, range(200))
        replies = collect(backend, 200)
        assert len({r.key for r in replies}) == 200
        assert all(json.loads(r.text) == TEXTS for r in replies)
        assert endpoint.did[what] == 60
        # Those that were on their way when the gate shut failed; after that only probes did. A
        # late answer to an early request may open it once more in the midst of the outage.
        shut = capfd.readouterr().err.count("does not answer")
        assert 1 <= shut <= 2
        assert endpoint.probes() >= 60 - shut * (16 + 5)
        assert backend.counters()["probes"] == endpoint.probes()
        assert faults(backend) == {KINDS[what]: 60}
        if what != "html":  # which a server may bill
            each = (PROMPT_TOKENS + 10 * OUTPUT_TOKENS) / 1e6
            assert backend.counters()["cost_usd"] == pytest.approx(each * endpoint.did["ok"])


def test_a_server_that_dies_and_comes_back(connect):
    with Endpoint() as endpoint:
        backend = connect(endpoint, slots=8)
        ask(backend, range(100))
        before = collect(backend, 30)
        endpoint.stop()
        ask(backend, range(100, 300))
        while backend.counters()["probes"] < 5:
            before += backend.replies()
        endpoint.start()
        replies = before + collect(backend, 300 - len(before))
        assert len({r.key for r in replies}) == 300
        assert all(json.loads(r.text) == TEXTS for r in replies)
        assert backend.counters()["connection_errors"] >= 5


def test_a_server_that_starts_late_is_waited_for(connect):
    with Endpoint() as endpoint:
        endpoint.stop()
        backend = connect(endpoint)
        ask(backend, range(10))
        while backend.counters()["probes"] < 2:
            assert backend.replies() == []
        endpoint.start()
        assert len(collect(backend, 10)) == 10


def test_a_server_that_stays_away_ends_the_run_and_keeps_what_was_answered(connect):
    with Endpoint(Outage("503", 10, 10**9)) as endpoint:
        backend = connect(endpoint, slots=4, patience=600.0)
        ask(backend, range(50))
        message, replies = error_of(backend)
        assert len(replies) == 10
        assert endpoint.url in message and "the same command goes on" in message
        assert "--patience is 600 s" in message and KEY not in message
