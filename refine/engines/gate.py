"""The one door to a server: shut while it fails for everybody, and as narrow as its rates."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from refine.engines.pace import Backoff, Bucket, Clock
from refine.engines.wire import Fault
from refine.errors import RefineError
from refine.progress import console

DOWN_AFTER = 5  # failures in a row, of whichever requests


class Gate:
    """Lets requests through to a server when it is likely to answer them.

    After some failures in a row the server counts as down: requests wait, and one of them at a time
    sends a small question of no consequence until that is answered. So no request is used up by
    finding out, and a server that comes back is not met by all of them at once. Used on one event
    loop.

    Args:
        where: the server's address, for messages.
        probe: sends a small question; raises Fault. It tells `answered` or `failed` itself.
        clock: by which it waits.
        backoff: waits between probes.
        patience_s: how long the server may fail without one answer.
        per_minute: requests, or None.
        counted: takes "probes", "seconds_waiting" and faults by kind.

    Attributes:
        error: why nothing is let through any more, or None.
    """

    def __init__(
        self,
        where: str,
        probe: Callable[[], Awaitable[None]],
        clock: Clock,
        backoff: Backoff,
        patience_s: float,
        per_minute: float | None,
        counted: Counter[str],
    ) -> None:
        self.error: Exception | None = None
        self._where, self._probe, self._clock = where, probe, clock
        self._backoff, self._patience_s, self._counted = backoff, patience_s, counted
        self._rate = Bucket(per_minute, clock.now) if per_minute else None
        self._probing = asyncio.Lock()
        self._failures = 0
        self._failing_since = self._quiet_until = 0.0

    @property
    def down(self) -> bool:
        """The server fails for everybody."""
        return self._failures >= DOWN_AFTER

    async def enter(self) -> None:
        """Waits until a request may be sent.

        Raises:
            RefineError: none may, for good.
        """
        paid = self._rate is None
        while True:
            if self.error:
                raise self.error
            if self.down:
                await self._recover()
            elif quiet_s := self._quiet_s():
                await self.pause(quiet_s + self._backoff.delay(1))  # not all at once
            elif not paid:
                paid = True
                await self.pause(self._rate.take(1))
            else:
                return

    async def pause(self, seconds: float) -> None:
        """Waits, and counts it."""
        self._counted["seconds_waiting"] += seconds
        await self._clock.sleep(seconds)

    def answered(self) -> None:
        """The server answered something, to whomever."""
        if self.down:
            console.print(f"{self._where} answers again", markup=False, soft_wrap=True)
        self._failures = 0

    def failed(self, fault: Fault) -> None:
        """A request came to nothing.

        Raises:
            RefineError: nothing was answered for the whole patience, or will be until then.
        """
        now = self._clock.now()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._counted[fault.kind] += 1
        self._quiet_until = max(self._quiet_until, now + fault.wait_s)
        if max(now, self._quiet_until) - self._failing_since > self._patience_s:
            asks = f"; it asks to wait {fault.wait_s:,.0f} s" if fault.wait_s else ""
            raise RefineError(
                f"{self._where} has answered nothing for {now - self._failing_since:,.0f} s "
                f"({fault}{asks}), and --patience is {self._patience_s:,.0f} s. What was answered "
                "before is kept: the same command goes on when the server is back"
            )
        if self._failures == DOWN_AFTER:
            console.print(
                f"{self._where} does not answer ({fault}): asking now and then, for up to "
                f"{self._patience_s:,.0f} s",
                markup=False,
                soft_wrap=True,
            )

    async def _recover(self) -> None:
        """Sends probes until the server answers, or waits while another request does."""
        async with self._probing:
            failures = 0
            while self.down and not self.error:
                failures += 1
                await self.pause(max(self._backoff.delay(failures), self._quiet_s()))
                if not self.down or self.error:
                    return
                self._counted["probes"] += 1
                try:
                    await self._probe()
                except Fault:
                    continue

    def _quiet_s(self) -> float:
        return max(0.0, self._quiet_until - self._clock.now())
