"""What requests to a server cost: in tokens before the server has counted them, and in money."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from refine.engines.backend import Reply
from refine.engines.pace import Bucket, Clock
from refine.engines.wire import Fault
from refine.errors import RefineError

CHARACTERS, PIXELS = 4, 784  # in a token, about; a patch of Qwen2-VL's is 28x28
PICTURE = 256  # tokens of the smallest picture, about, where a server counts by tiles
MARGIN = 1.25  # on the most that a prompt had beside what was guessed
BILLED = ("timeouts", "half_answers")  # faults after which a server may bill what did not arrive


@dataclass(frozen=True)
class Prices:
    """What a server takes.

    Attributes:
        input: USD for a million tokens of prompts.
        output: USD for a million tokens of answers.
        most: USD to be spent in all, or None for no limit.
    """

    input: float = 0.0
    output: float = 0.0
    most: float | None = None

    def usd(self, prompt_tokens: float, output_tokens: float) -> float:
        return (self.input * prompt_tokens + self.output * output_tokens) / 1e6


class Estimate:
    """Tokens of a prompt before the server has counted them.

    Servers count pictures by rules of their own, so the guess is corrected by the most that a
    prompt had beside its guess.

    Attributes:
        known: a prompt has been counted.
    """

    def __init__(self) -> None:
        self.known, self._factor = False, 1.0

    def tokens(self, characters: int, pixels: int) -> float:
        """The most that a prompt has, as far as is known."""
        return self._factor * (PICTURE + characters / CHARACTERS + pixels / PIXELS)

    def learn(self, guessed: float, counted: int) -> None:
        """Takes what `tokens` said of a prompt, and what the server said."""
        needed = MARGIN * counted * self._factor / guessed
        self._factor = max(self._factor, needed) if self.known else needed
        self.known = True


class Meter:
    """Keeps the tokens of requests within a rate, and their cost within a limit.

    A request is let go when the limit holds even if it and all under way cost the most they can.
    Used on one event loop.

    Args:
        prices: what tokens cost.
        tokens_per_minute: of prompts and answers, or None.
        clock: for the rate.
        counted: takes "cost_usd" and "seconds_waiting".
        max_tokens: of an answer.
    """

    def __init__(
        self,
        prices: Prices,
        tokens_per_minute: float | None,
        clock: Clock,
        counted: Counter[str],
        max_tokens: int,
    ) -> None:
        self._prices, self._clock, self._counted = prices, clock, counted
        self._rate = Bucket(tokens_per_minute, clock.now) if tokens_per_minute else None
        self._max_tokens = max_tokens
        self._estimate = Estimate()
        self._spent = self._reserved = 0.0
        self._under_way = 0
        self._freed = asyncio.Event()

    def spent(self, prompt_tokens: int, output_tokens: int) -> None:
        """Takes tokens that earlier runs used."""
        self._spent += self._prices.usd(prompt_tokens, output_tokens)

    @asynccontextmanager
    async def request(self, characters: int, pixels: int) -> AsyncIterator["Bill"]:
        """Waits until a request may be sent, and counts what it cost when the context ends.

        Args:
            characters: of its text.
            pixels: of its picture.

        Raises:
            RefineError: it does not fit the limit, and none is under way that may turn out cheaper.
        """
        guessed, reserved = await self._reserve(characters, pixels)
        bill, lost = Bill(self._prices.most is not None), 0.0
        try:
            if self._rate:
                wait_s = self._rate.take(guessed + self._max_tokens)
                self._counted["seconds_waiting"] += wait_s
                await self._clock.sleep(wait_s)
            yield bill
            if bill.prompt_tokens:
                self._estimate.learn(guessed, bill.prompt_tokens)
        except Fault as fault:
            lost = reserved if fault.kind in BILLED else 0.0
            raise
        finally:
            if self._rate:
                used = bill.prompt_tokens + bill.output_tokens
                self._rate.give(guessed + self._max_tokens - used)
            self._reserved -= reserved
            self._under_way -= 1
            self.add(bill, lost)
            self._freed.set()

    def add(self, bill: "Bill", lost: float = 0.0) -> None:
        """Adds what a request used to what is spent; `lost` is in USD."""
        usd = lost + self._prices.usd(bill.prompt_tokens, bill.output_tokens)
        self._spent += usd
        self._counted["cost_usd"] += usd

    async def _reserve(self, characters: int, pixels: int) -> tuple[float, float]:
        """Waits until a request fits the limit; returns the tokens of its prompt and what it may
        cost, as far as is known then."""
        most = self._prices.most
        while True:
            guessed = self._estimate.tokens(characters, pixels)
            usd = self._prices.usd(guessed, self._max_tokens)
            if most is None or not self._under_way:
                break
            # The first goes alone: its guess rests on nothing yet.
            if self._estimate.known and self._spent + self._reserved + usd <= most:
                break
            self._freed.clear()
            await self._freed.wait()
        if most is not None and self._spent + self._reserved + usd > most:
            raise RefineError(
                f"--max-cost {most:g}: ${self._spent:.4f} is spent, and the next request may cost "
                f"${usd:.4f}. What was answered is kept: the same command with a higher --max-cost "
                "goes on"
            )
        self._reserved += usd
        self._under_way += 1
        return guessed, usd


@dataclass
class Bill:
    """What one request used.

    Attributes:
        needed: an answer must say it.
        prompt_tokens: of the question.
        output_tokens: of the answer.
    """

    needed: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0

    def take(self, reply: Reply) -> None:
        """Reads it off a reply.

        Raises:
            RefineError: the server does not say it where it is needed.
        """
        self.prompt_tokens, self.output_tokens = reply.prompt_tokens, reply.output_tokens
        if self.needed and not reply.failure and not self.prompt_tokens:
            raise RefineError(
                "--max-cost can't be kept: the server does not say how many tokens an answer took"
            )
