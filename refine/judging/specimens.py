"""Some records of an output, and some of what it rejected, drawn at random."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from hqclip_jax.data.record import Record
from refine.inputs.find import Input
from refine.inputs.pairs import Pair
from refine.judging.outputs import Output


@dataclass(frozen=True)
class Rejected:
    """A pair that went to quarantine: the fields of a line of `quarantine.jsonl`, as texts."""

    uid: str = ""
    source: str = ""
    key: str = ""
    caption: str = ""
    reason: str = ""
    detail: str = ""
    raw: str = ""
    attempts: str = ""

    @classmethod
    def of(cls, line: str) -> "Rejected":
        try:
            stored = json.loads(line)
            return cls(**{f.name: str(stored.get(f.name, "")) for f in fields(cls)})
        except (ValueError, AttributeError, RecursionError) as e:
            return cls(reason="unreadable line", detail=str(e), raw=line)


def draw_records(output: Output, count: int, seed: int) -> list[Record]:
    """Records at random, in their order; reads no others.

    Raises:
        RefineError: one of them can't be read.
    """
    numbers = random.Random(seed).sample(range(len(output)), min(count, len(output)))
    return [output.record(number) for number in sorted(numbers)]


def draw_rejected(output: Output, count: int, seed: int) -> list[Rejected]:
    """Quarantined pairs at random, in their order; no others are in memory."""
    chosen: list[tuple[int, str]] = []
    draws = random.Random(seed)
    for number, line in enumerate(output.quarantine_lines()):
        if len(chosen) < count:
            chosen.append((number, line))
        elif (place := draws.randrange(number + 1)) < count:
            chosen[place] = number, line
    return [Rejected.of(line) for _, line in sorted(chosen)]


def find_pictures(
    wanted: Iterable[tuple[str, str]], inputs: Sequence[Input]
) -> dict[tuple[str, str], bytes]:
    """The encoded pictures of some pairs, by source and key; those not found are left out.

    Args:
        wanted: (name of the input, name in it), as `quarantine.jsonl` has them.
        inputs: all that the refinement was given, since their names depend on it; only those that
            are wanted are read.

    Raises:
        RefineError: an input can't be read.
    """
    keys: dict[str, set[str]] = {}
    for source, key in wanted:
        keys.setdefault(source, set()).add(key)
    found = {}
    for each in inputs:
        missing = keys.get(each.name)
        if not missing:
            continue
        with TemporaryDirectory() as scratch:
            for pair in each.local(Path(scratch)).pairs():
                if isinstance(pair, Pair) and pair.key in missing:
                    missing.remove(pair.key)
                    found[pair.source, pair.key] = pair.image
                if not missing:
                    break
    return found
