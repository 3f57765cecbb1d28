"""Winoground (Thrush et al. 2022, arXiv 2204.03162): two images, two captions of the same words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from hqclip_jax.evals.compositional import Compositional, Score
from hqclip_jax.evals.datasets import EvalDataError, Item, Pictured, Region, text_of
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.parquet import image_bytes, parquet_files, parquet_rows

# Vectors 0 and 1 are the images, 2 and 3 their captions.
BY_TEXT = [(0, 2, 3), (1, 3, 2)]
BY_IMAGE = [(2, 0, 1), (3, 1, 0)]
IMAGES = ("image_0", "image_1")
TEXTS = ("caption_0", "caption_1")
TAG = "collapsed_tag"


class Winoground(Compositional):
    """The published three scores and chances (25, 25 and 16.7%); categories are `collapsed_tag`.

    `text`: each image is nearer to its caption than to the other. `image`: each caption is nearer
    to its image than to the other. `group`: both.

    `path` is a folder that the Hugging Face repository facebook/winoground has been fetched to, or
    its `data`: `examples.jsonl` with the unpacked `images` beside it, or `test-*.parquet`.
    """

    scores: ClassVar[tuple[Score, ...]] = (
        Score("text", lambda item: BY_TEXT, lambda item: 1 / 4),
        Score("image", lambda item: BY_IMAGE, lambda item: 1 / 4),
        Score("group", lambda item: BY_TEXT + BY_IMAGE, lambda item: 1 / 6),
    )
    main: ClassVar[str] = "group"

    @property
    def folder(self) -> Path:
        return self.path / "data" if (self.path / "data").is_dir() else self.path

    @property
    def lines(self) -> Path:
        return self.folder / "examples.jsonl"

    @property
    def where(self) -> Path:
        return self.images or self.folder / "images"

    def check(self) -> None:
        if not self.lines.exists():
            parquet_files(self.folder)
        elif not self.where.exists():
            raise EvalDataError(f"{self.where} is missing: unpack images.zip there")

    def items(self) -> Iterator[Item]:
        for i, line in enumerate(self.lines.read_text(encoding="utf-8").splitlines()):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise EvalDataError(f"{self.lines}, line {i + 1} is not JSON: {e}") from e
            source = f"{self.lines}, line {i + 1}"
            files = (f"{text_of(row, image, source)}.png" for image in IMAGES)
            yield _item(row, i, tuple(Region(file) for file in files), source)

    def examples(self, skips: Skips) -> Iterator[Pictured]:
        if self.lines.exists():
            yield from super().examples(skips)
            return
        for i, row in enumerate(parquet_rows(self.folder, (*IMAGES, *TEXTS, TAG))):
            source = f"{self.folder}: row {i}"
            regions = tuple(Region(f"{i}/{image}") for image in IMAGES)
            item = _item(row, i, regions, source)
            for image, region, own in zip(IMAGES, regions, ((item,), ())):
                yield Pictured(f"{source}, {image}", image_bytes(row[image]), region, own)


def _item(row: dict, key: int, images: tuple[Region, ...], source: str) -> Item:
    captions = tuple(text_of(row, text, source) for text in TEXTS)
    return Item(str(key), images, captions, (), row.get(TAG) or "")
