import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> str:
    """A command of ours, compiled as a user's would be and not in a second."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_clip_benchmark_scores_a_trained_model_alike(real_data, tmp_path):
    """Three epochs on photos of groceries, exported, in OpenCLIP and CLIP_benchmark."""
    pairs = real_data / "grocery" / "pairs" / "train"
    annotations = real_data / "grocery" / "annotations" / "train"
    run(
        "refine", "run", "--engine=annotations", f"--input={pairs}",
        f"--annotations={annotations}", f"--output={tmp_path / 'data'}",
    )  # fmt: skip
    run(
        "hqclip_jax.train", "--config=configs/grocery.py:3 epochs", f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'data'}",
    )  # fmt: skip
    told = run("bench.agreement", f"--checkpoint={tmp_path / 'run'}", f"--data={real_data}")
    found = json.loads(told.splitlines()[-1])
    assert found["zero_shot"]["images"] == 2485
    assert found["zero_shot"]["top1"] > 3 / 81  # it has learned
    assert found["zero_shot"]["top1_other_answers"] == 0
    assert found["zero_shot"]["top5_other_answers"] == 0
    assert found["retrieval"]["recalls_compared"] == 2 * 47
    assert found["retrieval"]["largest_recall_gap"] < 1e-6
    assert found["sugarcrepe"]["items"] == 44
    assert found["sugarcrepe"]["largest_gap"] < 1e-6
