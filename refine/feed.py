"""Questions made ready ahead of a model: pairs read by a thread, pictures prepared by processes."""

import queue
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from refine.engines.backend import Request
from refine.inputs.pairs import ImageError, Pair
from refine.inputs.pictures import prepared
from refine.journal import Answer, Journal, journal_folder, key_of
from refine.parallel import Workers, result_of
from refine.parts import PartMaker
from refine.prompts import fence

BATCH = 8  # pairs that a preparing process takes at a time


@dataclass(frozen=True)
class Question:
    """A prepared pair: what a request is made of. The picture travels as plain pixels."""

    number: int
    key: str
    caption: str
    size: tuple[int, int]
    pixels: bytes

    @property
    def name(self) -> str:
        """Unlike the key, no other part has it too."""
        return f"{self.number}:{self.key}"

    def request(self, attempt: int = 0) -> Request:
        image = Image.frombytes("RGB", self.size, self.pixels)
        return Request(self.name, self.caption, image, attempt)


@dataclass(frozen=True)
class End:
    """No more pairs of a part."""

    number: int


Prepared = Question | tuple[int, Answer] | End


def prepare(maker: PartMaker, batch: list[tuple[int, str, Pair] | End]) -> list[Prepared]:
    """Decodes and shrinks pictures, and fences alt-texts; a picture that can't be shown is answered
    at once."""
    done: list[Prepared] = []
    engine = maker.job.engine
    for item in batch:
        if isinstance(item, End):
            done.append(item)
            continue
        number, key, pair = item
        try:
            image = prepared(pair.image, maker.job.skip_pixels, engine.max_pixels)
        except ImageError as e:
            done.append((number, Answer(key, reason=e.reason, detail=str(e))))
            continue
        done.append(Question(number, key, fence(pair.caption), image.size, image.tobytes()))
    return done


class Feed:
    """Prepared questions of parts, read ahead by a thread; what is answered already is left out.

    Args:
        maker: reads the parts.
        numbers: which parts, as long as there are some; may keep the thread waiting.
        workers: prepare the pictures; their state is a maker too.
        ahead: questions to keep ready, about.

    Attributes:
        ended: no more will come.
        journals: of the parts that are begun and not finished.
    """

    def __init__(
        self, maker: PartMaker, numbers: Iterable[int], workers: Workers, ahead: int
    ) -> None:
        self.ended = False
        self.journals: dict[int, Journal] = {}
        self._maker, self._numbers, self._workers = maker, numbers, workers
        # Batches that are being prepared or are ready, in order; an error; or None at the end.
        self._batches: queue.Queue[Future | Exception | None] = queue.Queue(
            ahead // BATCH + 2 * workers.count
        )
        self._next: Future | None = None
        self._ready: deque[Prepared] = deque()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self, wait: bool) -> "Prepared | None":
        """The next item; None if there is none yet and `wait` is False, or none any more."""
        while not self._ready and not self.ended:
            if self._next is None:
                try:
                    batch = self._batches.get(block=wait)
                except queue.Empty:
                    return None
                if isinstance(batch, Exception):
                    raise batch
                if batch is None:
                    self.ended = True
                    return None
                self._next = batch
            if not wait and not self._next.done():
                return None
            self._ready.extend(result_of(self._next))
            self._next = None
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """Ends the thread at its next batch; one that waits for a part ends with the process."""
        self._stopped.set()
        with suppress(queue.Empty):
            while True:
                self._batches.get_nowait()

    def _run(self) -> None:
        try:
            for number in self._numbers:
                self._read(number)
            self._batches.put(None)
        except _Stopped:
            pass
        except Exception as e:
            self._batches.put(e)

    def _read(self, number: int) -> None:
        folder = journal_folder(self._maker.job.parts, number)
        journal = self.journals[number] = Journal(folder)
        batch: list[tuple[int, str, Pair] | End] = []
        for pair in self._maker.pairs(number):
            if (key := key_of(pair)) not in journal.keys:
                batch.append((number, key, pair))
            if len(batch) == BATCH:
                self._hand_on(batch)
                batch = []
        self._hand_on([*batch, End(number)])

    def _hand_on(self, batch: list[tuple[int, str, Pair] | End]) -> None:
        if self._stopped.is_set():
            raise _Stopped
        self._batches.put(self._workers.submit(prepare, batch))


class _Stopped(Exception):
    """The feed was closed."""
