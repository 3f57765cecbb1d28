import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from hqclip_jax.data import feed as feed_lib
from hqclip_jax.data.feed import Fed, Feed

WAIT = 30  # seconds after which a test that hangs fails


class Batches(Iterator):
    """Numbered batches; the one numbered `hangs` comes when `release` is set, `breaks` raises."""

    def __init__(self, hangs: int | None = None, breaks: int | None = None) -> None:
        self.hangs, self.breaks = hangs, breaks
        self.taken = 0
        self.waits, self.release = threading.Event(), threading.Event()
        self.closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        number = self.taken
        if number == self.breaks:
            raise OSError(f"batch {number} can't be read")
        self.taken += 1
        if number == self.hangs:
            self.waits.set()
            assert self.release.wait(WAIT)
        return {"uid": np.array([b"%d" % number]), "image": np.array([number])}

    def close(self) -> None:
        self.closed = True


def put(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": batch["image"] + 100}


def take(feed: Feed) -> Fed:
    end = time.monotonic() + WAIT
    fed = feed.next(lambda: time.monotonic() > end)
    assert fed is not None, "no batch comes"
    return fed


@pytest.fixture
def full(monkeypatch) -> threading.Event:
    """Set when a feed finds no room for the batch it has in hand."""
    event = threading.Event()

    class Queue(queue.Queue):
        def put(self, *args, **options):
            try:
                super().put(*args, **options)
            except queue.Full:
                event.set()
                raise

    names = SimpleNamespace(Queue=Queue, Full=queue.Full, Empty=queue.Empty)
    monkeypatch.setattr(feed_lib, "queue", names)
    monkeypatch.setattr(feed_lib, "POLL", 0.001)
    return event


def test_batches_come_in_order_and_with_their_uids():
    with Feed(Batches(), put) as feed:
        for number in range(50):
            fed = take(feed)
            assert fed.arrays == {"image": [100 + number]} and fed.uids == [b"%d" % number]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_is_taken_than_may_wait(full, ahead):
    batches = Batches()
    with Feed(batches, put, ahead) as feed:
        for consumed in range(4):
            # Full for a second time: the first may have been found before the last was consumed.
            for _ in range(2):
                full.clear()
                assert full.wait(WAIT)
            assert batches.taken == consumed + ahead + 1
            take(feed)


def test_a_wait_ends_when_it_is_told_to():
    batches, asked = Batches(hangs=1), []
    with Feed(batches, put) as feed:
        assert take(feed).uids == [b"0"]
        assert batches.waits.wait(WAIT)

        def stop() -> bool:
            asked.append(1)
            return len(asked) == 3

        began = time.monotonic()
        assert feed.next(stop) is None
        assert len(asked) == 3 and time.monotonic() - began < 5
        batches.release.set()
        assert take(feed).uids == [b"1"]  # the wait was broken off, not the batch lost


def test_whoever_is_told_to_stop_takes_no_batch(full):
    with Feed(Batches(), put) as feed:
        assert full.wait(WAIT)
        assert feed.next(lambda: True) is None
        assert take(feed).uids == [b"0"]


def test_an_error_of_the_iterator_comes_after_the_batches_before_it():
    with Feed(Batches(breaks=2), put) as feed:
        assert [take(feed).uids for _ in range(2)] == [[b"0"], [b"1"]]
        with pytest.raises(OSError, match="batch 2 can't be read"):
            take(feed)


def test_an_error_on_the_way_to_the_device_comes_out_too():
    def full_at_one(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if batch["image"] == 1:
            raise MemoryError("the device is full")
        return batch

    with Feed(Batches(), full_at_one) as feed:
        assert take(feed).uids == [b"0"]
        with pytest.raises(MemoryError, match="the device is full"):
            take(feed)


@pytest.mark.parametrize("error", [None, KeyError])
def test_closing_ends_the_thread_and_closes_the_iterator(full, error):
    batches = Batches()
    before = threading.active_count()
    try:
        with Feed(batches, put):
            assert full.wait(WAIT)
            assert threading.active_count() == before + 1 and not batches.closed
            if error:
                raise error
    except KeyError:
        pass
    assert threading.active_count() == before and batches.closed


def test_closing_after_an_error_of_the_iterator():
    batches = Batches(breaks=0)
    with pytest.raises(OSError), Feed(batches, put) as feed:
        take(feed)
    assert batches.closed
