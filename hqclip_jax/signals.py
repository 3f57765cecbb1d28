"""What one host has to tell all: that the run shall end, or save.

Hosts that stop at different steps would wait for each other in a collective for ever. So a host
tells it through the step: every device gets the signals of its host with the batch, the step takes
their maximum, and all hosts read the same answer at the same step. A step that is told to stop
changes nothing, nor does any after it, so a host that has no batch to give can tell it too.

Only a host that waits for its data would not hear of it, where the one that was asked waits for it
in a step begun before. So every signal is told JAX's coordination service too, and it looks there.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed  # JAX's only way to what its processes tell each other
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hqclip_jax.data.feed import Feed

STOP, SAVE = range(2)
SIGNALS = 2

LEAVE = 30  # seconds that an ended process waits for the others
_KEY = "hqclip_jax/stop/"
LOOK = 1.0  # seconds between two looks at what other hosts were asked


class Control(NamedTuple):
    """What a step answers its hosts.

    Attributes:
        stopped: whether this step and all after it change nothing.
        save: whether a host asked to save.
        streak: updates skipped in a row.
    """

    stopped: int
    save: int
    streak: int


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """One row of signals a device. Not one a row of the batch: hosts beside each other along
    `tensor` hold the same rows, and may have different things to tell."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def send(mesh: Mesh, stop: bool = False, save: bool = False) -> jax.Array:
    """This host's signals, int32 [devices, SIGNALS]."""
    row = np.zeros(SIGNALS, np.int32)
    row[STOP], row[SAVE] = stop, save
    own = np.tile(row, (jax.local_device_count() if jax.process_count() > 1 else mesh.size, 1))
    return jax.make_array_from_process_local_data(signal_sharding(mesh), own, (mesh.size, SIGNALS))


def meet(name: str, seconds: int) -> None:
    """Waits until all processes are here, and for no device: a first collective times out early.

    Raises:
        JaxRuntimeError: they were not in time, or one has ended.
    """
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(f"hqclip_jax/{name}", 1000 * seconds)


def leave(status: int) -> None:
    """Ends the process with `status` where the others do not end with it; returns where they do.

    An interpreter that ends would have JAX wait five minutes for the others, which wait for it in
    a collective, and then abort all of them with a status of its own.
    """
    try:
        meet("leave", LEAVE)
    except jax.errors.JaxRuntimeError:
        _exit(status)


def end(status: int) -> NoReturn:
    """Ends the program, also where a thread hangs in a read, which Python would wait for."""
    if any(thread.name == Feed.NAME for thread in threading.enumerate()):
        jax.distributed.shutdown()
        for process in multiprocessing.active_children():
            process.kill()
        _exit(status)
    sys.exit(status)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignal:
    """Remembers the first SIGTERM or SIGINT, so that the loop can save before it ends.

    A second SIGINT stops at once. While there is nothing to save, which `saves` says, a signal ends
    the process at once too, even in the midst of a compile, where Python's own handlers wait.

    Attributes:
        number: of the first signal that came, 0 without.
    """

    def __init__(self, at_once: Callable[[int], None] | None = None) -> None:
        """Args:
        at_once: ends the process while there is nothing to save, given the signal's number.
        """
        self.number = 0
        self.saves = False
        self._at_once = at_once or (lambda number: os._exit(128 + number))
        self._interrupted = False
        self._client = distributed.global_state.client
        self._looked = 0.0
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.number)

    def __enter__(self) -> "StopSignal":
        # The C handler writes the number into the pipe whatever the main thread is doing.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {s: signal.signal(s, self._on) for s in (signal.SIGTERM, signal.SIGINT)}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)
        self._thread.join()

    def anywhere(self) -> bool:
        """Whether this host was asked to stop, or another, and so this one too."""
        if not self.number and self._client and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            for _, number in self._client.key_value_dir_get(_KEY):
                self.number = int(number)
        return bool(self)

    def _on(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.number = self.number or number

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] not in self._old:
                continue
            if not self.saves:
                self._at_once(number[0])
            elif self._client:
                # From here, for the main thread may wait in a step and see its own signal after it.
                own = f"{_KEY}{jax.process_index()}"
                self._client.key_value_set(own, str(number[0]), allow_overwrite=True)
        os.close(self._read)
