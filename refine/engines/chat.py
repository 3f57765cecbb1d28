"""A server at work: every request gets one reply, whatever the server does meanwhile.

A thread of its own runs an event loop with all requests in it. What fails is tried again, a server
that fails for everybody is left alone but for one small question at a time, and a run that can't go
on says so.
"""

import asyncio
import contextlib
import itertools
import os
import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from refine.engines.backend import Reply, Request, Sampling
from refine.engines.cost import Bill, Meter
from refine.engines.gate import Gate
from refine.engines.pace import Backoff, Clock
from refine.engines.wire import (
    FAULTS,
    LIMITS,
    Fault,
    Refused,
    broken,
    data_uri,
    question,
    read_reply,
    refusal,
)
from refine.errors import RefineError

if TYPE_CHECKING:
    from refine.engines.openai import Server
    from refine.prompts import Prompt

COUNTED = ("requests", "retries", *FAULTS, "refused", "probes", "seconds_waiting", "cost_usd")
TRIES = 8  # of a request that fails while the server answers others
MOST_FAILED = 50  # requests in a row: it is not the requests
REPLIES_SECONDS = 0.1
ENCODERS = 4


class ServerBackend:
    """A server at work, a `Backend`.

    Args:
        server: which, and how it is to be treated.
        prompt: what is asked.
        sampling: how answers are drawn.
        clock: for waits and rates; the time-outs of requests are in real seconds.
        backoff: waits after failures.

    Raises:
        RefineError: the client library is not installed.
    """

    def __init__(
        self,
        server: "Server",
        prompt: "Prompt",
        sampling: Sampling,
        clock: Clock | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401 (only to say so here if it can't be)
        except ImportError as e:
            raise RefineError(
                "--engine openai needs the package openai: pip install -r requirements-refine.txt"
            ) from e
        clock, self._backoff = clock or Clock(), backoff or Backoff()
        self.server, self.slots = server, server.slots
        self.note = f"{server.model} at {server.shown_address}, {server.slots} requests at a time"
        self._prompt, self._sampling = prompt, sampling
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self._characters = sum(
            len(part.get("text", ""))
            for message in prompt.messages("")
            for part in message["content"]
        )
        self._limit = LIMITS[0]
        # Every name is there from the start: another thread copies it.
        self._counted = Counter(dict.fromkeys(COUNTED, 0))
        self._failed_in_a_row = 0
        self._meter = Meter(
            server.prices, server.tokens_per_minute, clock, self._counted, sampling.max_tokens
        )
        self._gate = Gate(
            server.shown_address,
            self._probe,
            clock,
            self._backoff,
            server.patience,
            server.requests_per_minute,
            self._counted,
        )
        self._done: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(ENCODERS, "encode")
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        if self._gate.error:
            raise self._gate.error

    def submit(self, request: Request) -> None:
        self._loop.call_soon_threadsafe(self._begin, request)

    def replies(self) -> list[Reply]:
        # Read first, so that whatever was answered before the error is returned before it.
        error = self._gate.error
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._done.get(timeout=REPLIES_SECONDS))
            while True:
                found.append(self._done.get_nowait())
        if error and not found:
            raise error
        return found

    def counters(self) -> dict[str, float]:
        """Requests over the wire, and what became of them. "seconds_waiting" is the sum over all
        requests, "cost_usd" of this process alone."""
        return dict(self._counted)

    def spent(self, prompt_tokens: int, output_tokens: int) -> None:
        """Counts what earlier runs used against the limit; to be called before `submit`."""
        self._meter.spent(prompt_tokens, output_tokens)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join()
        self._encoders.shutdown(cancel_futures=True)

    def _run(self, started: threading.Event) -> None:
        try:
            asyncio.run(self._serve(started))
        except asyncio.CancelledError:
            pass
        except Exception as e:
            self._gate.error = e
        finally:
            started.set()

    async def _serve(self, started: threading.Event) -> None:
        from openai import AsyncOpenAI

        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        self._free = asyncio.Semaphore(self.slots)
        self._client = AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.server.address,
            timeout=self.server.timeout,
            max_retries=0,
        )
        async with self._client, asyncio.TaskGroup() as self._group:
            started.set()
            await asyncio.Event().wait()

    def _begin(self, request: Request) -> None:
        self._group.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        """Puts the one reply to a request with those done, or keeps the error that ends all."""
        try:
            picture = await self._loop.run_in_executor(self._encoders, data_uri, request.image)
            async with self._free:
                reply = await self._ask(request, picture)
                # Nothing is awaited between the settling of the bill and this: whoever finds the
                # money at its end stops the run after this reply, not before.
                self._done.put(reply)
            self._check(reply)
        except Exception as e:
            self._gate.error = self._gate.error or e

    async def _ask(self, request: Request, picture: str) -> Reply:
        characters = self._characters + len(request.caption)
        pixels = request.image.width * request.image.height
        strikes = 0
        for failures in itertools.count(1):
            try:
                async with self._meter.request(characters, pixels) as bill:
                    await self._gate.enter()
                    reply = await self._send(request, picture, self._sampling)
                    bill.take(reply)
                return reply
            except Fault as fault:
                # What the server does to everybody is no strike against this request.
                strikes += fault.kind != "http_429" and not self._gate.down
                if strikes == TRIES:
                    detail = f"{TRIES} tries failed while the server was up, the last: {fault}"
                    return Reply(request.key, failure="no_answer", detail=detail)
            self._counted["retries"] += 1
            await self._gate.pause(self._backoff.delay(failures))
        raise AssertionError("counting has no end")

    async def _send(self, request: Request, picture: str, sampling: Sampling) -> Reply:
        """One request over the wire; a refusal of it is a reply.

        Raises:
            Fault: another try may have more luck.
            RefineError: no request will be answered.
        """
        limit = self._limit
        body = question(self.server.model, self._prompt, request, picture, sampling, limit)
        self._counted["requests"] += 1
        try:
            reply = read_reply(request.key, await self._post(body))
        except Fault as fault:
            self._gate.failed(fault)
            raise
        except Refused as refused:
            if refused.parameter == limit == LIMITS[0]:
                self._limit = LIMITS[1]
                return await self._send(request, picture, sampling)
            reply = Reply(request.key, failure="refused_by_server", detail=str(refused))
        self._gate.answered()
        return reply

    async def _post(self, body: dict) -> bytes:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        server = self.server
        try:
            async with asyncio.timeout(server.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**body)
                return raw.content
        except (TimeoutError, APITimeoutError):
            raise Fault("timeouts", f"no answer within {server.timeout:g} s") from None
        except APIConnectionError as e:
            raise broken(e, self._key) from None
        except APIStatusError as e:
            # Without its cause, whose request has the key in a header.
            raise refusal(e, server.shown_address, server.model, self._key) from None

    def _check(self, reply: Reply) -> None:
        """Counts failures of requests; where nothing else comes, it is not the requests.

        Raises:
            RefineError: too many in a row.
        """
        if not reply.failure:
            self._failed_in_a_row = 0
            return
        self._counted["refused"] += reply.failure == "refused_by_server"
        self._failed_in_a_row += 1
        if self._failed_in_a_row == MOST_FAILED:
            raise RefineError(
                f"{self.server.shown_address} gave no answer to {MOST_FAILED} requests one after "
                f"another, the last time: {reply.detail}. Mend what it names: the same command "
                "goes on after them"
            )

    async def _probe(self) -> None:
        image = Image.new("RGB", (64, 64))
        sampling = replace(self._sampling, max_tokens=1)
        bill = Bill()
        bill.take(await self._send(Request("", "", image), data_uri(image), sampling))
        self._meter.add(bill)
