"""Zero-shot classification: each class is a text, and the nearest text is the answer."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.cards import NEAREST, class_cards, top_k
from hqclip_jax.evals.classification import LabelledSet, open_labelled, with_metadata
from hqclip_jax.evals.datasets import EvalDataError, Labelled
from hqclip_jax.evals.embed import Embedder, EmbeddingError
from hqclip_jax.evals.metrics import f1_by_class, mean_by_group, recall_by_class
from hqclip_jax.evals.outcome import Classes, Items, Outcome, Skips
from hqclip_jax.evals.ranking import chance_at, first_match_ranks

log = logging.getLogger("hqclip_jax.evals")

MAINS = ("top1", "top5", "mean_per_class", "f1_macro")
WORST = ("top1_worst_group", "top5_worst_group")


def zero_shot_classifier(
    embedder: Embedder, classnames: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """One unit vector per class, f32 [C, D]: the mean over the templates' unit vectors,
    normalised again (OpenCLIP's rule). `{c}` in a template is the class's name.

    Raises:
        EmbeddingError: a mean of length 0, which would be nearest to every image.
    """
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    z_CxTxD = embedder.texts(texts).reshape(len(classnames), len(templates), -1)
    z_CxD = z_CxTxD.mean(axis=1)
    length_Cx1 = np.linalg.norm(z_CxD, axis=1, keepdims=True)
    if not length_Cx1.all():
        dead = classnames[int(length_Cx1.argmin())]
        raise EmbeddingError(f"the texts of class {dead!r} have no direction: is it trained?")
    return z_CxD / length_Cx1


@dataclass(frozen=True)
class Answers:
    """What was answered for each image.

    Attributes:
        keys: str [n].
        labels: the right class, int [n].
        ranks: how many classes come before the right one, int [n].
        answers: the class that comes first, int [n].
        nearest, cosines: the classes that come first, int [n, k] and f32 [n, k].
        metadata: what the set says beside the class, int [n, M].
        classnames: [C].
    """

    keys: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray
    answers: np.ndarray
    nearest: np.ndarray
    cosines: np.ndarray
    metadata: np.ndarray
    classnames: tuple[str, ...]


def classification_scores(
    ranks_n: np.ndarray, labels_n: np.ndarray, classes: int
) -> dict[str, float]:
    """top-1, top-5 and the mean over the classes seen of their top-1, each with its chance.

    Args:
        ranks_n: classes that come before the right one.
    """
    recall_C = recall_by_class(ranks_n < 1, labels_n, classes)
    return {
        "top1": float((ranks_n < 1).mean()),
        "top1_chance": 1 / classes,
        "top5": float((ranks_n < 5).mean()),
        "top5_chance": chance_at(5, classes),
        "mean_per_class": float(np.nanmean(recall_C)),
        "mean_per_class_chance": 1 / classes,
        "n": len(ranks_n),
        "classes": classes,
        "classes_seen": int((~np.isnan(recall_C)).sum()),
    }


def classification_items(
    key_n: np.ndarray, rank_n: np.ndarray, label_n: np.ndarray
) -> dict[str, Items]:
    """The answers behind each of `classification_scores`."""
    right_n = (rank_n < 1).astype(np.float32)
    return {
        "top1": Items(key_n, right_n),
        "top5": Items(key_n, (rank_n < 5).astype(np.float32)),
        "mean_per_class": Items(key_n, right_n, label_n),
    }


def f1_items(found: Answers) -> Items:
    """The F1 of each class that has images: of it there are no answers image by image."""
    f1_C = f1_by_class(found.answers, found.labels, len(found.classnames))
    seen = np.flatnonzero(~np.isnan(f1_C))
    keys = np.array([f"{c}: {found.classnames[c]}" for c in seen])
    return Items(keys, f1_C[seen].astype(np.float32))


def f1_chance(label_n: np.ndarray, classes: int) -> float:
    """The mean F1 of answers that are drawn evenly: their expected counts put into its formula."""
    seen = np.bincount(label_n)
    seen = seen[seen > 0]
    return float((2 * seen / (len(label_n) + classes * seen)).mean())


def group_scores(found: Answers, column: int, name: str) -> dict[str, float]:
    """top-1 and top-5 of each group and of the worst.

    As DataComp's code has it, every group with an image counts, even FMoW's region "Other" of four
    images, which WILDS itself leaves out.

    Returns:
        `top1_worst_group`, whose chance is that of any group, `top1/NAME=GROUP`, likewise top5,
        and `n/NAME=GROUP`.
    """
    scores: dict[str, float] = {}
    for score, k in (("top1", 1), ("top5", 5)):
        by_group = mean_by_group(found.ranks < k, found.metadata[:, column])
        scores[f"{score}_worst_group"] = min(mean for mean, _ in by_group.values())
        scores[f"{score}_worst_group_chance"] = chance_at(k, len(found.classnames))
        for group, (mean, count) in by_group.items():
            scores[f"{score}/{name}={group}"] = mean
            scores[f"n/{name}={group}"] = count
    return scores


@dataclass(frozen=True)
class ZeroShot:
    """Images of one class each: CLIP_benchmark's layout, a TFDS folder, or a folder per class.

    Attributes:
        path: that folder.
        main: the score that stands for the set, of `MAINS`, or of `WORST` if there are groups.
        classnames, templates: files instead of the set's own; see `names.read_names`.
        split: of TFDS, or the folder of the tars, or that between `path` and the classes'.
        label: the feature of TFDS that holds the class.
        metadata: the names of the numbers in `KEY.npy`.
        group_by: that of `metadata` which makes the groups.
        classes, size: how many the whole set has, where it is known: less is told.
    """

    name: str
    path: Path
    main: str = "top1"
    classnames: Path | None = None
    templates: Path | None = None
    split: str = "test"
    label: str = "label"
    metadata: tuple[str, ...] = ()
    group_by: str = ""
    classes: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the fields do not fit each other."""
        if self.group_by and self.group_by not in self.metadata:
            raise ValueError(f"group_by {self.group_by!r} is none of metadata {[*self.metadata]}")
        mains = MAINS + (WORST if self.group_by else ())
        if self.main not in mains:
            raise ValueError(f"main {self.main!r} is not one of {', '.join(mains)}")

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        self._open()

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        return self._complete(self._open(), skips)

    def run(self, embedder: Embedder) -> Outcome:
        skips = Skips()
        found = self._answers(embedder, self._open(), skips)
        items = classification_items(found.keys, found.ranks, found.labels)
        scores = classification_scores(found.ranks, found.labels, len(found.classnames))
        if self.main == "f1_macro":
            items["f1_macro"] = f1_items(found)
            scores["f1_macro"] = items["f1_macro"].score()
            scores["f1_macro_chance"] = f1_chance(found.labels, len(found.classnames))
        if self.group_by:
            column = self.metadata.index(self.group_by)
            scores |= group_scores(found, column, self.group_by)
        tell_missing(self.name, found.labels, found.classnames, self.size)
        classes = Classes(found.classnames, found.keys, found.labels, found.answers)
        cards = class_cards(classes, found.nearest, found.cosines)
        return Outcome(scores, self.main, items, skips, cards, classes)

    def _answers(self, embedder: Embedder, data: LabelledSet, skips: Skips) -> Answers:
        classifier_CxD = zero_shot_classifier(embedder, data.classnames, data.templates)
        batches: list[tuple[np.ndarray, ...]] = []
        for examples, zimg_nxD in embedder.images(self._complete(data, skips), skips):
            sims_nxC = zimg_nxD @ classifier_CxD.T
            label_n = np.array([e.label for e in examples])
            ranks = first_match_ranks(sims_nxC, label_n[:, None] == np.arange(len(classifier_CxD)))
            keys = np.array([e.source for e in examples])
            numbers = np.array([e.metadata if self.metadata else () for e in examples], int)
            near, cosines = top_k(sims_nxC, NEAREST)
            batches.append((keys, label_n, ranks, near[:, 0], near, cosines, numbers))
        if not batches:
            raise EvalDataError(f"{self.path} holds no images{skips}")
        return Answers(*map(np.concatenate, zip(*batches)), data.classnames)

    def _open(self) -> LabelledSet:
        data = open_labelled(self.path, self.classnames, self.templates, self.split, self.label)
        if self.classes and len(data.classnames) != self.classes:
            log.warning(
                "%s: %s has %d class names, the set has %d: scores can't be compared with others'",
                self.name, self.path, len(data.classnames), self.classes,
            )  # fmt: skip
        return data

    def _complete(self, data: LabelledSet, skips: Skips) -> Iterator[Labelled]:
        """The examples that say which group they are of, where there are groups."""
        examples = data.examples(skips)
        return with_metadata(examples, self.metadata, skips) if self.metadata else examples


def tell_missing(
    name: str, label_n: np.ndarray, classnames: Sequence[str], size: int | None
) -> None:
    """Logs classes without images, and how many images the whole set has beside those scored."""
    counts = np.bincount(label_n, minlength=len(classnames))
    if empty := [classnames[c] for c in np.flatnonzero(counts == 0)]:
        some = ", ".join(empty[:8])
        log.warning("%s: %d of %d classes have no image: %s", name, len(empty), len(counts), some)
    if size and len(label_n) != size:
        log.warning("%s: scored %s images, the set has %s", name, f"{len(label_n):,}", f"{size:,}")
