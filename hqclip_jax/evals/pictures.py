"""Small pictures for reports, from a second pass over a set that keeps the wanted ones alone."""

import base64
import io
import logging
from collections.abc import Collection, Iterable
from typing import Protocol

import numpy as np
from PIL import Image

from hqclip_jax.data.image import ImageError, open_rgb
from hqclip_jax.evals.datasets import EvalDataError, Example
from hqclip_jax.evals.outcome import Outcome, Skips

log = logging.getLogger("hqclip_jax.evals")

SIDE = 192  # pixels at most
CONFUSED = 10  # pairs of classes that a report shows


class Readable(Protocol):
    """What can be read again: an evaluator."""

    name: str

    def examples(self, skips: Skips) -> Iterable[Example]: ...


def jpeg_uri(encoded: bytes, side: int = SIDE) -> str:
    """A small JPEG of a picture's pixels alone, as a data URI; no byte of the file is in it.

    Raises:
        ImageError: it does not decode.
    """
    small = open_rgb(encoded)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    # From an array, because Pillow would carry a file's comment over.
    Image.fromarray(np.asarray(small)).save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def pictures(evaluator: Readable, wanted: Collection[str]) -> dict[str, str]:
    """Data URIs by source. Reading ends with the last one wanted; what can't be read is absent."""
    left, found = set(wanted), {}
    if not left:
        return found
    try:
        for example in evaluator.examples(Skips()):
            if example.source in left:
                left.remove(example.source)
                try:
                    found[example.source] = jpeg_uri(example.image)
                except ImageError as e:
                    log.warning("%s: not shown: %s", example.source, e)
            if not left:
                break
    except (EvalDataError, OSError) as e:
        log.warning("%s: the report lacks %d pictures: %s", evaluator.name, len(left), e)
    return found


def confusions(outcome: Outcome, count: int = CONFUSED) -> list[tuple[int, int, int, str]]:
    """The most frequent pairs of different classes: (true, predicted, how often, first source)."""
    classes = outcome.classes
    wrong = np.flatnonzero(classes.labels != classes.predicted)
    pairs = np.stack([classes.labels[wrong], classes.predicted[wrong]], axis=1)
    distinct, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]
    return [
        (int(t), int(p), int(counts[i]), str(classes.sources[wrong[first[i]]]))
        for i, (t, p) in zip(order, distinct[order])
    ]


def wanted(outcome: Outcome) -> set[str]:
    """Sources of all pictures that a report of this outcome shows."""
    cells = [cell for card in outcome.cards for cell in (card.asked, *card.answers)]
    sources = {cell.source for cell in cells if cell.source}
    if outcome.classes is not None:
        sources |= {source for *_, source in confusions(outcome)}
    return sources
