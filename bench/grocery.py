"""What do the three recipes reach on real photos? Refine, train and evaluate on the grocery set.

    python -m bench.grocery --data=DIR --out=DIR [--seeds=3] [--length="8 epochs"]

DIR holds `pairs/train`, `annotations/train` and `zeroshot`. Each training runs alone, by the same
commands a user types, and started again the bench continues where it was.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from scipy.stats import t

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
    (scores,) = json.loads((run / "eval" / "results.json").read_text())["results"].values()
    found = {"top1": scores["top1"], "top5": scores["top5"], "train_s": seconds}
    finished.write_text(json.dumps(found))
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """Mean over seeds with a 95% t interval of the mean, in percent."""
    top1 = [100 * run["top1"] for run in runs]
    mean = sum(top1) / len(top1)
    found = {"top1": round(mean, 1), "runs": [round(x, 1) for x in top1]}
    if len(top1) > 1:
        deviation = math.sqrt(sum((x - mean) ** 2 for x in top1) / (len(top1) - 1))
        half = t.ppf(0.975, len(top1) - 1) * deviation / math.sqrt(len(top1))
        found["interval95"] = [round(mean - half, 1), round(mean + half, 1)]
    found["top5"] = round(100 * sum(run["top5"] for run in runs) / len(runs), 1)
    found["train_s"] = round(sum(run["train_s"] for run in runs) / len(runs))
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
    print(json.dumps({recipe: summary(found) for recipe, found in runs.items()}))


if __name__ == "__main__":
    main()
