"""The door to a server, with a server that is a list of what it does."""

import asyncio
from collections import Counter

import pytest

from refine.engines.gate import DOWN_AFTER, Gate
from refine.engines.pace import Backoff
from refine.engines.wire import Fault
from refine.errors import RefineError
from tests.refine.virtual import VirtualClock


class Door:
    """A gate before a server whose probes are answered after some failures."""

    def __init__(self, failing_probes=0, patience_s=1e6, per_minute=None, backoff=None):
        self.counted: Counter[str] = Counter()
        self.clock = VirtualClock()
        self.left = failing_probes
        self.inside = self.most_inside = 0
        self.gate = Gate(
            "http://there", self.probe, self.clock, backoff or Backoff(0.5, 8), patience_s,
            per_minute, self.counted,
        )  # fmt: skip

    async def probe(self) -> None:
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        await self.clock.sleep(1)
        self.inside -= 1
        if self.left:
            self.left -= 1
            fault = Fault("http_5xx", "503")
            self.gate.failed(fault)
            raise fault
        self.gate.answered()

    def fail(self, times: int, wait_s: float = 0.0) -> None:
        for _ in range(times):
            self.gate.failed(Fault("http_5xx", "503: busy", wait_s))


def test_a_server_that_answers_is_not_waited_for():
    door = Door()

    async def enter():
        for _ in range(100):
            door.fail(DOWN_AFTER - 1)
            door.gate.answered()
            await door.gate.enter()

    door.clock.run(enter())
    assert door.counted["probes"] == door.counted["seconds_waiting"] == 0
    assert door.counted["http_5xx"] == 100 * (DOWN_AFTER - 1)


def test_while_the_server_is_down_one_probe_at_a_time_is_sent_and_then_all_go_on():
    door = Door(failing_probes=6)

    async def enter():
        door.fail(DOWN_AFTER)
        await asyncio.gather(*(door.gate.enter() for _ in range(50)))

    door.clock.run(enter())
    assert door.counted["probes"] == 7
    assert door.most_inside == 1
    assert not door.gate.down


def test_probes_become_rarer():
    door = Door(failing_probes=9, backoff=Backoff(1, 64))

    async def enter():
        door.fail(DOWN_AFTER)
        await door.gate.enter()

    door.clock.run(enter())
    # Ten waits of at most 1, 2, 4 ... 64, 64, 64, 64 s, each half of that on average.
    assert 60 < door.counted["seconds_waiting"] < 300


def test_an_answer_to_another_request_ends_the_probing():
    door = Door(failing_probes=10**9)

    async def enter():
        door.fail(DOWN_AFTER)
        waiting = asyncio.create_task(door.gate.enter())
        while door.counted["probes"] < 3 or door.inside:
            await door.clock.sleep(0.1)
        door.gate.answered()  # while it waits for its fourth
        await waiting

    door.clock.run(enter())
    assert door.counted["probes"] == 3


def test_patience_ends_with_the_time_that_nothing_was_answered():
    door = Door(failing_probes=10**9, patience_s=300)

    async def enter():
        began = door.clock.now()
        door.fail(DOWN_AFTER)
        with pytest.raises(RefineError, match=r"nothing for 3\d\d s .*the same command goes on"):
            await door.gate.enter()
        return door.clock.now() - began

    assert 300 < door.clock.run(enter()) < 310
    assert 50 < door.counted["probes"] < 120


def test_an_answer_renews_the_patience():
    door = Door(patience_s=100)

    async def enter():
        for _ in range(5):
            door.fail(1)
            await door.clock.sleep(60)
            door.gate.answered()
            await door.clock.sleep(60)
        door.fail(1)

    door.clock.run(enter())


def test_a_server_that_asks_for_more_than_the_patience_is_not_waited_for():
    door = Door(patience_s=3600)
    with pytest.raises(RefineError, match=r"asks to wait 86,400 s.*--patience is 3,600"):
        door.fail(1, wait_s=86_400)


def test_all_wait_as_long_as_the_server_asks():
    door = Door()

    async def enter():
        door.fail(1, wait_s=40)
        began = door.clock.now()
        await asyncio.gather(*(door.gate.enter() for _ in range(10)))
        return door.clock.now() - began

    assert 40 < door.clock.run(enter()) <= 40.5  # and not all at the same moment
    assert 400 < door.counted["seconds_waiting"] < 404


def test_requests_keep_to_the_rate():
    door = Door(per_minute=60)

    async def enter():
        began = door.clock.now()
        await asyncio.gather(*(door.gate.enter() for _ in range(20)))
        return door.clock.now() - began

    assert door.clock.run(enter()) == pytest.approx(19)


def test_after_an_error_nobody_enters():
    door = Door(failing_probes=10**9)

    async def enter():
        door.gate.error = RefineError("over")
        with pytest.raises(RefineError, match="over"):
            await door.gate.enter()
        door.gate.error = None
        door.fail(DOWN_AFTER)
        waiting = [asyncio.create_task(door.gate.enter()) for _ in range(3)]
        await door.clock.sleep(30)
        door.gate.error = RefineError("over")
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(e) for e in door.clock.run(enter())] == ["over"] * 3
