import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hqclip_jax import signals
from hqclip_jax.config import MeshConfig
from hqclip_jax.sharding import make_mesh
from hqclip_jax.signals import SAVE, STOP, StopSignal, leave, meet, send

ROOT = Path(__file__).parent.parent


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def saving() -> Iterator[StopSignal]:
    """Of a loop that has made its first step."""
    ended: list[int] = []
    with StopSignal(at_once=ended.append) as stop:
        stop.saves = True
        yield stop
    assert ended == []


def test_the_first_signal_is_remembered(saving):
    assert not saving and saving.number == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        assert saving and saving.number == signal.SIGTERM


@pytest.mark.parametrize("before", [[], [signal.SIGTERM]], ids=["alone", "after SIGTERM"])
def test_a_second_sigint_interrupts(saving, before):
    for number in (*before, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_with_nothing_to_save_it_ends_while_the_main_thread_is_in_c():
    """Where Python's own handlers would wait for many minutes."""
    program = """
import hashlib, os, signal
from hqclip_jax.signals import StopSignal
with StopSignal(lambda number: os._exit(100 + number)):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert ended.returncode == 100 + signal.SIGTERM


def test_at_once_is_called_from_a_thread_of_its_own():
    called: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    with StopSignal(lambda number: called.put((number, threading.current_thread().name))):
        os.kill(os.getpid(), signal.SIGTERM)
        assert called.get(timeout=60) == (signal.SIGTERM, "signals")
    assert called.empty()


def test_other_signals_are_left_alone():
    """Whoever handles one writes into the pipe too."""
    called: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopSignal(called.append) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not stop and called == []


@pytest.mark.parametrize("error", [None, KeyError], ids=["in order", "after an error"])
def test_all_is_as_before_when_it_is_left(error):
    mine = lambda *_: None
    read, write = os.pipe()
    os.set_blocking(write, False)
    old = {s: signal.signal(s, mine) for s in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(write)
    try:
        before = descriptors()
        try:
            with StopSignal():
                assert signal.getsignal(signal.SIGTERM) is not mine
                assert descriptors() == before + 2
                if error:
                    raise error
        except KeyError:
            pass
        assert descriptors() == before
        assert signal.set_wakeup_fd(write) == write
        assert {signal.getsignal(s) for s in old} == {mine}
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)])
def test_every_device_gets_one_row_of_signals(sizes):
    mesh = make_mesh(MeshConfig(*sizes), 8)
    for told in ({}, {"stop": True}, {"save": True}, {"stop": True, "save": True}):
        sent = send(mesh, **told)
        assert sent.shape == (8, 2) and sent.dtype == np.int32
        shards = sent.addressable_shards
        assert {shard.device for shard in shards} == set(jax.devices())
        assert {shard.index[0].start for shard in shards} == set(range(8))
        for shard in shards:
            assert shard.data.shape == (1, 2)
            row = np.asarray(shard.data)[0]
            assert (row[STOP], row[SAVE]) == (told.get("stop", 0), told.get("save", 0))


class Ended(BaseException):
    pass


def test_a_host_that_ends_alone_keeps_its_status(monkeypatch):
    waits: list[tuple[str, int]] = []

    def wait_at_barrier(name: str, milliseconds: int) -> None:
        waits.append((name, milliseconds))
        if len(waits) == 2:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: 1/2 tasks reached the barrier")

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(signals.os, "_exit", end)
    leave(2)  # nobody to wait for
    meet("lease", 600)
    client = SimpleNamespace(wait_at_barrier=wait_at_barrier)
    monkeypatch.setattr(signals.distributed.global_state, "client", client)
    leave(0)  # all are there: the interpreter may end as it does
    with pytest.raises(Ended, match=r"^2$"):
        leave(2)
    meet("lease", 600)
    assert waits == [("hqclip_jax/leave", 30_000)] * 2 + [("hqclip_jax/lease", 600_000)]


def test_a_read_that_hangs_does_not_keep_the_program():
    """Python waits for the threads of a pool, and the read is in one of them."""
    program = """
import threading
from concurrent.futures import ThreadPoolExecutor
from hqclip_jax.data import feed
from hqclip_jax.signals import end
pool, began = ThreadPoolExecutor(1), threading.Event()
def read():
    began.set()
    threading.Event().wait()
def batches():
    yield {"uid": [pool.submit(read).result()]}
with feed.Feed(batches(), dict):
    began.wait()
    feed.threading.Thread.join = lambda *_, **__: None  # it need not be given time here
print("closed")
end(7)
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (7, "closed\n"), ended.stderr


def test_a_host_hears_of_the_signals_of_others(monkeypatch):
    told = [("hqclip_jax/stop/3", "15")]
    client = SimpleNamespace(
        key_value_dir_get=lambda key: [pair for pair in told if pair[0].startswith(key)],
        key_value_set=lambda key, value, allow_overwrite: told.append((key, value)),
    )
    monkeypatch.setattr(signals.distributed.global_state, "client", client)
    monkeypatch.setattr(signals, "LOOK", 0.0)
    with StopSignal() as stop:
        stop.saves = True
        assert not stop
        assert stop.anywhere() and stop.number == signal.SIGTERM


def test_a_host_tells_the_others_of_its_signals(monkeypatch):
    told: queue.Queue = queue.Queue()
    client = SimpleNamespace(key_value_set=lambda key, value, **_: told.put((key, value)))
    monkeypatch.setattr(signals.distributed.global_state, "client", client)
    with StopSignal() as stop:
        stop.saves = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.get(timeout=30) == ("hqclip_jax/stop/0", "15")
