"""Says which host is late when a run stands still, and ends it when it stays so."""

import faulthandler
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
from jax._src import distributed  # JAX's only way to what its processes tell each other

from hqclip_jax.config import WatchdogConfig

log = logging.getLogger(__name__)

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
_KEY = "hqclip_jax/beat/"
# Seconds; JAX's service may keep the thread for ever, and then it dies with the process.
_JOIN = 5.0
# Seconds that the first process of several stays longer: its end, which takes JAX's service away,
# aborts the others before they have told theirs.
_LAST = 10.0


class Beat(NamedTuple):
    """The last sign of life of a host.

    Attributes:
        host: index of its process.
        name: of the machine.
        step: that it is at.
        doing: such as "waiting for data".
        since: seconds that it has been doing so.
    """

    host: int
    name: str
    step: int
    doing: str
    since: float

    def __str__(self) -> str:
        return f"host {self.host} ({self.name}), {self.doing} at step {self.step}"


def laggards(beats: list[Beat], waiting: str) -> list[Beat]:
    """Who keeps the others: the hosts at the lowest step that don't wait for a step's result
    themselves, or all at that step."""
    lowest = min(beat.step for beat in beats)
    last = [beat for beat in beats if beat.step == lowest]
    return [beat for beat in last if beat.doing != waiting] or last


class Watchdog:
    """A thread that looks at how long ago the loop gave a sign of life.

    Every host tells the others what it does through JAX's coordination service, so that the one
    that is late can be named by all.
    """

    WAITING = "waiting for a step's result"

    def __init__(
        self,
        config: WatchdogConfig,
        stacks: Path,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Args:
        stacks: file that the stacks of all threads are appended to.
        clock: seconds.
        end: ends the process with a status.
        """
        self.config = config
        self._stacks = stacks
        self._clock = clock
        self._end = end
        self._client = distributed.global_state.client
        self._step, self._doing, self._since = 0, "starting", clock()
        self._next = config.warn
        self._told: tuple[int, str] | None = None
        self._heard = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join(_JOIN)

    def beat(self, step: int, doing: str) -> None:
        """A sign of life from the loop."""
        self._step, self._doing, self._since = step, doing, self._clock()

    def _run(self) -> None:
        pause = min(self.config.warn / 10, 10.0)
        while not self._closed.wait(pause):
            self.look()

    def look(self) -> None:
        """Tells the others, and complains where the loop has been still for too long."""
        own = Beat(
            jax.process_index(), platform.node(), self._step, self._doing,
            self._clock() - self._since,
        )  # fmt: skip
        self._tell(own)
        if own.since < self.config.warn:
            self._next = self.config.warn
        elif own.since >= self._next:
            self._next *= 2
            late = laggards(self._others() + [own], self.WAITING)
            log.error(
                "no step for %.0f s: late is %s; this is %s. Stacks are in %s",
                own.since, " and ".join(map(str, late)), own, self._stacks,
            )  # fmt: skip
            self._dump(own)
        first_of_many = self._client is not None and own.host == 0
        if own.since >= self.config.abort + _LAST * first_of_many:
            log.error(
                "no step for %.0f s, watchdog.abort=%g: ending with status %d; started again the "
                "run continues from its last checkpoint", own.since, self.config.abort, STATUS,
            )  # fmt: skip
            self._end(STATUS)

    def _dump(self, own: Beat) -> None:
        try:
            with self._stacks.open("a") as file:
                print(f"\n{own}, for {own.since:.0f} s", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as e:  # what the run hangs on may be this very disk
            log.error("no stacks: %s", e)

    def _tell(self, own: Beat) -> None:
        if self._client is None or (own.step, own.doing) == self._told:
            return
        value = f"{own.step}|{own.doing}|{own.name}"
        try:
            self._client.key_value_set(f"{_KEY}{own.host}", value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as e:  # host 0 may be gone, and this one must still end
            if self._heard:
                log.warning("JAX's coordination service takes no sign of life: %s", e)
            self._heard = False
            return
        self._told, self._heard = (own.step, own.doing), True

    def _others(self) -> list[Beat]:
        if self._client is None:
            return []
        try:
            beats = self._client.key_value_dir_get(_KEY)
        except jax.errors.JaxRuntimeError as e:
            log.warning("what the other hosts do is not known: %s", e)
            return []
        found = []
        for key, value in beats:
            host = int(key.rpartition("/")[2])
            step, doing, name = value.split("|")
            if host != jax.process_index():
                found.append(Beat(host, name, int(step), doing, 0.0))
        return found
