import logging
import threading
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from hqclip_jax import watchdog as watchdog_lib
from hqclip_jax.config import WatchdogConfig
from hqclip_jax.watchdog import Beat, Watchdog, laggards

CONFIG = WatchdogConfig(warn=100.0, abort=1000.0)
WAITING = Watchdog.WAITING


class Service:
    """Stands in for JAX's coordination service, which all hosts see alike."""

    def __init__(self, **beats: str) -> None:
        self.stored = {f"hqclip_jax/beat/{host[1:]}": beat for host, beat in beats.items()}
        self.sets = 0
        self.broken: type[Exception] | None = None

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self.sets += 1
        if self.broken:
            raise self.broken("UNAVAILABLE: failed to connect")
        assert allow_overwrite or key not in self.stored
        self.stored[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        if self.broken:
            raise self.broken("UNAVAILABLE: failed to connect")
        return [(key, value) for key, value in self.stored.items() if key.startswith(prefix)]


@pytest.fixture
def made(tmp_path, monkeypatch, caplog) -> Any:
    """Makes a watchdog with a clock of ours, whose process only notes how it would end."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(watchdog_lib.platform, "node", lambda: "here")

    def make(service: Service | None = None, config: WatchdogConfig = CONFIG) -> SimpleNamespace:
        monkeypatch.setattr(watchdog_lib.distributed.global_state, "client", service)
        told = SimpleNamespace(now=50.0, ended=[], stacks=tmp_path / "stacks-0.txt")
        told.dog = Watchdog(config, told.stacks, lambda: told.now, told.ended.append)
        return told

    return make


def test_nothing_is_said_while_steps_are_made(made, caplog):
    told = made()
    for step in range(50):
        told.now += 99
        told.dog.look()
        told.dog.beat(step, "making a step")
        told.dog.look()
    assert caplog.messages == [] and told.ended == [] and not told.stacks.exists()


def test_complaints_come_at_doubled_distance_and_begin_anew_after_a_step(made, caplog):
    told = made()
    told.dog.beat(7, "waiting for data")
    when = []
    for second in range(0, 999, 10):
        told.now = 50.0 + second
        told.dog.look()
        if len(caplog.messages) > len(when):
            when.append(second)
    assert when == [100, 200, 400, 800] and told.ended == []
    assert caplog.messages[1] == (
        "no step for 200 s: late is host 0 (here), waiting for data at step 7; this is host 0 "
        f"(here), waiting for data at step 7. Stacks are in {told.stacks}"
    )
    told.dog.beat(8, "making a step")
    told.dog.look()
    told.now += 100
    told.dog.look()
    assert len(caplog.messages) == 5 and "no step for 100 s" in caplog.messages[-1]


def test_stacks_of_all_threads_are_appended(made):
    told = made()
    told.stacks.write_text("of the start before\n")
    held = threading.Event()
    thread = threading.Thread(target=held.wait, name="held")
    thread.start()
    for _ in range(2):
        told.now += 100
        told.dog.look()
    held.set()
    thread.join()
    text = told.stacks.read_text()
    assert text.startswith("of the start before\n")
    assert "host 0 (here), starting at step 0, for 100 s\n" in text and ", for 200 s\n" in text
    assert text.count("test_stacks_of_all_threads_are_appended") == 2
    assert text.count("threading.py") >= 2 and text.count("Thread 0x") >= 2


def test_a_run_that_stays_still_is_ended_with_a_status_that_asks_to_try_again(made, caplog):
    told = made()
    told.now += 999.9
    told.dog.look()
    assert told.ended == []
    told.now += 0.1
    told.dog.look()
    assert told.ended == [75] == [watchdog_lib.STATUS]
    assert "watchdog.abort=1000: ending with status 75" in caplog.messages[-1]


def test_the_first_of_several_ends_last(made):
    told = made(Service())
    for seconds, ended in ((1009.9, []), (1010.0, [75])):
        told.now = 50.0 + seconds
        told.dog.look()
        assert told.ended == ended


def test_it_ends_even_where_no_stacks_can_be_written(made, caplog):
    told = made()
    told.stacks.mkdir()
    told.now += 1000
    told.dog.look()
    assert told.ended == [75] and "no stacks: " in caplog.text


def beat(host: int, step: int, doing: str) -> Beat:
    return Beat(host, "node", step, doing, 0.0)


@pytest.mark.parametrize(
    ("doings", "late"),
    [
        ([(5, WAITING), (5, WAITING), (4, "waiting for data")], [2]),
        ([(5, WAITING), (5, "saving"), (5, WAITING)], [1]),
        ([(5, "saving"), (4, WAITING), (4, "making a step"), (4, "waiting for data")], [2, 3]),
        ([(5, WAITING), (5, WAITING)], [0, 1]),
        ([(3, "compiling")], [0]),
    ],
    ids=["behind", "beside those that wait", "several", "all wait", "alone"],
)
def test_late_is_who_is_at_the_lowest_step_and_does_not_wait_for_others(doings, late):
    beats = [beat(host, *doing) for host, doing in enumerate(doings)]
    assert [b.host for b in laggards(beats, WAITING)] == late


def test_the_beats_of_others_are_read(made, caplog):
    service = Service(_0="0|of a start before|old", _1=f"8|{WAITING}|there", _12="7|saving|far")
    told = made(service)
    told.dog.beat(8, WAITING)
    told.now += 100
    told.dog.look()
    assert service.stored["hqclip_jax/beat/0"] == f"8|{WAITING}|here"
    assert "late is host 12 (far), saving at step 7; this is host 0 (here)" in caplog.text
    assert sorted(b.host for b in told.dog._others()) == [1, 12]
    sets = service.sets
    told.dog.look()
    assert service.sets == sets  # it has heard this
    told.dog.beat(9, WAITING)
    told.dog.look()
    assert service.stored["hqclip_jax/beat/0"] == f"9|{WAITING}|here"


def test_a_service_that_is_gone_stops_neither_complaint_nor_end(made, caplog):
    service = Service(_1=f"8|{WAITING}|there")
    told = made(service)
    service.broken = jax.errors.JaxRuntimeError
    for _ in range(3):
        told.dog.look()
    assert len(caplog.messages) == 1 and "takes no sign of life" in caplog.text
    told.now += 1010
    told.dog.look()
    assert "what the other hosts do is not known" in caplog.text
    assert "late is host 0 (here), starting at step 0" in caplog.text
    assert told.ended == [75] and told.stacks.exists()


def test_a_service_that_is_back_is_told_what_it_missed(made, caplog):
    service = Service()
    told = made(service)
    service.broken = jax.errors.JaxRuntimeError
    told.dog.look()
    service.broken = None
    told.dog.look()
    assert service.stored == {"hqclip_jax/beat/0": "0|starting|here"}
    service.broken = jax.errors.JaxRuntimeError
    told.dog.beat(1, "making a step")
    told.dog.look()
    assert len(caplog.messages) == 2


def test_the_thread_looks_until_it_is_left(made):
    told = made(config=WatchdogConfig(warn=0.01, abort=1000.0))
    told.now += 1000
    ended = threading.Event()
    told.dog._end = lambda status: ended.set()
    with told.dog:
        assert ended.wait(60)
    assert not told.dog._thread.is_alive()


def test_a_thread_that_the_service_keeps_does_not_hold_up_the_end(made, monkeypatch):
    monkeypatch.setattr(watchdog_lib, "_JOIN", 0.01)
    service, inside, answer = Service(), threading.Event(), threading.Event()

    def hangs(*_: Any, **__: Any) -> None:
        inside.set()
        answer.wait(60)

    service.key_value_set = hangs
    told = made(service, WatchdogConfig(warn=0.01, abort=1000.0))
    with told.dog:
        assert inside.wait(60)
    assert told.dog._thread.is_alive() and told.dog._thread.daemon
    answer.set()
    told.dog._thread.join(60)
