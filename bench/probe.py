"""How long does a linear probe take beside scikit-learn's, and do both reach one accuracy?

    python -m bench.probe [--rows=4000] [--width=512] [--classes=81] [--data=DIR]

Features are unit vectors about one centre for each class; or, with DIR a folder in CLIP_benchmark's
layout, random features of its `test` photos, half of which are then trained on. Both solvers get
the same features and the same penalties, scikit-learn at its own tolerance and at one that it
reaches the optimum with, and with one thread: more of them wait for one another where other work
runs. Prints, last, one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from hqclip_jax.config import MeshConfig
from hqclip_jax.data.image import eval_transform
from hqclip_jax.evals.classification import ClassificationFolder
from hqclip_jax.evals.logistic import Regression
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.probe import best_penalty
from hqclip_jax.sharding import make_mesh

PENALTIES = (1.0, 1e-2, 1e-4)
TOLERANCES = {"sklearn": 1e-4, "sklearn_tight": 1e-7}


def mixture(n: int, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """In a narrow cone, as CLIP's embeddings are."""
    rng = np.random.default_rng(0)
    centres = 3 + rng.normal(size=(classes, width))
    label_n = np.arange(n) % classes
    return centres[label_n] + 5 * rng.normal(size=(n, width)), label_n


def photos(folder: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rectified random projections of small pictures: of some use, as a poor tower's features."""
    examples = list(ClassificationFolder.open(folder).examples(Skips()))
    x = np.stack([eval_transform(e.rgb(), 24) for e in examples]).reshape(len(examples), -1) / 255
    rng = np.random.default_rng(0)
    projected = (x - x.mean(axis=0)) @ rng.normal(size=(x.shape[1], width))
    order = rng.permutation(len(x))
    return np.maximum(projected, 0)[order], np.array([e.label for e in examples])[order]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4000, help="to train on; as many are tested on")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=81)
    parser.add_argument("--data", help="folder of photos, in place of drawn features")
    args = parser.parse_args()
    if args.data:
        z, labels = photos(args.data, args.width)
    else:
        z, labels = mixture(2 * args.rows, args.classes, args.width)
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    classes, n = int(labels.max()) + 1, len(z) // 2
    train, test = (z[:n], labels[:n]), (z[n:], labels[n:])
    mesh = make_mesh(MeshConfig(), len(jax.devices()))
    regression = Regression(*train, classes, mesh)
    _, first = timed(lambda: regression.fit(PENALTIES[0]))

    def accuracy(logits: np.ndarray) -> float:
        return 100 * float((logits.argmax(axis=1) == test[1]).mean())

    found: dict[str, Any] = {"rows": n, "width": args.width, "classes": classes}
    found["devices"], found["first_fit_with_compile_s"] = len(jax.devices()), first
    for penalty in PENALTIES:
        ours, seconds = timed(lambda p=penalty: regression.fit(p))
        row = {"ours_s": seconds, "ours": accuracy(ours.logits(test[0]))}
        row |= {"ours_steps": ours.steps, "ours_gradient": ours.gradient}
        for name, tolerance in TOLERANCES.items():
            peer = LogisticRegression(C=1 / penalty, tol=tolerance, max_iter=1000)
            with threadpool_limits(1):
                _, row[f"{name}_s"] = timed(lambda p=peer: p.fit(*train))
            row[name] = accuracy(peer.decision_function(test[0]))
            row[f"{name}_steps"] = int(peer.n_iter_[0])
        found[f"penalty_{penalty:g}"] = row
        print(penalty, row, flush=True)
    _, found["search_of_15_fits_s"] = timed(
        lambda: best_penalty(lambda p: accuracy(regression.fit(p).logits(test[0])))
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
