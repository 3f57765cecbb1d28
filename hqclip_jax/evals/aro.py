"""ARO (Yuksekgonul et al. 2023, arXiv 2210.01936): relations, attributes and the order of words."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from hqclip_jax.evals.compositional import Compositional
from hqclip_jax.evals.datasets import EvalDataError, Item, Pictured, Region, load_json, text_of
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.parquet import image_bytes, parquet_files, parquet_rows

FEWEST_PER_ATTRIBUTES = 25
ORDER_COLUMNS = ("correct_caption", *(f"hard_text_{i}" for i in range(1, 5)))


@cache
def _left_out_relations() -> frozenset[str]:
    return frozenset(json.loads(Path(__file__).with_name("aro_relations.json").read_text()))


class _VisualGenome(Compositional):
    """A JSON list beside the folder `images`; the image is cut to `bbox_x`, `bbox_y`, `bbox_w`,
    `bbox_h`, the box that holds both things named, before it is resized.

    The published figure is `accuracy_macro`.
    """

    main: ClassVar[str] = "accuracy_macro"

    def categories(self, items: list[dict]) -> Iterator[str]:
        raise NotImplementedError

    def items(self) -> Iterator[Item]:
        items = load_json(self.path)
        if not isinstance(items, list):
            raise EvalDataError(f"{self.path} is not a list of items")
        for i, (item, category) in enumerate(zip(items, self.categories(items))):
            source = f"{self.path}: item {i}"
            image = Region(text_of(item, "image_path", source), self._box(item, source))
            right, wrong = (text_of(item, f"{w}_caption", source) for w in ("true", "false"))
            yield Item(str(i), (image,), (right,), (wrong,), category)

    def _box(self, item: dict, source: str) -> tuple[int, int, int, int]:
        box = tuple(item.get(f"bbox_{side}") for side in "xywh")
        if not all(isinstance(side, int) for side in box) or min(box[2:]) < 1:
            raise EvalDataError(f"{source} has no box in bbox_x, bbox_y, bbox_w, bbox_h: {box}")
        return box


class VGRelation(_VisualGenome):
    """`the horse is eating the grass`, or the grass the horse?

    The mean over relations leaves out those that the authors' notebook leaves out: the symmetric
    and the rare ones. `accuracy` is over all items, theirs too.
    """

    def categories(self, items: list[dict]) -> Iterator[str]:
        for i, item in enumerate(items):
            relation = text_of(item, "relation_name", f"{self.path}: item {i}")
            yield "" if relation in _left_out_relations() else relation


class VGAttribution(_VisualGenome):
    """`the crouched cat and the open door`, or open cat and crouched door?

    The mean is over pairs of attributes that at least 25 items have, as in the authors' code.
    """

    def categories(self, items: list[dict]) -> Iterator[str]:
        pairs = []
        for i, item in enumerate(items):
            attributes = item.get("attributes") if isinstance(item, dict) else None
            if not isinstance(attributes, list) or len(attributes) != 2:
                raise EvalDataError(f"{self.path}: item {i} has no two `attributes`")
            pairs.append("_".join(attributes))
        counts = Counter(pairs)
        for pair in pairs:
            yield pair if counts[pair] >= FEWEST_PER_ATTRIBUTES else ""


class WordOrder(Compositional):
    """COCO-Order and Flickr30k-Order: a caption against four shuffles of its words.

    The authors shuffle anew in each run, with spaCy's tagger and NLTK's tokens, so the figure
    depends on the draw. Here the shuffles are data: Parquet of an image and its texts in each row,
    as MTEB's copies have them (columns `images`, `correct_caption`, `hard_text_1` to
    `hard_text_4`); or a JSON list of items with `image` (a path under the folder of images),
    `caption` and `negatives`.
    """

    @property
    def where(self) -> Path:
        return self.path if self._is_parquet else super().where

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix != ".json"

    def check(self) -> None:
        super().check()
        if self._is_parquet:
            parquet_files(self.path)

    def items(self) -> Iterator[Item]:
        items = load_json(self.path)
        for i, item in enumerate(items if isinstance(items, list) else []):
            source = f"{self.path}: item {i}"
            image, caption = (text_of(item, field, source) for field in ("image", "caption"))
            negatives = item.get("negatives")
            if not isinstance(negatives, list) or not negatives:
                raise EvalDataError(f"{source} has no list `negatives`: {str(item)[:80]}")
            yield Item(str(i), (Region(image),), (caption,), tuple(negatives))

    def examples(self, skips: Skips) -> Iterator[Pictured]:
        if not self._is_parquet:
            yield from super().examples(skips)
            return
        rows = enumerate(parquet_rows(self.path, ("images", *ORDER_COLUMNS)))
        # The rows of one image follow one another.
        for image, own in groupby(rows, lambda row: image_bytes(row[1]["images"])):
            region = Region(hashlib.sha256(image).hexdigest())
            items = []
            for i, row in own:
                caption, *negatives = (
                    text_of(row, column, f"{self.path}: row {i}") for column in ORDER_COLUMNS
                )
                items.append(Item(str(i), (region,), (caption,), tuple(negatives)))
            yield Pictured(f"{self.path}: row {items[0].key}", image, region, tuple(items))
