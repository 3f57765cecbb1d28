"""Hard negatives: which of two captions that differ in one fact is the image's?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.cards import choice_cards
from hqclip_jax.evals.datasets import (
    Contrasted,
    EvalDataError,
    read_contrasted,
    read_sugarcrepe,
    tar_files,
)
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.outcome import Items, Outcome, Skips


def choice_scores(margins_n: np.ndarray, categories: Sequence[str]) -> dict[str, float]:
    """Share of the items whose own caption is the nearer one; a tie is wrong.

    Args:
        margins_n: cosine with the caption less cosine with the negative.
        categories: one per item; "" where the set knows none.

    Returns:
        `accuracy` over items (micro), `accuracy_macro` over categories, `accuracy/CATEGORY` and
        `n/CATEGORY`, and `tie_rate`: captions that differ only after the context's end tie.
    """
    right_n = margins_n > 0
    scores = {
        "accuracy": float(right_n.mean()),
        "accuracy_chance": 0.5,
        "tie_rate": float((margins_n == 0).mean()),
        "n": len(margins_n),
    }
    named = np.array(categories)
    if present := sorted(set(categories) - {""}):
        by_category = {c: float(right_n[named == c].mean()) for c in present}
        scores["accuracy_macro"] = sum(by_category.values()) / len(by_category)
        scores["accuracy_macro_chance"] = 0.5
        for category, accuracy in by_category.items():
            scores[f"accuracy/{category}"] = accuracy
            scores[f"accuracy/{category}_chance"] = 0.5
            scores[f"n/{category}"] = int((named == category).sum())
    return scores


@dataclass(frozen=True)
class HardNegatives:
    """Evaluator over SugarCrepe's JSON with its images, or over tars that hold both."""

    name: str
    path: Path
    images: Path | None = None

    def check(self) -> None:
        """Raises EvalDataError where the set is not there."""
        if self.images is None:
            tar_files(self.path)
        for path in (self.path, self.images):
            if path is not None and not path.exists():
                raise EvalDataError(f"{path} is missing")

    def examples(self, skips: Skips) -> Iterator[Contrasted]:
        if self.images is None:
            return read_contrasted(self.path, skips)
        return read_sugarcrepe(self.path, self.images, skips)

    def run(self, embedder: Embedder) -> Outcome:
        skips, zimg, choices, keys, sources = Skips(), [], [], [], []
        for examples, z in embedder.images(self.examples(skips), skips):
            zimg.append(np.repeat(z, [len(e.choices) for e in examples], axis=0))
            choices.extend(choice for e in examples for choice in e.choices)
            sources.extend(e.source for e in examples for _ in e.choices)
            keys.extend(f"{e.source}/{i}" for e in examples for i in range(len(e.choices)))
        if not choices:
            raise EvalDataError(f"{self.path} holds no items{skips}")
        texts = [c.caption for c in choices] + [c.negative for c in choices]
        zpos, zneg = np.split(embedder.texts(texts), 2)
        # Two rounded products could differ where the texts are equal; their difference's can't.
        zimg = np.concatenate(zimg)
        margins = np.einsum("nd,nd->n", zimg, zpos - zneg)
        pictures = np.unique(sources, return_inverse=True)[1]
        right = Items(np.array(keys), (margins > 0).astype(np.float32), clusters=pictures)
        scores = choice_scores(margins, [c.category for c in choices])
        cards = choice_cards(zimg, zpos, zneg, choices, sources, margins)
        return Outcome(scores, "accuracy", {"accuracy": right}, skips, cards)
