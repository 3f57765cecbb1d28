"""Answers of a model, on disk as soon as each is there.

A model's answers cost more than anything else here, so each is a line in a file before the next is
asked for: `kill -9` at any moment loses those under way and no other. A part of the output has a
folder of its own,

    .parts/NNNNNN.journal/WRITER.jsonl   one line an answer, written by one process alone

and whoever goes on with a part reads all of its files and writes another, so that two processes
never write to one file, also where a lost one turns out to be alive. The folder goes when the part
is sealed.
"""

import hashlib
import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from refine.engines import Texts
from refine.inputs.pairs import Pair

SYNC_SECONDS = 1.0
SUMS = "sums"


@dataclass(frozen=True)
class Answer:
    """What came of asking about one pair, for good.

    Attributes:
        key: names what was asked: `key_of` the pair.
        refiner: engine, model and prompt hash of who answered.
        texts: the four texts, or None for a pair that goes to quarantine.
        reason: why there are none, as a key of the counts.
        detail: the same in words.
        raw: the last output, where it did not pass.
        attempts: how often it was asked; 0 where the picture can't be shown to a model.
        repaired: the output was no strict JSON.
        prompt_tokens: over all attempts.
        output_tokens: over all attempts.
    """

    key: str
    refiner: str = ""
    texts: Texts | None = None
    reason: str = ""
    detail: str = ""
    raw: str = ""
    attempts: int = 0
    repaired: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0

    def line(self) -> str:
        stored = asdict(self)
        return json.dumps({k: v for k, v in stored.items() if v or k == "key"}) + "\n"

    @classmethod
    def of(cls, stored: dict) -> "Answer":
        texts = stored.get("texts")
        lists = texts and Texts(**{name: tuple(value) for name, value in texts.items()})
        return cls(**stored | {"texts": lists or None})


class Journal:
    """Which of a part's questions are answered, and a file of our own for more answers.

    Only keys stay in memory; `read_answers` reads the rest when the part is sealed.

    Args:
        folder: the part's.

    Attributes:
        keys: what is answered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = {stored["key"] for stored in _lines(folder) if "key" in stored}
        self._file: IO[str] | None = None
        self._synced = time.monotonic()

    def add(self, answer: Answer) -> None:
        """Keeps an answer: with the system at once, with the disk within a second or so."""
        self.keys.add(answer.key)
        self._write(answer.line())

    def count(self, sums: Mapping[str, float]) -> None:
        """Keeps what was counted beside the answers: seconds, faults of a server."""
        self._write(json.dumps({SUMS: sums}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            self._file = open(self.folder / name, "a", encoding="ascii")  # noqa: SIM115
        self._file.write(line)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def read_answers(folder: Path) -> tuple[dict[str, Answer], dict[str, float]]:
    """A part's answers by key, the first of two under one, and the sums of what was counted."""
    answers: dict[str, Answer] = {}
    sums: Counter[str] = Counter()
    for stored in _lines(folder):
        if SUMS in stored:
            sums.update(stored[SUMS])
        elif stored["key"] not in answers:
            answers[stored["key"]] = Answer.of(stored)
    return answers, dict(sums)


def _lines(folder: Path) -> Iterator[dict]:
    """Every whole line. The last one of a writer that was killed may be torn, and after a loss of
    power more may be: what they answered is asked again."""
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                try:
                    stored = json.loads(line)
                except ValueError:
                    continue
                if isinstance(stored, dict) and (SUMS in stored or "key" in stored):
                    yield stored


def key_of(pair: Pair) -> str:
    """Names what is asked: the uid, and a digest of alt-text and picture, so that two pairs under
    one uid are two questions."""
    digest = hashlib.blake2b(pair.image, digest_size=8)
    digest.update(pair.caption.encode("utf-8", "surrogatepass"))
    return f"{pair.uid}-{digest.hexdigest()}"


def journal_folder(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.journal"
