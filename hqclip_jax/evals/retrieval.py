"""Retrieval both ways between images and their captions, of which an image may have several."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.datasets import EvalDataError, read_captioned, tar_files
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.ranking import chance_at, first_match_ranks

KS = (1, 5, 10)
CHUNK_ELEMENTS = 1 << 24  # similarities held at once: 64 MB


def ranks_by_owner(
    query_QxD: np.ndarray,
    query_owner_Q: np.ndarray,
    target_TxD: np.ndarray,
    target_owner_T: np.ndarray,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> np.ndarray:
    """How many targets of other owners come before a query's best own one, int [Q].

    Of the Q×T similarities only a strip of whole rows exists at a time.

    Args:
        query_owner_Q: the image that each query is, or belongs to.
        target_owner_T: likewise; every query's owner has at least one target.
    """
    rows = max(1, chunk_elements // len(target_TxD))
    strips = (slice(start, start + rows) for start in range(0, len(query_QxD), rows))
    return np.concatenate(
        [
            first_match_ranks(query_QxD[s] @ target_TxD.T, query_owner_Q[s, None] == target_owner_T)
            for s in strips
        ]
    )


def retrieval_scores(
    zimg_NxD: np.ndarray, ztxt_MxD: np.ndarray, owner_M: np.ndarray
) -> dict[str, float]:
    """Recall at 1, 5 and 10 with its chance; `recall_at_k` is the mean of the two directions.

    An image's captions count as found when the first of them is (as in CLIP's paper), which
    CLIP_benchmark calls text retrieval.

    Args:
        owner_M: the image that each caption belongs to.
    """
    images = np.arange(len(zimg_NxD))
    ways = {
        "image_retrieval": (ztxt_MxD, owner_M, zimg_NxD, images),
        "text_retrieval": (zimg_NxD, images, ztxt_MxD, owner_M),
    }
    scores: dict[str, float] = {}
    for way, (queries, query_owner, targets, target_owner) in ways.items():
        ranks = ranks_by_owner(queries, query_owner, targets, target_owner)
        own = np.bincount(target_owner, minlength=len(images))[query_owner]
        for k in KS:
            scores[f"{way}_recall_at_{k}"] = float((ranks < k).mean())
            scores[f"{way}_recall_at_{k}_chance"] = chance_at(k, len(targets), own)
    for k in KS:
        for suffix in ("", "_chance"):
            both = [scores[f"{way}_recall_at_{k}{suffix}"] for way in ways]
            scores[f"recall_at_{k}{suffix}"] = sum(both) / 2
    return scores | {"n": len(zimg_NxD), "captions": len(ztxt_MxD)}


@dataclass(frozen=True)
class Retrieval:
    """Evaluator over tars of images with captions."""

    name: str
    path: Path

    def check(self) -> None:
        """Raises EvalDataError where the set is not all there."""
        tar_files(self.path)

    def run(self, embedder: Embedder) -> dict[str, float]:
        zimg, captions = [], []
        for examples, z in embedder.images(read_captioned(self.path)):
            zimg.append(z)
            captions.extend(example.captions for example in examples)
        if not captions:
            raise EvalDataError(f"{self.path} holds no images")
        owner = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
        ztxt = embedder.texts([text for each in captions for text in each])
        return retrieval_scores(np.concatenate(zimg), ztxt, owner)
