"""How fast a server may be asked, and how long it is left alone after it failed."""

import asyncio
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

BURST_SECONDS = 1.0  # of a rate may come at once


class Clock:
    """Time as it passes here.

    Args:
        speed: seconds of this clock in one of the world; tests have more than one.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() * self._speed

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._speed)


class Bucket:
    """A rate that is kept: whoever takes waits as long as `take` says.

    What is taken is owed at once, so that those who come later wait behind those who came before.

    Args:
        per_minute: the rate, in whatever is taken.
        now: seconds since some moment.
    """

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self._rate = per_minute / 60
        self._most = max(1.0, self._rate * BURST_SECONDS)
        self._held, self._at, self._now = self._most, now(), now

    def take(self, amount: float) -> float:
        """Returns the seconds to wait before what was taken may be used."""
        self._add(0.0)
        self._held -= amount
        return max(0.0, -self._held / self._rate)

    def give(self, amount: float) -> None:
        """Puts back what was taken and not used, or, below 0, takes what was used beyond it."""
        self._add(amount)

    def _add(self, amount: float) -> None:
        now = self._now()
        held = self._held + amount + (now - self._at) * self._rate
        self._held, self._at = min(self._most, held), now


@dataclass
class Backoff:
    """Waits that double up to a cap. Each is drawn between nothing and all of it, so that requests
    which failed together do not come back together.

    Attributes:
        base_s: the longest first wait, in seconds.
        cap_s: the longest wait of all.
        seed: of the draws.
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    seed: int = 0
    _draws: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._draws = random.Random(self.seed)

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures, 1 or more."""
        longest = self.base_s * 2 ** min(failures - 1, 32)
        return self._draws.uniform(0, min(self.cap_s, longest))


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """How many seconds a server asks to be left alone, 0 if it does not say.

    Args:
        headers: `retry-after` in seconds or as a date, which is read against the server's own
            `date` where there is one; keys in lower case, or in any if the mapping allows it.
        now: seconds since 1970.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value):
        return float(value)
    until = _seconds(value)
    if until is None:
        return 0.0
    there = _seconds(headers.get("date", ""))
    return max(0.0, until - (now if there is None else there))


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
