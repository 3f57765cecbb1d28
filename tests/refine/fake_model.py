"""A model that answers by rule, for everything around a model; importable, so that engines in
processes of their own have it too."""

import json
import os
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from refine.engines.backend import Reply, Request
from refine.errors import RefineError

GOOD = {
    "desc": ["a red apple lies on a table.", "it is round."],
    "neg_desc": ["a green pear lies on a table.", "it is square."],
    "tags": ["red apple", "table"],
    "neg_tags": ["green pear", "chair"],
}


def answer_to(caption: str) -> str:
    """What the model says: four texts that name the alt-text's last word."""
    word = caption.split()[-1] if caption.split() else "nothing"
    return json.dumps(GOOD | {"desc": [*GOOD["desc"], f"the number is {word}."]})


@dataclass(frozen=True)
class Fake:
    """What it does is told by the alt-text: one with "twice" fails at first, one with "never"
    always, one with "endless" is cut off, one with "refused" is refused.

    Attributes:
        log: a file that gets a line for every request.
        slots: requests at a time.
        die: the request, counted over all lives, before which its process kills itself.
        broken: it can't be opened.
        pause: seconds that an answer takes.
        child: it has a process of its own, as vLLM's has, whose number is written here.
    """

    engine: ClassVar[str] = "fake"
    max_cost: ClassVar[None] = None

    log: Path
    slots: int = 4
    name: str = "model"
    die: tuple[int, ...] = ()
    broken: str = ""
    pause: float = 0.0
    child: Path | None = None

    def identity(self) -> dict:
        return {"name": self.name}

    def open(self, prompt: object, sampling: object, max_pixels: int) -> "FakeBackend":
        if self.broken:
            raise RefineError(self.broken)
        if self.child:
            started = subprocess.Popen(["sleep", "600"])
            with self.child.open("a") as file:
                file.write(f"{started.pid}\n")
        return FakeBackend(self, max_pixels)

    def asked(self, pids: bool = False) -> list[str]:
        """The keys of all requests so far, without the numbers of their parts; or who asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split()[1] if pids else line.split()[0].partition(":")[2] for line in lines]


class FakeBackend:
    note = ""

    def __init__(self, model: Fake, max_pixels: int) -> None:
        self.slots, self._model, self._max_pixels = model.slots, model, max_pixels
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        width, height = request.image.size
        assert request.image.mode == "RGB"
        assert width * height <= self._max_pixels
        with self._model.log.open("a") as log:
            log.write(f"{request.key} {os.getpid()}\n")
        if len(self._model.asked()) in self._model.die:
            os.kill(os.getpid(), signal.SIGKILL)
        self._waiting.append(request)

    def replies(self) -> list[Reply]:
        """The youngest first, one at a time: answers come in any order."""
        time.sleep(self._model.pause)
        return [_reply(self._waiting.pop())] if self._waiting else []

    def counters(self) -> dict[str, float]:
        return {"calls": len(self._model.asked())}

    def close(self) -> None:
        self._waiting.clear()


def _reply(request: Request) -> Reply:
    caption, key = request.caption, request.key
    if "refused" in caption:
        return Reply(key, failure="refused_by_server", detail="status 400")
    if "endless" in caption:
        return Reply(key, '{"desc": ["and on and', truncated=True, output_tokens=9)
    if "never" in caption or ("twice" in caption and not request.attempt):
        return Reply(key, "I'm sorry, I can't help with that.", prompt_tokens=5, output_tokens=3)
    return Reply(key, answer_to(caption), prompt_tokens=10, output_tokens=20)
