"""Examples for a report, from arrays: which answers to show, and what the model gave.

None is chosen by hand. A set's answers stand in one random order, drawn from a seed and the set's
size alone, and the first of a kind are shown: two models that fail on one picture show the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hqclip_jax.evals.datasets import Item
from hqclip_jax.evals.outcome import Card, Cell, Classes

SEED = 0
EACH = 6  # examples of one kind
FOOLED = 9
NEAREST = 5  # answers of an example


def top_k(sims_QxT: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest targets of each query, int [Q, k], and their similarities, f32 [Q, k].

    Of equal ones the first counts as nearer, as in `ranking.first_match_ranks`; a sort of what
    `argpartition` leaves could pick another of them.
    """
    left, rows = sims_QxT.copy(), np.arange(len(sims_QxT))
    ids = np.empty((len(sims_QxT), min(k, sims_QxT.shape[1])), int)
    for place in range(ids.shape[1]):
        ids[:, place] = left.argmax(axis=1)
        left[rows, ids[:, place]] = -np.inf
    return ids, np.take_along_axis(sims_QxT, ids, axis=1)


def pick(among_n: np.ndarray, count: int, seed: int = SEED) -> list[int]:
    """Up to `count` of the places where `among_n` is true, in the set's random order."""
    order = np.random.default_rng(seed).permutation(len(among_n))
    return order[among_n[order]][:count].tolist()


def class_cards(classes: Classes, ids_nxk: np.ndarray, sims_nxk: np.ndarray) -> tuple[Card, ...]:
    """Pictures with their nearest classes, some named rightly and some wrongly.

    Args:
        ids_nxk, sims_nxk: the nearest classes of every picture (`top_k`).
    """
    right_n = classes.predicted == classes.labels
    cards = []
    for section, among in (("Named rightly", right_n), ("Named wrongly", ~right_n)):
        for i in pick(among, EACH):
            label = classes.labels[i]
            answers = tuple(
                Cell(classes.names[c], similarity=float(s), right=bool(c == label))
                for c, s in zip(ids_nxk[i], sims_nxk[i])
            )
            asked = Cell(classes.names[label], str(classes.sources[i]))
            cards.append(Card(section, asked, answers))
    return tuple(cards)


def retrieval_cards(
    zimg_NxD: np.ndarray,
    ztxt_MxD: np.ndarray,
    owner_M: np.ndarray,
    sources: Sequence[str],
    captions: Sequence[str],
    ways: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[Card, ...]:
    """Captions with their nearest images and images with their nearest captions.

    Only the rows that are shown are multiplied out.

    Args:
        owner_M: the image that each caption belongs to.
        ways: ranks both ways, as `retrieval_ranks` gives them.
    """
    images = [Cell(source=source) for source in sources]
    texts = [Cell(caption) for caption in captions]
    own = np.arange(len(sources))
    sides = (
        ("Text to image", ways["image_retrieval"][0], (ztxt_MxD, owner_M, texts),
         (zimg_NxD, own, images)),
        ("Image to text", ways["text_retrieval"][0], (zimg_NxD, own, images),
         (ztxt_MxD, owner_M, texts)),
    )  # fmt: skip
    cards = []
    for title, rank_Q, (query, owner_Q, asked), (target, owner_T, answers) in sides:
        for section, among in ((f"{title}, found", rank_Q < 1), (f"{title}, missed", rank_Q > 0)):
            chosen = pick(among, EACH)
            ids, sims = top_k(query[chosen] @ target.T, NEAREST)
            for q, nearest, similarities in zip(chosen, ids, sims):
                cells = tuple(
                    Cell(answers[t].text, answers[t].source, float(s),
                         bool(owner_T[t] == owner_Q[q]))
                    for t, s in zip(nearest, similarities)
                )  # fmt: skip
                cards.append(Card(section, asked[q], cells))
    return tuple(cards)


def choice_cards(
    items: Sequence[Item],
    rows: Sequence[Sequence[int]],
    vectors: np.ndarray,
    sources: Sequence[str],
    margins_n: np.ndarray,
) -> tuple[Card, ...]:
    """Pictures that the model finds nearer to a wrong text, or as near: a tie is wrong.

    Args:
        rows: of each item's one image, right texts and wrong texts among the vectors.
        vectors: of unit length, f32 [N, D].
        margins_n: the least by which a right cosine is above a wrong one.
    """
    cards = []
    for i in pick(margins_n <= 0, FOOLED):
        item, (image, *texts) = items[i], rows[i]
        cells = [
            Cell(text, similarity=float(cosine), right=place < len(item.right))
            for place, (text, cosine) in enumerate(
                zip(item.right + item.wrong, vectors[texts] @ vectors[image])
            )
        ]
        # Of equal ones the wrong one first, as it counts.
        cells.sort(key=lambda cell: (-cell.similarity, cell.right))
        told = [item.category] if item.category else []
        asked = Cell(", ".join([*told, f"margin {margins_n[i]:.3f}"]), sources[i])
        cards.append(Card("Fooled by the negative", asked, tuple(cells[:NEAREST])))
    return tuple(cards)
