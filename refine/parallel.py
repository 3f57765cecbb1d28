"""The same function over many items, in several processes, results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from refine.errors import RefineError

WAITING = 4  # items handed out ahead, per process: bounds the results that wait for a slow one
_state: Any = None


def nothing() -> None:
    """The setup of a function that needs none."""


class Workers:
    """Processes that work for this one, each with a state of its own.

    They are spawned, not forked: the caller may have JAX's or an engine's threads running. All
    arguments must be importable.

    Args:
        count: of processes.
        setup: makes the state, once per process.
    """

    def __init__(self, count: int, setup: Callable = nothing) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start, (setup,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable, item: Any) -> Future:
        """Starts function(state, item); ask for its result with `result_of`."""
        with _told():
            return self._pool.submit(_call, function, item)

    def warm(self) -> None:
        """Starts a process before there is work for it: imports take a second or two."""
        self.submit(_idle, None)

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """Yields function(state, item) for each item, in order; takes a few items ahead.

        Raises:
            RefineError: a process was killed.
        """
        pending: deque[Future] = deque()
        try:
            for item in items:
                pending.append(self.submit(function, item))
                if len(pending) >= WAITING * self.count:
                    yield result_of(pending.popleft())
            while pending:
                yield result_of(pending.popleft())
        finally:
            for future in pending:
                future.cancel()


def result_of(future: Future) -> Any:
    """What a process made of an item.

    Raises:
        RefineError: a process was killed.
    """
    with _told():
        return future.result()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as e:
        raise RefineError(
            "a worker process died, perhaps for want of memory: run the same command again "
            "with fewer --workers, it goes on where it stopped"
        ) from e


def ordered_map(
    function: Callable, items: Sequence, workers: int, setup: Callable = nothing
) -> Iterator:
    """Yields function(setup(), item) for each item, in order; setup runs once per process. With one
    worker or item all happens in this process.

    Raises:
        RefineError: a process was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        state = setup() if items else None
        yield from (function(state, item) for item in items)
        return
    with Workers(workers, setup) as pool:
        yield from pool.map(function, items)


def _idle(state: Any, item: None) -> None:
    pass


def _start(setup: Callable) -> None:
    global _state
    end_with_parent()
    _state = setup()


def end_with_parent(group: bool = False) -> None:
    """Called in a process at its start: it outlives a parent that was killed, and would go on
    writing. With `group` it leads a process group of its own and takes all that it started along,
    such as an engine's process that holds a GPU."""
    if group:
        os.setpgid(0, 0)
    threading.Thread(target=_wait_for_parent, args=(group,), daemon=True).start()


def _wait_for_parent(group: bool) -> None:
    multiprocessing.parent_process().join()
    if group:
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _call(function: Callable, item: Any) -> Any:
    return function(_state, item)
