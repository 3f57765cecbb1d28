"""Retrieval both ways between images and their captions, of which an image may have several."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hqclip_jax.evals.cards import retrieval_cards
from hqclip_jax.evals.datasets import Captioned, EvalDataError, read_captioned, tar_files
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.evals.folders import CaptionFile
from hqclip_jax.evals.outcome import Items, Outcome, Skips
from hqclip_jax.evals.ranking import chance_at, first_match_ranks

KS = (1, 5, 10)
CHUNK_ELEMENTS = 1 << 26  # similarities held at once: 256 MB
FEWEST_ROWS = 64  # below them a product runs at the speed of memory


def ranks_by_owner(
    query_QxD: np.ndarray,
    query_owner_Q: np.ndarray,
    target_TxD: np.ndarray,
    target_owner_T: np.ndarray,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> np.ndarray:
    """How many targets of other owners come before a query's best own one, int [Q].

    `first_match_ranks` says what comes before what. Of the Q×T similarities only a strip of whole
    rows exists at a time, and little more is done with them than one comparison each.

    Args:
        query_owner_Q: the image that each query is, or belongs to.
        target_owner_T: likewise; every query's owner has at least one target.
    """
    rows = max(min(FEWEST_ROWS, chunk_elements), chunk_elements // len(target_TxD))
    own = _OwnTargets(query_owner_Q, target_owner_T)
    strips = (slice(start, start + rows) for start in range(0, len(query_QxD), rows))
    return np.concatenate([_strip_ranks(query_QxD[s] @ target_TxD.T, own, s) for s in strips])


class _OwnTargets:
    """Which targets are a query's own, in lists and not in a matrix."""

    def __init__(self, query_owner_Q: np.ndarray, target_owner_T: np.ndarray) -> None:
        self.targets = np.argsort(target_owner_T, kind="stable")
        ordered = target_owner_T[self.targets]
        self.first_Q = np.searchsorted(ordered, query_owner_Q)
        self.count_Q = np.searchsorted(ordered, query_owner_Q, side="right") - self.first_Q

    def of(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row within the strip and target of each pair, and where each row's pairs begin."""
        counts, firsts = self.count_Q[rows], self.first_Q[rows]
        begins = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(begins, counts)
        targets = self.targets[np.repeat(firsts, counts) + within]
        return np.repeat(np.arange(len(counts)), counts), targets, begins


def _strip_ranks(sims_qxT: np.ndarray, own: _OwnTargets, rows: slice) -> np.ndarray:
    row, target, begins = own.of(rows)
    own_sims = sims_qxT[row, target]
    best_q = np.maximum.reduceat(own_sims, begins)
    rank_q = np.array([np.count_nonzero(sims > best) for sims, best in zip(sims_qxT, best_q)])
    own_best_q = np.add.reduceat((own_sims == best_q[row]).astype(int), begins)
    reach_q = np.array([np.count_nonzero(sims >= best) for sims, best in zip(sims_qxT, best_q)])
    tied = np.flatnonzero(reach_q - rank_q > own_best_q)
    if len(tied):
        own_txT = np.zeros((len(tied), sims_qxT.shape[1]), bool)
        among = np.isin(row, tied)
        own_txT[np.searchsorted(tied, row[among]), target[among]] = True
        rank_q[tied] = first_match_ranks(sims_qxT[tied], own_txT)
    return rank_q


Ways = dict[str, tuple[np.ndarray, np.ndarray]]


def retrieval_ranks(zimg_NxD: np.ndarray, ztxt_MxD: np.ndarray, owner_M: np.ndarray) -> Ways:
    """Ranks and the number of right targets of each query, both ways.

    An image's captions count as found when the first of them is (as in CLIP's paper), which
    CLIP_benchmark calls text retrieval.

    Args:
        owner_M: the image that each caption belongs to.
    """
    images = np.arange(len(zimg_NxD))
    captions = np.bincount(owner_M, minlength=len(images))
    return {
        "image_retrieval": (
            ranks_by_owner(ztxt_MxD, owner_M, zimg_NxD, images),
            np.ones(len(owner_M), int),
        ),
        "text_retrieval": (ranks_by_owner(zimg_NxD, images, ztxt_MxD, owner_M), captions),
    }


def retrieval_scores(ways: Ways) -> dict[str, float]:
    """Recall at 1, 5 and 10 with its chance; `recall_at_k` is the mean of the two directions."""
    images, captions = (len(ways[way][0]) for way in ("text_retrieval", "image_retrieval"))
    targets = {"image_retrieval": images, "text_retrieval": captions}
    scores: dict[str, float] = {}
    for way, (rank_Q, right_Q) in ways.items():
        for k in KS:
            scores[f"{way}_recall_at_{k}"] = float((rank_Q < k).mean())
            scores[f"{way}_recall_at_{k}_chance"] = chance_at(k, targets[way], right_Q)
    for k in KS:
        for suffix in ("", "_chance"):
            both = [scores[f"{way}_recall_at_{k}{suffix}"] for way in ways]
            scores[f"recall_at_{k}{suffix}"] = sum(both) / 2
    return scores | {"n": images, "captions": captions}


def retrieval_items(ways: Ways, owner_M: np.ndarray, sources: Sequence[str]) -> dict[str, Items]:
    """The answers behind each recall: an image's by its source, a caption's by `SOURCE/NUMBER`.

    The directions' mean is over two groups, the captions and the images. What belongs to one
    image is one cluster. `owner_M` ascends.
    """
    within_M = np.arange(len(owner_M)) - np.searchsorted(owner_M, owner_M)
    keys = {
        "image_retrieval": np.array([f"{sources[o]}/{i}" for o, i in zip(owner_M, within_M)]),
        "text_retrieval": np.array(sources),
    }
    images = np.arange(len(sources))
    clusters = {"image_retrieval": owner_M, "text_retrieval": images}
    both_keys = np.concatenate([keys[way] for way in ways])
    both_clusters = np.concatenate([clusters[way] for way in ways])
    both_groups = np.repeat([0, 1], [len(keys[way]) for way in ways])
    items = {}
    for k in KS:
        found = {way: (rank_Q < k).astype(np.float32) for way, (rank_Q, _) in ways.items()}
        for way, found_Q in found.items():
            items[f"{way}_recall_at_{k}"] = Items(keys[way], found_Q, clusters=clusters[way])
        both = np.concatenate([*found.values()])
        items[f"recall_at_{k}"] = Items(both_keys, both, both_groups, both_clusters)
    return items


@dataclass(frozen=True)
class Retrieval:
    """Tars of KEY.jpg with KEY.json (caption, captions) or KEY.txt; or COCO's or Karpathy's JSON.

    Attributes:
        path: tars, or COCO's or Karpathy's JSON.
        images: the folder of the images that the JSON names.
        split: of Karpathy's.
    """

    name: str
    path: Path
    images: Path | None = None
    split: str = "test"

    def check(self) -> None:
        """Raises EvalDataError where the set is not there; logs which single images are not."""
        if self.images is None:
            tar_files(self.path)
        else:
            CaptionFile.open(self.path, self.images, self.split).check()

    def examples(self, skips: Skips) -> Iterator[Captioned]:
        if self.images is None:
            return read_captioned(self.path, skips)
        return CaptionFile.open(self.path, self.images, self.split).examples(skips)

    def run(self, embedder: Embedder) -> Outcome:
        skips, zimg, captions, keys = Skips(), [], [], []
        for examples, z in embedder.images(self.examples(skips), skips):
            zimg.append(z)
            captions.extend(example.captions for example in examples)
            keys.extend(example.source for example in examples)
        if not captions:
            raise EvalDataError(f"{self.path} holds no images{skips}")
        owner = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
        texts = [text for each in captions for text in each]
        ztxt, zimg = embedder.texts(texts), np.concatenate(zimg)
        ways = retrieval_ranks(zimg, ztxt, owner)
        cards = retrieval_cards(zimg, ztxt, owner, keys, texts, ways)
        return Outcome(
            retrieval_scores(ways), "recall_at_1", retrieval_items(ways, owner, keys), skips, cards
        )
