"""What do the three recipes reach on real photos? Refine, train and evaluate on the grocery set.

    python -m bench.grocery --data=DIR --out=DIR [--seeds=3] [--length="8 epochs"]

DIR holds `pairs/train`, `annotations/train` and `zeroshot`. Each training runs alone, by the same
commands a user types, and started again the bench continues where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

RECIPES = {
    "alt_text": {"data.p_desc": 0, "loss.hni": 0, "loss.tag": 0},
    "descriptions": {"data.p_desc": 0.5, "loss.hni": 0, "loss.tag": 0},
    "losses": {"data.p_desc": 0.5, "loss.hni": 1, "loss.tag": 1},
}


def command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def score(data: Path, out: Path, length: str, recipe: str, seed: int) -> dict[str, float]:
    """Trains one recipe with one seed and returns its zero-shot scores and seconds."""
    run = out / f"{recipe}-{seed}"
    finished = run / "score.json"
    if finished.exists():
        return json.loads(finished.read_text())
    fields = RECIPES[recipe] | {"data.path": out / "data", "seed": seed}
    started = time.monotonic()
    command(
        "hqclip_jax.train", f"--config=configs/grocery.py:{length}", f"--workdir={run}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )  # fmt: skip
    seconds = time.monotonic() - started
    command(
        "hqclip_jax.evaluate", f"--checkpoint={run}", f"--suite={data / 'zeroshot'}",
        f"--out={run / 'eval'}",
    )  # fmt: skip
    (result,) = json.loads((run / "eval" / "results.json").read_text())["results"].values()
    scores = result["scores"]
    found = {"top1": scores["top1"], "top5": scores["top5"], "train_s": seconds}
    finished.write_text(json.dumps(found))
    return found


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """Means over seeds in percent, with 95% intervals of the mean.

    The deviation between seeds is pooled over the recipes: a few seeds say little of each alone.
    """
    top1 = {
        recipe: np.array([100 * run["top1"] for run in found]) for recipe, found in runs.items()
    }
    freedom = sum(len(x) - 1 for x in top1.values())
    squares = sum(((x - x.mean()) ** 2).sum() for x in top1.values())
    found = {}
    for recipe, x in top1.items():
        row = {"top1": round(float(x.mean()), 1), "runs": [round(v, 1) for v in x.tolist()]}
        if freedom:
            half = stats.t.ppf(0.975, freedom) * (squares / freedom / len(x)) ** 0.5
            row["interval95"] = [round(float(v), 1) for v in (x.mean() - half, x.mean() + half)]
        for key, scale in (("top5", 100), ("train_s", 1)):
            row[key] = round(scale * float(np.mean([run[key] for run in runs[recipe]])), 1)
        found[recipe] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", default="8 epochs")
    args = parser.parse_args()
    command(
        "refine", "run", "--engine=annotations", f"--input={args.data / 'pairs' / 'train'}",
        f"--annotations={args.data / 'annotations' / 'train'}", f"--output={args.out / 'data'}",
        "--name=grocery",
    )  # fmt: skip
    runs = {recipe: [] for recipe in RECIPES}
    for seed in range(args.seeds):
        for recipe in RECIPES:
            runs[recipe].append(score(args.data, args.out, args.length, recipe, seed))
        print(json.dumps(summary(runs)))


if __name__ == "__main__":
    main()
