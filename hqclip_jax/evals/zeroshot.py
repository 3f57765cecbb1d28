"""Zero-shot classification: each class is a text, and the nearest text is the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.datasets import ClassificationFolder, EvalDataError, Labelled
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.outcome import Items, Outcome, Skips
from hqclip_jax.evals.ranking import chance_at, first_match_ranks


def zero_shot_classifier(
    embedder: Embedder, classnames: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """One unit vector per class, f32 [C, D]: the mean over the templates' unit vectors,
    normalised again (OpenCLIP's rule). `{c}` in a template is the class's name."""
    texts = [template.replace("{c}", name) for name in classnames for template in templates]
    z_CxTxD = embedder.texts(texts).reshape(len(classnames), len(templates), -1)
    z_CxD = z_CxTxD.mean(axis=1)
    return z_CxD / np.linalg.norm(z_CxD, axis=1, keepdims=True)


def classification_scores(
    ranks_n: np.ndarray, labels_n: np.ndarray, classes: int
) -> dict[str, float]:
    """top-1, top-5 and the mean over the classes seen of their top-1, each with its chance.

    Args:
        ranks_n: classes that come before the right one.
    """
    right_n = ranks_n < 1
    seen_C = np.bincount(labels_n, minlength=classes)
    right_C = np.bincount(labels_n, weights=right_n, minlength=classes)
    return {
        "top1": float(right_n.mean()),
        "top1_chance": 1 / classes,
        "top5": float((ranks_n < 5).mean()),
        "top5_chance": chance_at(5, classes),
        "mean_per_class": float((right_C[seen_C > 0] / seen_C[seen_C > 0]).mean()),
        "mean_per_class_chance": 1 / classes,
        "n": len(ranks_n),
        "classes": classes,
        "classes_seen": int((seen_C > 0).sum()),
    }


@dataclass(frozen=True)
class ZeroShot:
    """Evaluator over a folder in CLIP_benchmark's layout."""

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        ClassificationFolder.open(self.path)

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        return ClassificationFolder.open(self.path).examples(skips)

    def run(self, embedder: Embedder) -> Outcome:
        data, skips = ClassificationFolder.open(self.path), Skips()
        classifier_CxD = zero_shot_classifier(embedder, data.classnames, data.templates)
        ranks, labels, keys = [], [], []
        for examples, zimg_nxD in embedder.images(data.examples(skips), skips):
            label_n = np.array([e.label for e in examples])
            own_nxC = label_n[:, None] == np.arange(len(data.classnames))
            labels.append(label_n)
            keys.extend(e.source for e in examples)
            ranks.append(first_match_ranks(zimg_nxD @ classifier_CxD.T, own_nxC))
        if not ranks:
            raise EvalDataError(f"{self.path} holds no images{skips}")
        rank_n, label_n = np.concatenate(ranks), np.concatenate(labels)
        scores = classification_scores(rank_n, label_n, len(data.classnames))
        key_n, right_n = np.array(keys), (rank_n < 1).astype(np.float32)
        items = {
            "top1": Items(key_n, right_n),
            "top5": Items(key_n, (rank_n < 5).astype(np.float32)),
            "mean_per_class": Items(key_n, right_n, label_n),
        }
        return Outcome(scores, "top1", items, skips)
