"""Linear probes: logistic regression on frozen features, from all training images or from a few.

The features are `encode_image`'s, of unit length, as CLIP_benchmark takes them; CLIP's paper takes
those before the projection, which are wider and score higher. The solver is logistic.py's.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from hqclip_jax.evals.classification import open_labelled
from hqclip_jax.evals.datasets import EvalDataError, Labelled
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.logistic import Classifier, Regression
from hqclip_jax.evals.outcome import Items, Outcome, Skips
from hqclip_jax.evals.ranking import first_match_ranks
from hqclip_jax.evals.tfds import is_tfds
from hqclip_jax.evals.zeroshot import classification_items, classification_scores

log = logging.getLogger("hqclip_jax.evals")

HELD_OUT = 10  # one in so many training images chooses the penalty, where there is no `val`
SHOTS = (1, 2, 4, 8, 16)
SEEDS = 5
MOST_VALIDATION_SHOTS = 4


@dataclass(frozen=True)
class Features:
    """z_nxD f32, label_n int, and where each came from."""

    z_nxD: np.ndarray
    label_n: np.ndarray
    keys: list[str]

    def __getitem__(self, rows: np.ndarray) -> "Features":
        keys = [self.keys[row] for row in np.arange(len(self.keys))[rows]]
        return Features(self.z_nxD[rows], self.label_n[rows], keys)

    def __add__(self, other: "Features") -> "Features":
        z_nxD = np.concatenate([self.z_nxD, other.z_nxD])
        label_n = np.concatenate([self.label_n, other.label_n])
        return Features(z_nxD, label_n, self.keys + other.keys)


def embed_split(embedder: Embedder, root: Path, split: str, skips: Skips) -> Features:
    """Raises EvalDataError where no image is of use."""
    z, labels, keys = [], [], []
    for examples, z_nxD in embedder.images(open_labelled(root, split=split).examples(skips), skips):
        z.append(z_nxD)
        labels.extend(e.label for e in examples)
        keys.extend(e.source for e in examples)
    if not z:
        raise EvalDataError(f"{root}, split {split}, holds no images{skips}")
    return Features(np.concatenate(z), np.array(labels), keys)


def best_penalty(score: Callable[[float], float]) -> float:
    """The penalty that scores best (published: CLIP, appendix A.3).

    From 10⁻⁶, 10⁻⁴, ..., 10⁶ on, the step around the best so far is halved until there are 8 to a
    decade: 15 fits in the place of 97. Of equals the middle one is taken (ours): on few validation
    images a whole range of penalties scores best, and its ends fit the worst. That the paper's λ is
    scikit-learn's 1 / C is our inference.
    """
    scores: dict[int, float] = {}

    def best(eighths: range) -> int:
        for e in eighths:
            if -48 <= e <= 48 and e not in scores:
                scores[e] = score(10 ** (e / 8))
        equals = sorted(e for e in scores if scores[e] == max(scores.values()))
        return equals[len(equals) // 2]

    peak, step = best(range(48, -49, -16)), 16
    while step > 1:
        step //= 2
        peak = best(range(peak + step, peak - step - 1, -step))
    return 10 ** (peak / 8)


def fit_probe(
    train: Features, validation: Features, classes: int, mesh: Mesh, both: bool
) -> tuple[Classifier, float]:
    """The classifier with the penalty that scores best on `validation`, and that penalty.

    Args:
        both: whether the last fit takes the validation images too, as CLIP's paper does.
    """
    regression = Regression(train.z_nxD, train.label_n, classes, mesh)
    last: Classifier | None = None

    def score(penalty: float) -> float:
        nonlocal last
        last = regression.fit(penalty, last)
        return float((last.logits(validation.z_nxD).argmax(axis=1) == validation.label_n).mean())

    penalty = best_penalty(score)
    if both:
        every = train + validation
        regression = Regression(every.z_nxD, every.label_n, classes, mesh)
    found = regression.fit(penalty, last)
    if not found.converged:
        log.warning("a probe's gradient fell to %.1e of its start only", found.gradient)
    return found, penalty


def held_out(label_n: np.ndarray, seed: int = 0) -> np.ndarray:
    """Every tenth image of each class, at random, as a mask [n]; of a class of fewer, none."""
    mask_n, rng = np.zeros(len(label_n), bool), np.random.default_rng(seed)
    for label in np.unique(label_n):
        own = rng.permutation(np.flatnonzero(label_n == label))
        mask_n[own[: len(own) // HELD_OUT]] = True
    return mask_n


@dataclass(frozen=True)
class _Trained:
    """Evaluator over a set with `train`, `test` and perhaps `val`, as `open_labelled` reads."""

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where a split is not all there."""
        self._classes()

    def _classes(self) -> int:
        """How many there are, the same in all splits: a class's number is its place in them."""
        splits = ["train", "test", *["val"] * self._has_val()]
        for split in splits:
            # Without it the reader would take the whole folder, and test on what it trained on.
            if not is_tfds(self.path) and not (self.path / split).is_dir():
                raise EvalDataError(f"{self.path / split} is missing: a probe needs train and test")
        train, *others = (open_labelled(self.path, split=s).classnames for s in splits)
        for split, names in zip(splits[1:], others):
            if names != train:
                other = sorted({*train} ^ {*names})[:8]
                raise EvalDataError(f"{self.path}: train and {split} have other classes: {other}")
        return len(train)

    def _has_val(self) -> bool:
        return (self.path / "val").is_dir()

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        return open_labelled(self.path, split="test").examples(skips)

    def _splits(self, embedder: Embedder, skips: Skips) -> tuple[Features, Features, int]:
        train, test = (embed_split(embedder, self.path, s, skips) for s in ("train", "test"))
        return train, test, self._classes()


