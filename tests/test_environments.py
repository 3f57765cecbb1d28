"""Each half of the repository runs where the other's packages are not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""
HEAVY = {"torch", "torchvision", "tensorflow", "vllm", "ray"}


def run_blocked(blocked: set[str], program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + program],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_block_blocks():
    with pytest.raises(AssertionError, match="blocked"):
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
from hqclip_jax.checkpoint import restore_model
print("trained to", restore_model({str(tmp_path)!r}).step)
"""
    assert "trained to 2" in run_blocked(HEAVY, program)


def test_every_training_module_imports_without_the_refinement_packages():
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "hqclip_jax").rglob("*.py"))
        if p.name != "__init__.py"
    ]
    program = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(len({names!r}))"
    assert int(run_blocked(HEAVY | {"transformers"}, program)) > 20


def test_every_refinement_module_imports_without_jax():
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "refine").rglob("*.py"))
        if p.name not in ("__init__.py", "__main__.py")
    ]
    program = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(len({names!r}))"
    jax = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}
    assert int(run_blocked(HEAVY | jax, program)) > 5
