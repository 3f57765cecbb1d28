"""What do the ranks of retrieval cost beside the product of the embeddings, and in memory?

    python -m bench.retrieval [--images 5000] [--captions 5] [--dim 512] [--repeats 3]

Both ways over random unit vectors, against one bare product of all images with all captions, in
numpy, in the same process; both ways take two such products. Memory is what is held at most beyond
the embeddings, at this size and with ten times the captions.
Prints, last, one JSON object.
"""

import argparse
import json
import statistics
import time
import tracemalloc

import numpy as np

from hqclip_jax.evals.retrieval import retrieval_ranks


def embeddings(
    args: argparse.Namespace, captions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    zimg = rng.normal(size=(args.images, args.dim)).astype(np.float32)
    owner = np.repeat(np.arange(args.images), captions)
    ztxt = zimg[owner]
    ztxt += 2 * rng.standard_normal(ztxt.shape, np.float32)
    for z in (zimg, ztxt):
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    return zimg, ztxt, owner


def times(args: argparse.Namespace) -> dict:
    zimg, ztxt, owner = embeddings(args, args.captions)
    turns = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        zimg @ ztxt.T
        product = time.perf_counter() - began
        began = time.perf_counter()
        retrieval_ranks(zimg, ztxt, owner)
        turns.append((time.perf_counter() - began, product))
    ratios = [ranks / product for ranks, product in turns]
    return {
        "ratio_to_matmul": statistics.median(ratios),
        "ratios": [round(r, 2) for r in ratios],
        "seconds": [[round(s, 2) for s in turn] for turn in turns],
    }


def memory(args: argparse.Namespace, captions: int) -> float:
    """MiB at most, beyond the embeddings."""
    data = embeddings(args, captions)
    tracemalloc.start()
    retrieval_ranks(*data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="per image")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    figures = times(args)
    for captions in (args.captions, 10 * args.captions):
        figures[f"mib_at_{args.images}x{args.images * captions}"] = round(memory(args, captions))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
