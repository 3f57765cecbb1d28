"""An engine that looks at the picture: a vision-language model, asked by `refine.asking`.

Asking and writing are apart. Answers go to a journal; when a part has all of its answers it is
made as with any engine, each pair joined to its answer. So a part is read twice, and nothing that a
model said is ever in memory alone.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from refine.engines import Quarantined, Refined, Refiner, Sums
from refine.engines.backend import Backend, Sampling
from refine.inputs.pairs import Pair, Skip
from refine.journal import journal_folder, key_of, read_answers
from refine.ledger import Ledger
from refine.prompts import Prompt
from refine.sink import PART_FILE
from refine.uids import Subset, UidTable


class Model(Protocol):
    """A model, described well enough to be opened in another process.

    Attributes:
        engine: "vllm" or "openai".
        name: short, for records.
        slots: requests that it works on at the same time.
        max_cost: USD that an output may cost, or None; the backend of a model that has one takes
            what was used before by `spent(prompt_tokens, output_tokens)`.
    """

    engine: ClassVar[str]
    name: str
    slots: int
    max_cost: float | None

    def identity(self) -> dict:
        """What makes it the same model for a run that goes on."""

    def open(self, prompt: Prompt, sampling: Sampling, max_pixels: int) -> Backend:
        """Loads it, or connects.

        Raises:
            RefineError: it can't be loaded or reached.
        """


@dataclass(frozen=True)
class Lvlm:
    """Texts by a vision-language model.

    Attributes:
        model: which.
        prompt: what it is asked.
        sampling: how its answers are drawn.
        max_pixels: pictures are shrunk to it before the model sees them.
        parts: folder of the parts and journals.
    """

    note: ClassVar[str] = "texts by a vision-language model that sees picture and alt-text"

    model: Model
    prompt: Prompt
    sampling: Sampling
    max_pixels: int
    parts: Path
    buckets: int = 1

    @property
    def refiner(self) -> str:
        return f"{self.model.engine}:{self.model.name}:{self.prompt.digest}"

    def plan(self, times: bool) -> dict:
        return {
            "model": self.model.identity(),
            "prompt": {"name": self.prompt.name, "digest": self.prompt.digest},
            "sampling": asdict(self.sampling),
            "max_pixels": self.max_pixels,
        }

    def prepare(self, workers: int) -> None:
        pass

    def backend(self) -> Backend:
        """The model, opened; where it has a limit of cost, told what this output has cost so far.

        Raises:
            RefineError: it can't be loaded or reached.
        """
        backend = self.model.open(self.prompt, self.sampling, self.max_pixels)
        if self.model.max_cost is not None:
            backend.spent(*used(self.parts))
        return backend

    def open(self) -> Refiner:
        return partial(join, self.parts)

    def settle(self, ledger: Ledger, seen: UidTable, subset: Subset | None, whole: bool) -> None:
        pass


def used(parts: Path) -> tuple[int, int]:
    """Tokens of prompts and of answers that an output has used, in its parts and journals."""
    sums = Sums()
    for part in parts.glob(f"*/{PART_FILE}"):
        sums.add(**json.loads(part.read_text())["sums"])
    for folder in parts.glob("*.journal"):
        if not (parts / folder.stem / PART_FILE).exists():
            for answer in read_answers(folder)[0].values():
                sums.add(prompt_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens)
    return tuple(int(sums.values.get(f"{kind}_tokens", 0)) for kind in ("prompt", "output"))


def join(
    parts: Path, pairs: Iterable[Pair], number: int
) -> Iterator[Refined | Skip | Quarantined | Sums]:
    """Gives each pair of a part the answer in its journal."""
    answers, sums = read_answers(journal_folder(parts, number))
    counted = Sums(sums)
    for pair in pairs:
        answer = answers.get(key_of(pair))
        if answer is None:
            yield pair.skip("not_asked", "the journal has no answer: were files changed meanwhile?")
            continue
        counted.add(
            answers=1,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            repaired=int(answer.repaired),
            retries=max(0, answer.attempts - 1),
        )
        if answer.texts is not None:
            yield Refined(pair, answer.texts, answer.refiner)
        elif answer.attempts:
            yield Quarantined(pair, answer.reason, answer.detail, answer.raw, answer.attempts)
        else:
            yield pair.skip(answer.reason, answer.detail)
    yield counted
