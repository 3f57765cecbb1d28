"""Rates, waits and what a server asks for, by a clock that is told the time."""

import asyncio
import time

import numpy as np
import pytest

from refine.engines.pace import Backoff, Bucket, Clock, retry_after


class Hands:
    """A clock's, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def test_a_bucket_lets_one_second_through_and_then_keeps_the_rate():
    now = Hands()
    bucket = Bucket(120, now)  # two a second
    waits = [bucket.take(1) for _ in range(6)]
    assert waits == pytest.approx([0, 0, 0.5, 1, 1.5, 2])
    now.at += 2
    assert bucket.take(1) == pytest.approx(0.5)  # those before are paid for, no more
    now.at += 1000
    assert [bucket.take(1) for _ in range(3)] == pytest.approx([0, 0, 0.5])  # idleness saves up 1 s


def test_a_slow_bucket_holds_at_least_one():
    bucket = Bucket(6, Hands())
    assert [bucket.take(1) for _ in range(3)] == pytest.approx([0, 10, 20])


def test_whoever_obeys_a_bucket_keeps_the_rate_over_every_minute():
    now, draws = Hands(), np.random.default_rng(0)
    bucket = Bucket(3000, now)
    used = []  # (when, how much)
    for amount in draws.integers(1, 400, 500):
        used.append((now.at + bucket.take(amount), amount))
        now.at += draws.exponential(0.5)
    when, amounts = np.array(used).T
    assert np.all(np.diff(when) >= 0)  # first come, first served
    for start in when:
        inside = (when >= start) & (when < start + 60)
        assert amounts[inside].sum() <= 3000 + 50 + 400  # a burst, and the last one's whole amount


def test_what_was_not_used_is_given_back_and_what_was_beyond_it_taken():
    now = Hands()
    bucket = Bucket(60, now)
    bucket.take(10)
    bucket.give(8)
    assert bucket.take(1) == pytest.approx(2)
    bucket.give(-3)
    assert bucket.take(1) == pytest.approx(6)
    bucket.give(1000)
    assert [bucket.take(1), bucket.take(1)] == pytest.approx([0, 1])  # never more than a burst


def test_waits_double_up_to_the_cap_and_are_drawn_from_all_of_it():
    draws = np.array([[Backoff(0.5, 4, seed).delay(n) for n in range(1, 8)] for seed in range(500)])
    longest = np.array([0.5, 1, 2, 4, 4, 4, 4])
    assert np.all(draws <= longest) and np.all(draws >= 0)
    assert draws.max(0) == pytest.approx(longest, rel=0.05)
    assert draws.mean(0) == pytest.approx(longest / 2, rel=0.1)
    assert Backoff(0.5, 4, 3).delay(5) == Backoff(0.5, 4, 3).delay(5)
    assert Backoff(1.0, 60.0).delay(100_000) <= 60


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "30"}, 30),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 60),
        ({"retry-after": "Wed, 21 Oct 2015 07:26:00 GMT"}, 0),
        (
            {
                "retry-after": "Wed, 21 Oct 2015 07:28:00 GMT",
                "date": "Wed, 21 Oct 2015 07:27:50 GMT",
            },
            10,
        ),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "yesterday"}, 60),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "inf"}, 0),
        ({"retry-after": "Wed, 99 Oct 99999 07:28:00 GMT"}, 0),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    now = 1445412420.0  # 07:27:00 of that day
    assert retry_after(headers, now) == seconds


def test_a_faster_clock_waits_less():
    clock = Clock(speed=1000)
    began, at = time.monotonic(), clock.now()
    asyncio.run(clock.sleep(20))
    assert 0.02 <= time.monotonic() - began < 2
    assert clock.now() - at >= 20
