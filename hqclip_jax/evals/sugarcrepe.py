"""SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610) and SugarCrepe++ (Dumpala et al. 2024,
arXiv 2406.11171), on COCO's val2017; and the same form of item in tars of one's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from hqclip_jax.evals.compositional import CHOICE, Compositional, Score
from hqclip_jax.evals.datasets import (
    EvalDataError,
    Item,
    Pictured,
    Region,
    load_json,
    read_contrasted,
    tar_files,
    text_of,
)
from hqclip_jax.evals.outcome import Skips

TEXT_ONLY = Score("text_only", lambda item: [(1, 2, 3), (2, 1, 3)], lambda item: 1 / 3)


def read_sugarcrepe(path: Path, captions: tuple[str, ...] = ("caption",)) -> Iterator[Item]:
    """The items of one JSON file, or of a folder of them, each of which is a category by its name.

    SugarCrepe's seven files hold a dict of number to item, SugarCrepe++'s five a list of items.

    Args:
        captions: the fields of an item that are true of its image, beside `filename`,
            `negative_caption` and, in a file of several categories, `category`.

    Raises:
        EvalDataError: no items, or one without a field.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    empty = True
    for file in files:
        items = load_json(file)
        for key, item in items.items() if isinstance(items, dict) else enumerate(items):
            source = f"{file}: item {key}"
            image = Region(text_of(item, "filename", source))
            right = tuple(text_of(item, field, source) for field in captions)
            wrong = (text_of(item, "negative_caption", source),)
            category = item.get("category", file.stem)
            yield Item(f"{file.stem}/{key}", (image,), right, wrong, category)
            empty = False
    if empty:
        raise EvalDataError(f"{path} holds no items")


class HardNegatives(Compositional):
    """A caption against one negative: SugarCrepe's JSON with its images, or tars that hold both.

    `accuracy` is over items; SugarCrepe publishes each category's, `accuracy_macro` is their mean.
    """

    def check(self) -> None:
        if self.images is not None:
            super().check()
        else:
            tar_files(self.path)

    def items(self) -> Iterator[Item]:
        return read_sugarcrepe(self.path)

    def examples(self, skips: Skips) -> Iterator[Pictured]:
        return read_contrasted(self.path, skips) if self.images is None else super().examples(skips)


class SugarCrepePlus(Compositional):
    """Two captions of one meaning against a negative (published: the paper's two tasks).

    `accuracy` is image to text: both captions are nearer to the image than the negative is.
    `text_only`: the captions are nearer to one another than either is to the negative.
    """

    scores: ClassVar[tuple[Score, ...]] = (CHOICE, TEXT_ONLY)

    def items(self) -> Iterator[Item]:
        return read_sugarcrepe(self.path, ("caption", "caption2"))
