"""Fine-grained sets: which of texts that differ in one fact, or in their order, is the image's?

All of them are one mechanism. An `Item` has images, right texts and wrong ones; a `Score` says
which comparisons of cosines an item has to get right, and a tie gets none of them right. A set is
then a reader of its files and its scores: sugarcrepe.py, aro.py, winoground.py, valse.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from hqclip_jax.evals.cards import choice_cards
from hqclip_jax.evals.datasets import EvalDataError, Item, Pictured, Region, read_files
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.outcome import Items, Outcome, Skips

Comparison = tuple[int, int, int]  # (a, b, c): a must be nearer to b than to c
STRIP = 1 << 16  # comparisons at a time


@dataclass(frozen=True)
class Score:
    """A way to answer an item.

    Attributes:
        comparisons: all of which must hold. They number the item's vectors: images first, then
            right texts, then wrong ones.
        chance: that they all hold if cosines come in any order.
    """

    name: str
    comparisons: Callable[[Item], Sequence[Comparison]]
    chance: Callable[[Item], float]


def _each_right_before_each_wrong(item: Item) -> list[Comparison]:
    right, wrong = len(item.right), len(item.wrong)
    return [(0, 1 + r, 1 + right + w) for r in range(right) for w in range(wrong)]


CHOICE = Score(
    "accuracy",
    _each_right_before_each_wrong,
    lambda item: 1 / math.comb(len(item.right) + len(item.wrong), len(item.right)),
)


def choice_scores(
    margins_n: np.ndarray,
    categories: Sequence[str],
    name: str = "accuracy",
    chance_n: np.ndarray | float = 0.5,
) -> dict[str, float]:
    """Share of the items that were answered right; a tie is wrong.

    Args:
        margins_n: the least by which a right cosine is above a wrong one.
        categories: one per item; "" where the set knows none.
        chance_n: per item.

    Returns:
        `NAME` over items (micro), `NAME_macro` over categories, `NAME/CATEGORY` and `n/CATEGORY`,
        and `tie_rate`: texts that differ only after the context's end tie.
    """
    right_n, named_n = margins_n > 0, np.array(categories)
    chance_n = np.broadcast_to(chance_n, len(margins_n))
    scores = {
        name: float(right_n.mean()),
        f"{name}_chance": float(chance_n.mean()),
        "tie_rate": float((margins_n == 0).mean()),
        "n": len(margins_n),
    }
    if present := sorted(set(categories) - {""}):
        by_category = {c: named_n == c for c in present}
        for suffix, of_n in (("", right_n), ("_chance", chance_n)):
            means = {c: float(of_n[own_n].mean()) for c, own_n in by_category.items()}
            scores[f"{name}_macro{suffix}"] = sum(means.values()) / len(means)
            scores |= {f"{name}/{c}{suffix}": mean for c, mean in means.items()}
        scores |= {f"n/{c}": int(own_n.sum()) for c, own_n in by_category.items()}
    return scores


def margins(
    score: Score, items: Sequence[Item], rows: Sequence[list[int]], z: np.ndarray
) -> np.ndarray:
    """The least margin of each item's comparisons, f32 [n].

    Args:
        rows: of each item's images, right texts and wrong texts among the vectors.
        z: unit vectors, f32 [N, D].
    """
    asked = [score.comparisons(item) for item in items]
    a, b, c = np.array(
        [[row[i] for i in triple] for row, triples in zip(rows, asked) for triple in triples]
    ).T
    # Two rounded products could differ where the texts are equal; their difference's can't.
    found = np.concatenate(
        [
            np.einsum("nd,nd->n", z[a[s]], z[b[s]] - z[c[s]])
            for s in (slice(i, i + STRIP) for i in range(0, len(a), STRIP))
        ]
    )
    counts = np.array([len(triples) for triples in asked])
    return np.minimum.reduceat(found, np.cumsum(counts) - counts)


def join(items: Iterable[Item], where: Path, skips: Skips) -> Iterator[Pictured]:
    """The images of the items, each once, with the items that begin with it.

    Args:
        where: the folder or the tars of `read_files`.
    """
    wanted: dict[str, dict[Region, list[Item]]] = defaultdict(dict)
    for item in items:
        for i, region in enumerate(item.images):
            own = wanted[region.file].setdefault(region, [])
            if i == 0:
                own.append(item)
    for file, source, image in read_files(where, wanted, skips):
        for region, own in wanted[file].items():
            place = "" if region.box is None else f" at {','.join(map(str, region.box))}"
            yield Pictured(source + place, image, region, tuple(own))


@dataclass(frozen=True)
class Compositional:
    """Evaluator over a set in JSON with its images; a subclass reads the set's own form.

    Attributes:
        images: where they lie; by default the folder `images` beside the JSON.
    """

    name: str
    path: Path
    images: Path | None = None

    scores: ClassVar[tuple[Score, ...]] = (CHOICE,)
    main: ClassVar[str] = "accuracy"

    @property
    def where(self) -> Path:
        return self.images or self.path.parent / "images"

    def check(self) -> None:
        """Raises EvalDataError where the set is not there."""
        for path in (self.path, self.where):
            if not path.exists():
                raise EvalDataError(f"{path} is missing")

    def items(self) -> Iterable[Item]:
        """All of the set's items. Raises EvalDataError."""
        raise NotImplementedError

    def examples(self, skips: Skips) -> Iterator[Pictured]:
        return join(self.items(), self.where, skips)

    def run(self, embedder: Embedder) -> Outcome:
        skips, zimg, found = Skips(), [], []
        sources: list[str] = []  # of the rows of `zimg`; a picture may come more than once
        row_of: dict[Region | str, int] = {}
        for examples, z in embedder.images(self.examples(skips), skips):
            for example in examples:
                row_of[example.region] = len(sources)
                sources.append(example.source)
                found.extend(example.items)
            zimg.append(z)
        items = [item for item in found if row_of.keys() >= {*item.images}]
        for item in found:
            if not row_of.keys() >= {*item.images}:
                skips.add("an item lacks one of its images", item.key)
        if not items:
            raise EvalDataError(f"{self.path} holds no items{skips}")
        texts = list(dict.fromkeys(text for item in items for text in item.right + item.wrong))
        vectors = np.concatenate([*zimg, embedder.texts(texts)])
        row_of |= {text: len(sources) + i for i, text in enumerate(texts)}
        rows = [[row_of[x] for x in item.images + item.right + item.wrong] for item in items]
        shown = [sources[row[0]] for row in rows]
        return self._outcome(items, rows, vectors, shown, skips)

    def _outcome(
        self,
        items: list[Item],
        rows: list[list[int]],
        vectors: np.ndarray,
        sources: list[str],
        skips: Skips,
    ) -> Outcome:
        keys, categories = np.array([i.key for i in items]), np.array([i.category for i in items])
        named_n = categories != ""
        groups_n = np.unique(categories[named_n], return_inverse=True)[1]
        pictures = np.unique(sources, return_inverse=True)[1]
        scores, answers, cards = {}, {}, ()
        for score in self.scores:
            margins_n = margins(score, items, rows, vectors)
            chance_n = np.array([score.chance(item) for item in items])
            one = choice_scores(margins_n, categories.tolist(), score.name, chance_n)
            if score.name != self.main.removesuffix("_macro"):
                one[f"{score.name}_tie_rate"] = one.pop("tie_rate")
            scores |= one
            right_n = (margins_n > 0).astype(np.float32)
            answers[score.name] = Items(keys, right_n, clusters=pictures)
            if named_n.any():
                answers[f"{score.name}_macro"] = Items(
                    keys[named_n], right_n[named_n], groups_n, pictures[named_n]
                )
            if score is CHOICE:
                cards = choice_cards(items, rows, vectors, sources, margins_n)
        main = self.main if self.main in scores else self.main.removesuffix("_macro")
        return Outcome(scores, main, answers, skips, cards)
