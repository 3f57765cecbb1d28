"""Each half of the repository runs where the other's packages are not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK = """
import importlib.machinery, sys

class Absent(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {blocked!r}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Absent if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
sys.modules.pop("json", None)
"""
HEAVY = {"torch", "torchvision", "tensorflow", "vllm", "ray"}


def run_blocked(blocked: set[str], program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + program],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_block_blocks():
    with pytest.raises(AssertionError, match="No module named 'json'"):
        run_blocked({"json"}, "import json")


def test_training_and_evaluation_without_torch_tensorflow_and_vllm(dataset, tmp_path):
    program = f"""
from hqclip_jax import train, evaluate
status = train.main([
    "--config=configs/demo.py", "--workdir={tmp_path}", "--config.data.path={dataset}",
    "--config.optim.batch=8", "--config.optim.duration=2 steps", "--config.model.image_size=16",
    "--config.model.context_length=12", "--config.data.threads=1",
])
assert status == 0
from hqclip_jax.restore import restore_model
print("trained to", restore_model({str(tmp_path)!r}).step)
"""
    assert "trained to 2" in run_blocked(HEAVY, program)


def import_all(package: str, blocked: set[str]) -> int:
    """Imports every module of a package; returns how many there are."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / package).rglob("*.py"))
        if p.stem not in ("__init__", "__main__")
    ]
    program = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
print({len(names)})
"""
    return int(run_blocked(blocked, program))


def test_every_training_module_imports_without_the_refinement_packages():
    assert import_all("hqclip_jax", HEAVY | {"transformers"}) > 20


def test_every_refinement_module_imports_without_jax():
    assert import_all("refine", HEAVY | {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}) > 5
