"""Zero-shot classification: each class is a text, and the nearest text is the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.datasets import ClassificationFolder, EvalDataError
from hqclip_jax.evals.embed import Embedder
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
    }


@dataclass(frozen=True)
class ZeroShot:
    """Evaluator over a folder in CLIP_benchmark's layout."""

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        ClassificationFolder.open(self.path)

    def run(self, embedder: Embedder) -> dict[str, float]:
        data = ClassificationFolder.open(self.path)
        classifier_CxD = zero_shot_classifier(embedder, data.classnames, data.templates)
        ranks, labels = [], []
        for examples, zimg_nxD in embedder.images(data):
            label_n = np.array([e.label for e in examples])
            own_nxC = label_n[:, None] == np.arange(len(data.classnames))
            labels.append(label_n)
            ranks.append(first_match_ranks(zimg_nxD @ classifier_CxD.T, own_nxC))
        if not ranks:
            raise EvalDataError(f"{self.path} holds no images")
        return classification_scores(
            np.concatenate(ranks), np.concatenate(labels), len(data.classnames)
        )
