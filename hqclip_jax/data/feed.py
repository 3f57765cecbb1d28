"""Batches on the device, made ahead of the step by a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np

from hqclip_jax.data.pipeline import NumpyBatch

POLL = 0.1  # seconds between two looks at whether to go on waiting


class Fed(NamedTuple):
    """A batch: its arrays on the device, and the uids S32 [b] of this host's rows."""

    arrays: dict[str, jax.Array]
    uids: np.ndarray


class Feed:
    """Takes batches from an iterator, puts them on the device, and keeps some ready.

    Attributes:
        NAME: of its thread, which outlives it where a read hangs.

    Args:
        batches: the host's own.
        put: makes global arrays of one.
        ahead: batches that wait on the device; each takes its memory there.
    """

    NAME = "feed"

    def __init__(
        self,
        batches: Iterator[NumpyBatch],
        put: Callable[[NumpyBatch], dict[str, jax.Array]],
        ahead: int = 2,
    ) -> None:
        self._batches = batches
        self._put = put
        self._ready: queue.Queue[Fed | BaseException] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name=self.NAME, daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Ends the thread, unless a read hangs: then it dies with the process."""
        self._closed.set()
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._batches.close()

    def next(self, stop: Callable[[], bool]) -> Fed | None:
        """The next batch, or None as soon as `stop` says so.

        Raises:
            whatever reading raised.
        """
        while not stop():
            try:
                found = self._ready.get(timeout=POLL)
            except queue.Empty:
                continue
            if isinstance(found, BaseException):
                raise found
            return found
        return None

    def _fill(self) -> None:
        found: Fed | BaseException
        while not self._closed.is_set():
            try:
                batch = next(self._batches)
                found = Fed(self._put(batch), batch["uid"])
            except Exception as e:
                found = e
            while not self._closed.is_set():
                try:
                    self._ready.put(found, timeout=POLL)
                    break
                except queue.Full:
                    continue
            if isinstance(found, BaseException):
                return
