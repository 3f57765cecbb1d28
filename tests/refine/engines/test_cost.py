"""Tokens before they are counted, and money before it is spent."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from refine.engines.backend import Reply
from refine.engines.cost import Bill, Estimate, Meter, Prices
from refine.engines.wire import Fault
from refine.errors import RefineError
from tests.refine.virtual import VirtualClock


def meter(most=None, tokens_per_minute=None, prices=(2.0, 10.0), max_tokens=500):
    counted, clock = Counter(), VirtualClock()
    made = Meter(Prices(*prices, most), tokens_per_minute, clock, counted, max_tokens)
    made.clock = clock
    return made, counted


def test_prices_are_for_a_million():
    assert Prices(2.5, 10).usd(1_000_000, 0) == 2.5
    assert Prices(2.5, 10).usd(1000, 500) == pytest.approx(0.0075)


def test_the_guess_of_a_prompt_follows_the_most_that_was_counted():
    estimate = Estimate()
    first = estimate.tokens(4000, 784_000)
    assert first == 256 + 1000 + 1000 and not estimate.known
    estimate.learn(first, 1128)  # half of it
    assert estimate.known
    assert estimate.tokens(4000, 784_000) == pytest.approx(1128 * 1.25)
    estimate.learn(estimate.tokens(0, 784), 100)  # no more than expected: nothing changes
    assert estimate.tokens(4000, 784_000) == pytest.approx(1128 * 1.25)
    estimate.learn(estimate.tokens(4000, 784_000), 30_000)  # a server that counts pictures dearer
    assert estimate.tokens(4000, 784_000) == pytest.approx(30_000 * 1.25)


def test_guesses_hold_for_a_server_that_counts_by_tiles():
    """85 tokens and 170 for each tile of 512 pixels, as GPT-4o counts, beside text of its own
    density: from the second request on, no prompt has more than its guess."""
    draws, estimate, over = np.random.default_rng(0), Estimate(), []
    for _ in range(2000):
        width, height = draws.integers(64, 1024, 2)
        characters = int(draws.integers(800, 1400))
        counted = 85 + 170 * -(-width // 512) * -(-height // 512) + round(characters / 4.4)
        guess = estimate.tokens(characters, width * height)
        over.append(counted > guess)
        estimate.learn(guess, int(counted))
    assert sum(over[1:]) <= 3 and not any(over[50:])


def request_all(counter, requests, prompt=1000, output=100, slots=16, fault=None):
    """Runs requests through a meter; returns how many were answered and the error, if any."""
    answered, free = [], asyncio.Semaphore(slots)
    under_way, most = [0], [0]

    async def one(number):
        async with free, counter.request(4000, 400_000) as bill:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            await counter.clock.sleep(10)
            under_way[0] -= 1
            if fault:
                raise Fault(fault, "")
            bill.take(Reply("k", "text", prompt_tokens=prompt, output_tokens=output))
        answered.append(number)

    async def every():
        return await asyncio.gather(*(one(n) for n in range(requests)), return_exceptions=True)

    errors = [e for e in counter.clock.run(every()) if isinstance(e, BaseException)]
    return len(answered), errors, most[0]


def test_no_more_is_spent_than_the_limit_and_nearly_all_of_it():
    counter, counted = meter(most=0.1)  # $0.003 a request, $0.0075 at most
    answered, errors, most = request_all(counter, 100)
    assert 0.1 - 0.008 < counted["cost_usd"] <= 0.1
    assert counted["cost_usd"] == pytest.approx(0.003 * answered)
    assert len(errors) == 100 - answered
    assert all(isinstance(e, RefineError) and "--max-cost 0.1" in str(e) for e in errors)
    assert most > 4  # side by side while there is enough


def test_what_earlier_runs_spent_counts():
    counter, counted = meter(most=0.1)
    counter.spent(40_000, 1_000)  # $0.09
    answered, _, _ = request_all(counter, 100)
    assert 1 <= answered <= 3
    assert counted["cost_usd"] == pytest.approx(0.003 * answered)


def test_the_first_request_goes_alone_while_nothing_is_known():
    counter, _ = meter(most=0.03)
    # The guess is $0.0085 for each; were it taken for true, three would go at once.
    answered, errors, _ = request_all(counter, 3, prompt=11_000)
    assert (answered, len(errors)) == (1, 2)


def test_those_who_wait_for_the_first_learn_from_it():
    counter, _ = meter(most=0.009, max_tokens=100)
    # By the first guess each may cost $0.0045, and only one would fit beside what the first did.
    answered, _, most = request_all(counter, 3, prompt=50)
    assert (answered, most) == (3, 2)


def test_without_a_limit_nothing_waits():
    counter, counted = meter()
    answered, errors, most = request_all(counter, 50)
    assert (answered, errors, most) == (50, [], 16)
    assert counted["cost_usd"] == pytest.approx(50 * 0.003)


@pytest.mark.parametrize("fault", ["http_429", "http_5xx", "timeouts", "half_answers"])
def test_what_may_be_billed_without_an_answer_counts_at_its_most(fault):
    counter, counted = meter(most=1.0)
    request_all(counter, 1, fault=fault)
    guess = (256 + 1000 + 400_000 / 784) * 2e-6 + 500 * 10e-6
    assert counted["cost_usd"] == pytest.approx(
        guess if fault in ("timeouts", "half_answers") else 0
    )


def test_tokens_keep_to_the_rate_and_what_was_not_used_is_given_back():
    counter, counted = meter(tokens_per_minute=60_000, max_tokens=1000)

    async def times():
        at = []
        for _ in range(20):
            async with counter.request(4000, 0) as bill:
                at.append(counter.clock.now())
                bill.take(Reply("k", "text", prompt_tokens=1256, output_tokens=244))
        return at

    at = counter.clock.run(times())
    # 1,000 a second. A request waits for the 2,256 that it may take and gives 756 back; from the
    # second on its prompt is guessed a quarter higher, and of the 1,070 left 1,000 are kept.
    assert at[0] == pytest.approx(1.256)
    assert np.diff(at) == pytest.approx([2.570 - 0.756] + 18 * [2.570 - 1.000])
    assert counted["seconds_waiting"] == pytest.approx(at[-1])


def test_a_limit_needs_a_server_that_counts():
    with pytest.raises(RefineError, match="--max-cost can't be kept"):
        Bill(needed=True).take(Reply("k", "text"))
    Bill(needed=False).take(Reply("k", "text"))
    Bill(needed=True).take(Reply("k", failure="refused_by_server"))
