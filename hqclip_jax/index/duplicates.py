"""Pictures of an index that look the same to its model."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from hqclip_jax.index.store import Index

NEIGHBOURS = 8  # that are looked at for each picture; larger groups hang together by them
ROWS = 1024  # pictures that are compared at a time


def duplicates(
    index: Index, above: float, advance: Callable[[int], None] = lambda n: None
) -> list[list[tuple[int, float]]]:
    """Groups of pictures that are linked by cosines of at least `above`, largest first.

    Args:
        index: of N pictures; each is compared with all, so it takes N² · D multiplications, or
            less with faiss.
        above: the least cosine.
        advance: called with the number of pictures that were just compared.

    Returns:
        for each group its rows, in order, with their highest cosine to another one of it.
    """
    leader = np.arange(len(index))
    highest: dict[int, float] = defaultdict(float)

    def lead(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return int(row)

    for start in range(0, len(index), ROWS):
        block = index.vectors[start : start + ROWS]
        similarity, near = index.nearest(block, NEIGHBOURS)
        for i, j in zip(*np.nonzero(similarity >= above)):
            one, other, cosine = start + int(i), int(near[i, j]), float(similarity[i, j])
            if one != other:
                low, high = sorted((lead(one), lead(other)))
                leader[high] = low
                for row in (one, other):
                    highest[row] = max(highest[row], cosine)
        advance(len(block))
    groups = defaultdict(list)
    for row in sorted(highest):
        groups[lead(row)].append((row, highest[row]))
    return sorted(groups.values(), key=len, reverse=True)
