"""The same function over many items, in several processes, results in order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from refine.errors import RefineError

WAITING = 4  # items handed out ahead, per process: bounds the results that wait for a slow one
_state: Any = None


def nothing() -> None:
    """The setup of a function that needs none."""


def ordered_map(
    function: Callable, items: Sequence, workers: int, setup: Callable = nothing
) -> Iterator:
    """Yields function(setup(), item) for each item, in order; setup runs once per process.

    With one worker or item all happens in this process. Otherwise the processes are spawned, not
    forked: the caller may have JAX's threads running. All arguments must be importable.

    Raises:
        RefineError: a process was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        state = setup() if items else None
        yield from (function(state, item) for item in items)
        return
    pending: deque = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (setup,)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_call, function, item))
                if len(pending) >= WAITING * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as e:
            raise RefineError(
                "a worker process died, perhaps for want of memory: run the same command again "
                "with fewer --workers, it goes on where it stopped"
            ) from e
        finally:
            for future in pending:
                future.cancel()


def _start(setup: Callable) -> None:
    global _state
    end_with_parent()
    _state = setup()


def end_with_parent() -> None:
    """Called in a pool's process: it outlives a parent that was killed, and would go on writing."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable, item: Any) -> Any:
    return function(_state, item)