class Probe(_Trained):
    """From all training images: `top1`, `top5` and the mean over classes, on `test`.

    The penalty is chosen on `val`; where there is none, on a tenth of `train` (ours: the paper
    does not say how much). The last fit is on both (published).
    """

    def run(self, embedder: Embedder) -> Outcome:
        skips = Skips()
        train, test, classes = self._splits(embedder, skips)
        if self._has_val():
            validation = embed_split(embedder, self.path, "val", skips)
        else:
            mask_n = held_out(train.label_n)
            if not mask_n.any():
                raise EvalDataError(
                    f"{self.path / 'train'} has no class of {HELD_OUT} images, of which to hold "
                    "one out: add a folder val, or run few_shot"
                )
            train, validation = train[~mask_n], train[mask_n]
        classifier, penalty = fit_probe(train, validation, classes, embedder.mesh, both=True)
        own_nxC = test.label_n[:, None] == np.arange(classes)
        rank_n = first_match_ranks(classifier.logits(test.z_nxD), own_nxC)
        scores = classification_scores(rank_n, test.label_n, classes)
        scores["n_train"] = len(train.keys) + len(validation.keys)
        settings = {"penalty": penalty, "gradient": classifier.gradient}
        items = classification_items(np.array(test.keys), rank_n, test.label_n)
        return Outcome(scores, "top1", items, skips, settings=settings)


class FewShot(_Trained):
    """From k training images of each class: the mean over five draws, and their deviation.

    The penalty is chosen on min(k, 4) further images of each class (published: CoOp, Zhou et al.
    2022); the last fit is on the k alone. A class of fewer images gives those it has, as there. An
    answer in `items` is its mean over the draws.
    """

    def run(self, embedder: Embedder) -> Outcome:
        skips = Skips()
        train, test, classes = self._splits(embedder, skips)
        counts = np.bincount(train.label_n, minlength=classes)
        scores: dict[str, float] = {"n": len(test.keys), "classes": classes, "draws": SEEDS}
        items, main = {}, ""
        for k in SHOTS:
            if counts.max() <= k:
                skips.add("shots: no class has images left to validate on", f"{k} shots")
                continue
            for c in np.flatnonzero(counts < k):
                skips.add(f"{k} shots: a class has fewer training images", f"class {c}")
            right_SxN = np.stack(
                [self._draw(train, test, classes, k, s, embedder.mesh) for s in range(SEEDS)]
            )
            main = f"top1_{k}_shot"
            scores[main] = float(right_SxN.mean())
            scores[f"{main}_chance"] = 1 / classes
            scores[f"{main}_std"] = float(right_SxN.mean(axis=1).std(ddof=1))
            items[main] = Items(np.array(test.keys), right_SxN.mean(axis=0, dtype=np.float32))
        if not main:
            raise EvalDataError(f"{self.path / 'train'} has no class of two images{skips}")
        return Outcome(scores, main, items, skips)

    def _draw(
        self, train: Features, test: Features, classes: int, k: int, seed: int, mesh: Mesh
    ) -> np.ndarray:
        rng = np.random.default_rng((k, seed))
        own = [rng.permutation(np.flatnonzero(train.label_n == c)) for c in range(classes)]
        shots = train[np.concatenate([rows[:k] for rows in own])]
        more = min(k, MOST_VALIDATION_SHOTS)
        validation = train[np.concatenate([rows[k : k + more] for rows in own])]
        classifier, _ = fit_probe(shots, validation, classes, mesh, both=False)
        return classifier.logits(test.z_nxD).argmax(axis=1) == test.label_n
