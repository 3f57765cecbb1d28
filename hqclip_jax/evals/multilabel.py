"""Images that have several classes each: every class ranks the images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.classification import ClassificationFolder, MultiLabelled
from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.metrics import average_precision
from hqclip_jax.evals.outcome import Items, Outcome, Skips
from hqclip_jax.evals.zeroshot import zero_shot_classifier


@dataclass(frozen=True)
class MultiLabel:
    """Images of several classes: CLIP_benchmark's layout with 0 or 1 per class in KEY.npy.

    Attributes:
        classnames, templates: files instead of the set's own; see `names.read_names`.
    """

    name: str
    path: Path
    classnames: Path | None = None
    templates: Path | None = None

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        self._open()

    def examples(self, skips: Skips) -> Iterator[MultiLabelled]:
        return self._open().multi_labelled(skips)

    def run(self, embedder: Embedder) -> Outcome:
        data, skips = self._open(), Skips()
        classifier_CxD = zero_shot_classifier(embedder, data.classnames, data.templates)
        sims, present = [], []
        for examples, zimg_nxD in embedder.images(data.multi_labelled(skips), skips):
            sims.append(zimg_nxD @ classifier_CxD.T)
            present.append(np.stack([e.present for e in examples]))
        if not sims:
            raise EvalDataError(f"{self.path} holds no images{skips}")
        return _outcome(np.concatenate(sims), np.concatenate(present), data.classnames, skips)

    def _open(self) -> ClassificationFolder:
        return ClassificationFolder.open(
            self.path, "test", "multilabel", self.classnames, self.templates
        )


def _outcome(
    sims_NxC: np.ndarray, present_NxC: np.ndarray, classnames: tuple[str, ...], skips: Skips
) -> Outcome:
    """The mean over the classes that have images; its chance is their mean share of the images."""
    ap_C = np.array([average_precision(s, p) for s, p in zip(sims_NxC.T, present_NxC.T)])
    seen_C = present_NxC.any(axis=0)
    if not seen_C.any():
        raise EvalDataError(f"no image has a class{skips}")
    keys = np.array([f"{c}: {name}" for c, name in enumerate(classnames)])
    scores = {
        "mean_average_precision": float(ap_C[seen_C].mean()),
        "mean_average_precision_chance": float(present_NxC.mean(axis=0)[seen_C].mean()),
        "n": len(sims_NxC),
        "classes": len(classnames),
        "classes_seen": int(seen_C.sum()),
    }
    items = Items(keys[seen_C], ap_C[seen_C].astype(np.float32))
    return Outcome(scores, "mean_average_precision", {"mean_average_precision": items}, skips)
