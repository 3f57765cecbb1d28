"""Engines: what turns a pair into its four texts.

An engine is a small picklable description. It is prepared once, then opened in every process that
refines; what `open` returns maps a stream of pairs to a stream of results, so that an engine may
batch or run ahead as it likes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Union

from hqclip_jax.data.tags import normalise
from hqclip_jax.data.text import clean
from refine.inputs.pairs import Pair, Skip
from refine.ledger import Ledger
from refine.uids import Subset, UidTable

Result = Union["Refined", Skip, "Quarantined", "Sums"]
Refiner = Callable[[Iterable[Pair], int], Iterator[Result]]
"""Maps the pairs of a part, whose number it is told, to what becomes of them."""


@dataclass(frozen=True)
class Texts:
    """The four texts of a record; lists may differ in length and may be empty."""

    desc: tuple[str, ...] = ()
    neg_desc: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    neg_tags: tuple[str, ...] = ()

    @classmethod
    def cleaned(
        cls,
        desc: Iterable[str],
        neg_desc: Iterable[str],
        tags: Iterable[str],
        neg_tags: Iterable[str],
    ) -> "Texts":
        """Cleans raw strings, drops what is empty then, and keeps a repeated tag once."""
        desc, neg_desc = (tuple(filter(None, map(clean, texts))) for texts in (desc, neg_desc))
        tags, neg_tags = (unique(filter(None, map(clean, texts))) for texts in (tags, neg_tags))
        return cls(desc, neg_desc, tags, neg_tags)


@dataclass(frozen=True)
class Refined:
    """A pair with its texts.

    Attributes:
        pair: as it came.
        texts: for it.
        refiner: who wrote them, where that is not the engine's own `refiner`.
    """

    pair: Pair
    texts: Texts
    refiner: str = ""


@dataclass(frozen=True)
class Quarantined:
    """A pair of which a model made nothing that passes.

    Attributes:
        pair: as it came.
        reason: a key of the counts.
        detail: the same in words.
        raw: the last output.
        attempts: how often the model was asked.
    """

    pair: Pair
    reason: str
    detail: str
    raw: str
    attempts: int

    def line(self) -> str:
        """One line of `quarantine.jsonl`."""
        pair = {name: getattr(self.pair, name) for name in ("uid", "source", "key", "caption")}
        rest = {name: getattr(self, name) for name in ("reason", "detail", "raw", "attempts")}
        return json.dumps(pair | rest) + "\n"


@dataclass
class Sums:
    """What an engine counted over a part beside its pairs: tokens, seconds."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value


def unique(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags without repeats, the first spelling of each, in order."""
    kept: dict[str, str] = {}
    for tag in tags:
        kept.setdefault(normalise(tag), tag)
    return tuple(kept.values())


class Engine(Protocol):
    """What the runner asks of an engine.

    Attributes:
        refiner: engine, model and prompt hash, stored in every record.
        note: a sentence for the manifest on what this engine is.
        buckets: buckets of the uid table that `settle` compares with, 1 if it compares none.
    """

    refiner: str
    note: ClassVar[str]
    buckets: int

    def plan(self, times: bool) -> dict:
        """What makes two runs the same, for a resumed run to be compared with; `times` adds the
        modification times of files."""

    def prepare(self, workers: int) -> None:
        """Called once, in the parent, before anything is opened."""

    def open(self) -> Refiner:
        """Called once in every process."""

    def settle(self, ledger: Ledger, seen: UidTable, subset: Subset | None, whole: bool) -> None:
        """Called once, last: counts what the engine knows of and no pair asked for.

        Args:
            ledger: takes the counts and names.
            seen: every uid that came, refined or not.
            subset: the uids asked for, or None for all.
            whole: False if the run was limited, and so an absent pair says nothing.
        """
