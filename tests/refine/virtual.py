"""Time that passes at once where all tasks wait, and not at all where one works."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

from refine.engines.pace import Clock


class _Selector(selectors.DefaultSelector):
    passed = 0.0

    def select(self, timeout: float | None = None) -> list:
        self.passed += max(0.0, timeout or 0.0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def time(self) -> float:
        return self._selector.passed


class VirtualClock(Clock):
    """A clock whose sleeps take no time; `run` runs what sleeps by it."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = _Loop(_Selector())

    def now(self) -> float:
        return self._loop.time()

    def run(self, coroutine: Coroutine) -> Any:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            return runner.run(coroutine)
