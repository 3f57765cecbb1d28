"""Candidates for the nearest of many vectors without reading them all, by the library faiss.

It is optional (`pip install faiss-cpu`): without it all vectors are read, and the answer is exact.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

FILE = "nearest.faiss"
FROM = 200_000  # vectors; below, reading all takes well under a second
# Of the cells, how many a query looks into. A text lies far from all pictures, so that many cells
# are about as near: a few dozen, enough among pictures, found two thirds of its neighbours.
PROBED = 1 / 4
CANDIDATES = 2  # times what is asked for: the cells hold 16-bit vectors, and the caller ranks anew
TRAINING = 64  # vectors per cell, from which the cells' centres are made


def available() -> bool:
    return importlib.util.find_spec("faiss") is not None


def wanted(count: int) -> bool:
    """Whether an index of so many vectors gets the file."""
    return count >= FROM and available()


def build(vectors: np.ndarray, path: Path) -> None:
    """Writes an inverted file: cells around 4 √N centres, each with the vectors nearest to it.

    Args:
        vectors: f16 [N, D], of unit length; may be memory-mapped, and is read in chunks.
        path: of the file.
    """
    import faiss

    count, dim = vectors.shape
    cells = round(4 * math.sqrt(count))
    index = faiss.index_factory(dim, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    chosen = np.random.default_rng(0).choice(count, min(count, TRAINING * cells), replace=False)
    index.train(vectors[np.sort(chosen)].astype(np.float32))
    for start in range(0, count, 2**16):
        index.add(vectors[start : start + 2**16].astype(np.float32))
    faiss.write_index(index, str(path))


def load(path: Path) -> Any:
    """The file memory-mapped: a query reads its own cells only."""
    import faiss

    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    index.nprobe = math.ceil(PROBED * index.nlist)
    return index


def candidates(index: Any, z_qxD: np.ndarray, k: int) -> np.ndarray:
    """Rows that are probably the nearest, int64 [q, CANDIDATES · k]; -1 where cells had no more."""
    return index.search(np.ascontiguousarray(z_qxD, np.float32), CANDIDATES * k)[1]
