"""Does the approximate index find what reading all vectors finds, and what does either cost?

    python -m bench.search [--count=300000] [--dim=128] [--queries=200]

Unit vectors around random centres, at several spreads: the wider, the less there is to tell
neighbours by. Queries are more of them ("near"), or such with a direction laid on that no vector of
the index has ("apart"), as texts lie apart from pictures in CLIP's space. They come one by one, as
a user's do, from the page cache. Needs faiss-cpu. Prints, last, one JSON object.
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
MODEL = Model("bench", 0, "params", "none", 0, "0" * 12)
SPREADS = (0.5, 1.0, 2.0)  # deviation of a number of a vector, over that of a centre


def clustered(rng: np.random.Generator, centres: np.ndarray, n: int, spread: float) -> np.ndarray:
    z_nxD = centres[rng.integers(len(centres), size=n)]
    z_nxD = z_nxD + spread * rng.standard_normal(z_nxD.shape, np.float32)
    return z_nxD / np.linalg.norm(z_nxD, axis=1, keepdims=True)


def apart(rng: np.random.Generator, z_qxD: np.ndarray) -> np.ndarray:
    """At cosines of about 0.3 at most to what was near, a text's with its picture."""
    common = rng.standard_normal(z_qxD.shape[1], np.float32)
    moved = 0.3 * z_qxD + 0.95 * common / np.linalg.norm(common)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


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
    near = clustered(rng, centres, queries, spread)
    asked = {"near": near, "apart": apart(rng, near)}
    pictures = (Picture(f"{i:07}.jpg", 1, 1, "", 0, 1) for i in range(count))
    approximate.FROM, threshold = count + 1, approximate.FROM
    began = time.perf_counter()
    write_snapshot(folder / "000001", zip(pictures, z_nxD), count, dim)
    written = time.perf_counter() - began
    approximate.FROM = threshold
    About("/", replace(MODEL, dim=dim), count, snapshot="000001").write(folder)

    def answered() -> tuple[dict[str, np.ndarray], dict[str, float]]:
        index = Index.open(folder)
        rows = {kind: timed(lambda z: index.nearest(z, K), z) for kind, z in asked.items()}
        return {k: r for k, (r, _) in rows.items()}, {k: ms for k, (_, ms) in rows.items()}

    exact, exact_ms = answered()
    file = folder / "000001" / approximate.FILE
    began = time.perf_counter()
    approximate.build(Index.open(folder).vectors, file)
    figures = {"write_s": written, "faiss_build_s": time.perf_counter() - began}
    began = time.perf_counter()
    Index.open(folder).nearest(near[:1], K)
    figures["faiss_open_and_first_query_ms"] = 1e3 * (time.perf_counter() - began)
    found, found_ms = answered()
    for kind in asked:
        pairs = zip(found[kind], exact[kind])
        figures |= {
            f"recall_at_10_{kind}": float(np.mean([len({*a} & {*b}) / K for a, b in pairs])),
            f"first_is_first_{kind}": float(np.mean(found[kind][:, 0] == exact[kind][:, 0])),
            f"exact_ms_{kind}": exact_ms[kind],
            f"faiss_ms_{kind}": found_ms[kind],
        }
    figures["vectors_mb"] = (folder / "000001" / VECTORS).stat().st_size / 1e6
    figures["faiss_mb"] = file.stat().st_size / 1e6
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=200)
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
