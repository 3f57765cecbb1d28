"""Does the approximate index find what reading all vectors finds, and what does either cost?

    python -m bench.search [--count=300000] [--dim=128] [--queries=500]

Unit vectors around random centres, at several spreads: the wider, the less there is to tell
neighbours by. Needs faiss-cpu. Queries come one by one, as a user's do, from the page cache. Prints,
last, one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hqclip_jax.index import approximate
from hqclip_jax.index.folder import Picture
from hqclip_jax.index.store import VECTORS, About, Index, Model, write_snapshot

CENTRES, K = 3000, 10
SPREADS = (0.5, 1.0, 2.0)  # deviation of a number of a vector, over that of a centre


def clustered(rng: np.random.Generator, centres: np.ndarray, n: int, spread: float) -> np.ndarray:
    z_nxD = centres[rng.integers(len(centres), size=n)]
    z_nxD = z_nxD + spread * rng.standard_normal(z_nxD.shape, np.float32)
    return z_nxD / np.linalg.norm(z_nxD, axis=1, keepdims=True)


def timed(call: Callable, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows [q, K], and milliseconds for each query alone."""
    call(queries[:1])
    began = time.perf_counter()
    rows = np.concatenate([call(z[None])[1] for z in queries])
    return rows, 1e3 * (time.perf_counter() - began) / len(queries)


def measure(folder: Path, count: int, dim: int, queries: int, spread: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dim), np.float32)
    z_nxD = clustered(rng, centres, count, spread).astype(np.float16)
    z_qxD = clustered(rng, centres, queries, spread)
    pictures = (Picture(f"{i:07}.jpg", 1, 1, "", 0, 1) for i in range(count))
    approximate.FROM, threshold = count + 1, approximate.FROM
    began = time.perf_counter()
    write_snapshot(folder / "000001", zip(pictures, z_nxD), count, dim)
    written = time.perf_counter() - began
    approximate.FROM = threshold
    About("/", replace(MODEL, dim=dim), count, snapshot="000001").write(folder)

    index = Index.open(folder)
    exact, exact_ms = timed(lambda z: index.nearest(z, K), z_qxD)
    file = folder / "000001" / approximate.FILE
    began = time.perf_counter()
    approximate.build(index.vectors, file)
    built = time.perf_counter() - began
    began = time.perf_counter()
    index = Index.open(folder)
    index.nearest(z_qxD[:1], K)
    opened = time.perf_counter() - began
    found, found_ms = timed(lambda z: index.nearest(z, K), z_qxD)
    recall = np.mean([len({*a} & {*b}) / K for a, b in zip(found, exact)])
    return {
        "recall_at_10": float(recall),
        "first_is_first": float(np.mean(found[:, 0] == exact[:, 0])),
        "exact_ms": exact_ms,
        "faiss_ms": found_ms,
        "faiss_open_and_first_query_ms": 1e3 * opened,
        "write_s": written,
        "faiss_build_s": built,
        "vectors_mb": (folder / "000001" / VECTORS).stat().st_size / 1e6,
        "faiss_mb": file.stat().st_size / 1e6,
    }


MODEL = Model("bench", 0, "params", "none", 0, "0" * 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=500)
    args = parser.parse_args()
    figures = {}
    for spread in SPREADS:
        with TemporaryDirectory() as folder:
            found = measure(Path(folder), args.count, args.dim, args.queries, spread)
        figures[f"spread_{spread}"] = {name: round(value, 4) for name, value in found.items()}
        print(spread, found)
    print(json.dumps({"count": args.count, "dim": args.dim} | figures))


if __name__ == "__main__":
    main()
