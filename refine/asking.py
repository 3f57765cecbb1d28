"""Asking a model about pairs: it always has work, and every answer is on disk at once.

The feed has questions ready ahead; here they are handed to the model as it gets free, and answers
are taken as they finish, in any order. Parts follow one another without a pause between them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from refine.engines import Texts
from refine.engines.backend import Backend, Reply
from refine.engines.lvlm import Lvlm
from refine.feed import End, Feed, Question
from refine.journal import Answer, Journal
from refine.parallel import Workers
from refine.parse import Rejected, parse
from refine.parts import PartMaker

TALLY_SECONDS = 1.0
RAW_KEPT = 16_384  # characters of an output that are kept in quarantine


@dataclass(frozen=True)
class Finished:
    """All pairs of a part are answered: it can be sealed."""

    number: int


@dataclass(frozen=True)
class Tally:
    """What came since the last tally.

    Attributes:
        answers: pairs that are finished with, for good or ill.
        rejected: those of them that go to quarantine.
        output_tokens: of all that the model said.
    """

    answers: int = 0
    rejected: int = 0
    output_tokens: int = 0


@dataclass
class _Open:
    """A part whose answers are coming."""

    journal: Journal
    waiting: int = 0
    ended: bool = False


@dataclass
class _Asked:
    """A question under way, with what its earlier attempts cost."""

    question: Question
    attempt: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Asking:
    """Asks a backend about the parts that come, until none is left.

    Args:
        engine: says what is asked and how often.
        backend: answers.
        feed: prepared questions.
    """

    engine: Lvlm
    backend: Backend
    feed: Feed
    _open: dict[int, _Open] = field(default_factory=dict)
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _tally: Counter = field(default_factory=Counter)
    _sums: Counter = field(default_factory=Counter)
    _counted: dict[str, float] = field(default_factory=dict)

    def run(self) -> Iterator[Finished | Tally]:
        """Yields parts as they are finished, and now and then how much is done."""
        told = last = time.monotonic()
        while self._asked or not self.feed.ended:
            yield from self._top_up()
            if self._asked:
                for reply in self.backend.replies():
                    yield from self._take(reply)
            now = time.monotonic()
            self._clock(now - last)
            last = now
            if now - told > TALLY_SECONDS:
                told = now
                yield self._told()
        yield self._told()

    def _top_up(self) -> Iterator[Finished]:
        """Hands on what is ready when the backend has less than one and a half rounds of work, up
        to two: several at a time cost it less than one after each answer. Waits only where it has
        none at all."""
        slots = self.backend.slots
        if 2 * len(self._asked) > 3 * slots:
            return
        while len(self._asked) < 2 * slots:
            item = self.feed.take(wait=not self._asked)
            if item is None:
                return
            if isinstance(item, End):
                part = self._part(item.number)
                part.ended = True
                yield from self._close_if_done(item.number)
            elif isinstance(item, Question):
                self._ask(item)
            else:
                number, answer = item
                self._part(number).waiting += 1
                yield from self._keep(number, answer)

    def _ask(self, question: Question) -> None:
        part = self._part(question.number)
        if question.name in self._asked or question.key in part.journal.keys:
            return  # the same pair twice in a part
        part.waiting += 1
        self._asked[question.name] = _Asked(question)
        self.backend.submit(question.request())

    def _take(self, reply: Reply) -> Iterator[Finished]:
        """Judges a reply: keeps what passes, asks again what does not, within the budget."""
        asked = self._asked[reply.key]
        asked.prompt_tokens += reply.prompt_tokens
        asked.output_tokens += reply.output_tokens
        self._tally["output_tokens"] += reply.output_tokens
        texts, repaired, reason, detail = _judged(reply)
        if texts is None and not reply.failure and asked.attempt < self.engine.sampling.retries:
            self._sums[f"retried_{reason}"] += 1
            asked.attempt += 1
            self.backend.submit(asked.question.request(asked.attempt))
            return
        del self._asked[reply.key]
        answer = Answer(
            key=asked.question.key,
            refiner=self.engine.refiner,
            texts=texts,
            reason=reason,
            detail=detail,
            raw="" if texts else reply.text[:RAW_KEPT],
            attempts=asked.attempt + 1,
            repaired=repaired,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
        )
        yield from self._keep(asked.question.number, answer)

    def _keep(self, number: int, answer: Answer) -> Iterator[Finished]:
        part = self._part(number)
        part.journal.add(answer)
        part.waiting -= 1
        self._tally["answers"] += 1
        self._tally["rejected"] += bool(answer.reason)
        yield from self._close_if_done(number)

    def _close_if_done(self, number: int) -> Iterator[Finished]:
        part = self._open[number]
        if part.ended and not part.waiting:
            self._flush_sums(part.journal)
            part.journal.close()
            del self._open[number], self.feed.journals[number]
            yield Finished(number)

    def _part(self, number: int) -> _Open:
        if number not in self._open:
            self._open[number] = _Open(self.feed.journals[number])
        return self._open[number]

    def _clock(self, seconds: float) -> None:
        """Starved is an engine that could do more than it was given, while a part has more."""
        self._sums["seconds"] += seconds
        begun = list(self.feed.journals)
        more = any(n not in self._open or not self._open[n].ended for n in begun)
        if more and len(self._asked) < self.backend.slots:
            self._sums["starved_seconds"] += seconds

    def _told(self) -> Tally:
        if self._open:
            self._flush_sums(next(reversed(self._open.values())).journal)
        tally = Tally(**self._tally)
        self._tally.clear()
        return tally

    def _flush_sums(self, journal: Journal) -> None:
        counters = self.backend.counters()
        for name, value in counters.items():
            self._sums[name] += value - self._counted.get(name, 0)
        self._counted = counters
        if self._sums:
            journal.count({name: round(value, 6) for name, value in self._sums.items() if value})
            self._sums.clear()


def _judged(reply: Reply) -> tuple[Texts | None, bool, str, str]:
    """(texts, whether they were repaired, reason, detail) of a reply."""
    if reply.failure:
        return None, False, reply.failure, reply.detail
    try:
        parsed = parse(reply.text)
    except Rejected as e:
        if reply.truncated:
            return None, False, "truncated", f"the output was cut at its limit: {e.detail}"
        return None, False, e.reason, e.detail
    return parsed.texts, parsed.repaired, "", ""


def ask(
    maker: PartMaker,
    open_backend: Callable[[], Backend],
    workers: Workers,
    numbers: Iterable[int],
) -> Iterator[Finished | Tally]:
    """Asks about all pairs of some parts; yields the parts as they are finished, and tallies.

    Args:
        maker: reads the parts; its job's engine is an `Lvlm`.
        open_backend: opens the model; the first pictures are prepared meanwhile.
        workers: prepare the pictures; their state is a maker too.
        numbers: of the parts, taken as they are needed.

    Raises:
        RefineError: the model can't be opened or is out of reach, or an input can't be read.
    """
    engine = maker.job.engine
    feed = Feed(maker, numbers, workers, ahead=2 * engine.model.slots)
    try:
        yield from Asking(engine, open_backend(), feed).run()
    finally:
        feed.close()
