"""One engine per GPU of this machine, each in a process of its own, and the parts sealed here.

An engine asks for its next part when it has read the last one, so none waits for another. One that
dies is started anew, and what it had begun goes to whoever asks first: the journal holds what it
finished.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from refine.asking import Finished, Tally, ask
from refine.engines.backend import Backend
from refine.errors import RefineError
from refine.parallel import Workers, end_with_parent, result_of
from refine.parts import Job, make_part
from refine.progress import console, progress

CRASHES = 3  # of one engine, with nothing answered between them
POLL_SECONDS = 0.1
WANT, READY, FAILED = "want", "ready", "failed"


@dataclass(frozen=True)
class Local:
    """The engines of this machine.

    Attributes:
        engines: how many.
        gpus: of each; 0 leaves the choice to the engine.
        workers: processes that prepare pictures and seal parts, over all engines.
    """

    engines: int
    gpus: int
    workers: int

    def make_parts(self, job: Job, missing: Sequence[int]) -> int:
        """Makes the parts that are missing; returns the pairs answered now.

        Raises:
            RefineError: an engine can't start, dies again and again, or its model is out of reach.
        """
        if not missing:
            return 0
        engines = min(self.engines, len(missing))
        each = max(1, self.workers // engines)
        visible = visible_gpus()
        starts = [
            _Start(job, visible[i * self.gpus : (i + 1) * self.gpus], each) for i in range(engines)
        ]
        with Workers(max(1, self.workers // 4), job.open) as sealers:
            sealers.warm()
            return _Fleet(starts, deque(missing), sealers).run()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


@dataclass(frozen=True)
class _Start:
    """What an engine's process is told at its start."""

    job: Job
    gpus: Sequence[str]
    workers: int


@dataclass
class _Engine:
    """An engine's process, seen from here.

    Attributes:
        start: what it was told.
        process: it.
        connection: to it.
        held: parts that it has and has not finished.
        wants: it waits for a part.
        crashes: deaths since its last answer.
    """

    start: _Start
    process: BaseProcess
    connection: Connection
    held: set[int] = field(default_factory=set)
    wants: bool = False
    crashes: int = 0


class _Fleet:
    """Hands out parts, takes events, seals what is finished."""

    def __init__(self, starts: Sequence[_Start], todo: deque[int], sealers: Workers) -> None:
        self._todo, self._sealers = todo, sealers
        self._unfinished = set(todo)
        self._sealing: deque[Future] = deque()
        self._tally: Counter[str] = Counter()
        self._ready_at = 0.0
        self._engines = [_launch(start) for start in starts]

    def run(self) -> int:
        try:
            with progress("refining", len(self._unfinished), "parts") as bar:
                while self._unfinished or self._sealing:
                    self._hear()
                    while self._sealing and (self._sealing[0].done() or not self._unfinished):
                        result_of(self._sealing.popleft())
                        bar.advance(1, self._note())
                    bar.advance(0, self._note())
            self._dismiss()
        finally:
            for engine in self._engines:
                _end(engine)
        return self._tally["answers"]

    def _hear(self) -> None:
        """Takes what engines say within a moment, and notices those that died."""
        by_connection = {engine.connection: engine for engine in self._engines}
        for connection in wait(list(by_connection), POLL_SECONDS):
            engine = by_connection[connection]
            try:
                self._take(engine, connection.recv())
            except (EOFError, ConnectionError):
                self._replace(engine)

    def _take(self, engine: _Engine, event: object) -> None:
        match event:
            case (str(kind), str(words)) if kind == FAILED:
                raise RefineError(words)
            case (str(kind), str(words)) if kind == READY:
                self._ready_at = self._ready_at or time.monotonic()
                if words:
                    console.print(words, soft_wrap=True)
            case (str(kind), _) if kind == WANT:
                engine.wants = True
            case Finished(number):
                engine.held.discard(number)
                self._unfinished.discard(number)
                self._sealing.append(self._sealers.submit(make_part, number))
            case Tally():
                self._tally.update(vars(event))
                engine.crashes = 0 if event.answers else engine.crashes
        self._hand_out()

    def _hand_out(self) -> None:
        for engine in self._engines:
            if engine.wants and self._todo:
                engine.wants = False
                with suppress(BrokenPipeError):  # it died, and we shall hear of it
                    engine.connection.send(self._todo[0])
                    engine.held.add(self._todo.popleft())

    def _replace(self, dead: _Engine) -> None:
        _end(dead)
        self._todo.extendleft(sorted(dead.held, reverse=True))
        crashes = dead.crashes + 1
        how = f"an engine's process died (exit code {dead.process.exitcode})"
        if crashes >= CRASHES:
            raise RefineError(
                f"{how} {CRASHES} times in a row: perhaps for want of memory (a smaller --slots, "
                "--gpu-memory or --max-pixels); what is answered is kept, and the same command "
                "goes on"
            )
        console.print(f"{how}: it is started anew", style="yellow")
        fresh = _launch(dead.start)
        fresh.crashes = crashes
        self._engines[self._engines.index(dead)] = fresh
        self._hand_out()

    def _note(self) -> str:
        if not self._ready_at:
            return "the engine starts"
        seconds = max(1e-3, time.monotonic() - self._ready_at)
        answers, rejected = self._tally["answers"], self._tally["rejected"]
        share = 100 * rejected / answers if answers else 0.0
        return (
            f"{answers:,} pairs, {answers / seconds:,.1f}/s, "
            f"{self._tally['output_tokens'] / seconds:,.0f} tokens/s, {share:.1f}% rejected"
        )

    def _dismiss(self) -> None:
        """Ends engines that have nothing more to do; each has a last tally to tell."""
        for engine in self._engines:
            with suppress(EOFError, ConnectionError):
                engine.connection.send(None)
                while True:
                    event = engine.connection.recv()
                    if isinstance(event, Tally):
                        self._tally.update(vars(event))


def _end(engine: _Engine) -> None:
    """Ends an engine's process, if it has not ended, and what it started: vLLM's own process
    outlives it and holds the GPU. What is answered is in the journal."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(engine.process.pid, signal.SIGKILL)
    engine.process.kill()
    engine.process.join()


def _launch(start: _Start) -> _Engine:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # Not a daemon: it has processes of its own.
    process = context.Process(target=_serve, args=(start, there))
    process.start()
    there.close()
    return _Engine(start, process, here)


def _serve(start: _Start, connection: Connection) -> None:
    """An engine's process: loads the model and asks about the parts that it is given."""
    end_with_parent(group=True)
    if start.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(start.gpus)
    sending = threading.Lock()

    def send(event: object) -> None:
        with sending:
            connection.send(event)

    def numbers() -> Iterator[int]:
        while True:
            send((WANT, ""))
            number = connection.recv()
            if number is None:
                return
            yield number

    def opened() -> Backend:
        backend = start.job.engine.backend()
        send((READY, backend.note))
        return backend

    try:
        maker = start.job.open()
        with Workers(start.workers, start.job.open) as workers:
            for event in ask(maker, opened, workers, numbers()):
                send(event)
    except (RefineError, OSError) as e:
        send((FAILED, str(e)))
    connection.close()
    os._exit(0)  # an interpreter with torch in it takes seconds to end by itself
