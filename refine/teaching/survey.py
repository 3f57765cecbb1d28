"""What there is to draw a sample from: one pass over the inputs, each pair's kind and priority."""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from refine.inputs.find import Input
from refine.inputs.pairs import FORMATS, ImageError, Pair, Skip
from refine.parallel import ordered_map
from refine.progress import progress
from refine.teaching.sampling import KINDS, ROW, Pool, Survey, first, kind_of, priority

SKIP_PIXELS = 89_478_485
SPARE = 64  # of each kind, beside a tenth of the sample: some pictures turn out to be broken


def survey(inputs: Sequence[Input], seed: int, samples: int, scratch: Path, workers: int) -> Survey:
    """Looks at every pair once.

    Args:
        inputs: of pairs.
        seed: of the draw.
        samples: how many will be drawn.
        scratch: for copies of remote inputs.
        workers: processes that read.

    Raises:
        RefineError: an input can't be read.
    """
    keep = samples + samples // 10 + SPARE
    pool, counts, skips = Pool(keep), np.zeros(len(KINDS), np.int64), Counter()
    with progress("looking at pairs", len(inputs), "inputs") as bar:
        look = Look(seed, keep, scratch)
        for seen in ordered_map(look, list(enumerate(inputs)), workers):
            pool.add(seen.rows)
            counts += seen.counts
            skips += seen.skips
            bar.advance(1, f"{counts.sum():,} pairs")
    return Survey(pool.rows(), counts, skips)


@dataclass(frozen=True)
class Look:
    """What one input has to draw from, looked at in any process.

    Attributes:
        seed: of the draw.
        keep: rows of each kind.
        scratch: for copies of remote inputs.
    """

    seed: int
    keep: int
    scratch: Path

    def __call__(self, _: None, numbered: tuple[int, Input]) -> Survey:
        source, given = numbered
        with here(given, self.scratch) as pairs:
            found = look_at(pairs, source, self.seed)
        return Survey(first(found.rows, self.keep), found.counts, found.skips)


@contextmanager
def here(given: Input, scratch: Path) -> Iterator[Iterator[Pair | Skip]]:
    """The pairs of an input; a remote one is copied for this process alone and removed after."""
    mine = scratch / str(os.getpid())
    yield given.local(mine).pairs()
    given.release(mine)


def look_at(items: Iterator[Pair | Skip], source: int, seed: int) -> Survey:
    """What one input has to draw from.

    Args:
        items: its pairs.
        source: its number.
        seed: of the draw.
    """
    skips: Counter[str] = Counter()
    rows: list[tuple[bytes, int, int, int]] = []
    for item in items:
        if isinstance(item, Skip):
            skips[item.reason] += 1
            continue
        try:
            kind = kind_of(item.caption, *header_size(item.image))
        except ImageError as e:
            skips[e.reason] += 1
            continue
        rows.append((bytes.fromhex(item.uid), priority(seed, item.uid), source, kind))
    found = np.array(rows, ROW)
    return Survey(found, np.bincount(found["kind"], minlength=len(KINDS)), skips)


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height as the header of a picture says them, in pixels.

    Raises:
        ImageError: "corrupt_image" or "image_too_large".
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as e:
        raise ImageError("image_too_large", str(e)) from e
    except Exception as e:  # hostile bytes make Pillow raise almost anything
        raise ImageError("corrupt_image", f"{type(e).__name__}: {e}") from e
    if width * height > SKIP_PIXELS:
        raise ImageError("image_too_large", f"{width}x{height} pixels")
    if not width * height:
        raise ImageError("corrupt_image", f"{width}x{height} pixels")
    return width, height
