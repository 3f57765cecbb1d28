"""Fine-tuning for real, of the smallest model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refine.__main__ import main
from refine.teaching.sft_trainer import forget, last_checkpoint

ROOT = Path(__file__).parents[3]
TEXTS = {
    "desc": ["a red apple on a tray"], "neg_desc": ["a green pear on a tray"],
    "tags": ["red apple"], "neg_tags": ["green pear"],
}  # fmt: skip


def test_the_last_whole_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((90, '{"global_step": 90}'), (100, '{"global_step": 100}'), (110, '{"glo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-120").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_figures_after_the_checkpoint_are_forgotten(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"st')
    forget(metrics, 20)
    assert metrics.read_text() == '{"step": 10}\n{"step": 20}\n'
    forget(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from refine.teaching.tiny import make_tiny

    directory = tmp_path_factory.mktemp("base") / "base"
    make_tiny(directory, texts=[json.dumps(TEXTS, separators=(",", ":"))])
    return directory


@pytest.fixture
def data(make, tmp_path) -> Path:
    """48 noisy pictures of which the teacher always says the same."""
    make.pairs(tmp_path / "pairs.tar", range(48))
    members = [(f"000000/{make.uid(n)}.json", json.dumps(TEXTS).encode()) for n in range(48)]
    make.tar(tmp_path / "annotations.tar", members)
    options = ["--annotations", tmp_path / "annotations.tar", "--output", tmp_path / "data"]
    arguments = ["run", "--engine=annotations", "--input", tmp_path / "pairs.tar", *options]
    assert not main([*map(str, arguments), "--workers=1"])
    return tmp_path / "data"


def arguments(base: Path, data: Path, output: Path, **options: object) -> list[str]:
    chosen = {
        "model": base, "data": data, "output": output, "batch": 8, "lr": 3e-3, "epochs": 4,
        "max-pixels": 4096, "held-out": 0.2, "examples": 4, "max-tokens": 64,
        "checkpoint-every": 5,
    } | options  # fmt: skip
    return ["sft", *(f"--{name}={value}" for name, value in chosen.items())]


def weights(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.lvlm
def test_a_student_learns_its_answer_and_is_a_model(base, data, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "student"
    assert main(arguments(base, data, out, epochs=14)) == 0
    result = json.loads((out / "sft.json").read_text())
    assert result["exam"]["valid"] == result["exam"]["asked"] == 4
    assert json.loads(result["exam"]["sample"][0]) == TEXTS
    assert result["trained_on"] + result["held_out"] == 48
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.1 < 1 < losses[0]
    assert result["held_out_loss"] < 0.1
    assert not (out / "checkpoints").exists()
    assert AutoProcessor.from_pretrained(out).chat_template
    AutoModelForImageTextToText.from_pretrained(out)


@pytest.mark.lvlm
def test_low_rank_additions_are_merged_into_the_language_model(base, data, tmp_path):
    out = tmp_path / "student"
    assert main(arguments(base, data, out, method="lora")) == 0
    before, after = weights(base), weights(out)
    assert set(before) == set(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "visual" not in name and "_proj.weight" in name}
    assert not (out / "adapter_config.json").exists()


@pytest.mark.lvlm
def test_a_student_has_the_precision_of_its_base(base, data, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    half, out = tmp_path / "half", tmp_path / "student"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(half)
    AutoProcessor.from_pretrained(base).save_pretrained(half)
    assert main(arguments(half, data, out, epochs=1)) == 0
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.lvlm
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_training_ends_where_one_that_was_not_does(method, base, data, tmp_path):
    """Also in the figures that it wrote; and it takes no other course on its way."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "refine", *arguments(base, data, output, method=method)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(killed)
    deadline = time.monotonic() + 300
    while last_checkpoint(killed / "checkpoints") is None:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "sft.json").exists()
    assert main(arguments(base, data, killed, method=method, lr=1e-3)) == 2
    for output in (killed, whole):
        process = start(output)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told.decode()[-3000:]
    one, other = weights(killed), weights(whole)
    assert all(np.array_equal(one[name], other[name]) for name in other)
    steps = [[json.loads(r)["step"] for r in (o / "metrics.jsonl").open()] for o in (killed, whole)]
    assert steps[0] == steps[1]


@pytest.mark.lvlm
def test_two_processes_learn_what_one_does(base, data, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for output, launcher in (
        ("one", ["-m"]),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]),
    ):
        options = {"epochs": 1, "examples": 1, "micro-batch": 4}
        command = [*launcher, "refine", *arguments(base, data, tmp_path / output, **options)]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights(base)
    assert all(np.allclose(one[name], two[name], atol=1e-4) for name in start)
    assert not any(np.allclose(one[n], start[n], atol=1e-4) for n in start if "q_proj.weight" in n)
