import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hqclip_jax import train as train_lib
from hqclip_jax.checkpoint import Checkpoints, restore_model
from hqclip_jax.telemetry import read_metrics
from tests.conftest import CPU_FLAGS

ROOT = Path(__file__).parent.parent
SMALL = {
    "optim.batch": 8, "optim.warmup": "2 steps", "model.image_size": 16, "model.context_length": 12,
    "mesh.fsdp": 8, "log.every": "1 steps", "checkpoint.every": "2 steps", "data.threads": 1,
}  # fmt: skip


def arguments(dataset: Path, workdir: Path, duration: str, **overrides) -> list[str]:
    fields = SMALL | {"data.path": dataset, "optim.duration": duration} | overrides
    return [f"--config={ROOT / 'configs' / 'demo.py'}", f"--workdir={workdir}"] + [
        f"--config.{name}={value}" for name, value in fields.items()
    ]


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    assert train_lib.main(arguments(dataset, workdir, "6 steps")) == 0
    return workdir


def params(workdir: Path) -> list[np.ndarray]:
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(restore_model(workdir).params)]


def test_metrics_of_every_report(unbroken):
    rows = read_metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss", "loss/contrastive", "loss/hni", "loss/tag", "accuracy", "hni_accuracy",
        "tag_recall", "logit_scale", "neg_share", "grad_norm/visual", "grad_norm/text", "lr",
        "images_per_s", "data_wait", "samples", "epoch", "replaced", "skipped", "streak",
    } <= rows[0].keys()  # fmt: skip
    assert all(row["tflops_per_chip"] > 0 for row in rows[1:])  # the first step compiles
    assert "mfu" not in rows[-1]  # a CPU has no published peak
    assert rows[-1]["samples"] == 48 and rows[-1]["epoch"] == 0.8
    assert all(
        row["loss"]
        == pytest.approx(sum(row[f"loss/{p}"] for p in ("contrastive", "hni", "tag")), rel=1e-4)
        for row in rows
    )
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_workdir_holds_what_a_run_leaves(unbroken):
    config = json.loads((unbroken / "config.json").read_text())
    assert config["optim"]["batch"] == 8
    assert list((unbroken / "tensorboard").glob("events*"))
    checkpoints = Checkpoints(unbroken, read_only=True)
    assert checkpoints.latest() == 6
    info = checkpoints.info(6)
    assert info.position == {"train": 48} and info.seconds > 0
    assert info.tags.tags[0] == "picture"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_equals_the_unbroken_run(
    dataset, unbroken, tmp_path, monkeypatch, stop
):
    """The signal comes in step 3, between two periodic checkpoints."""
    real = train_lib.to_device
    seen = []

    def to_device(*args):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), stop)
        return real(*args)

    command = arguments(dataset, tmp_path, "6 steps")
    monkeypatch.setattr(train_lib, "to_device", to_device)
    assert train_lib.main(command) == 128 + stop
    assert Checkpoints(tmp_path, read_only=True).latest() == 3
    assert train_lib.main(command) == 0
    keep = lambda rows: [
        {k: v for k, v in r.items() if k not in ("images_per_s", "tflops_per_chip", "data_wait")}
        for r in rows
    ]
    assert keep(read_metrics(tmp_path)) == keep(read_metrics(unbroken))
    for a, b in zip(params(tmp_path), params(unbroken)):
        np.testing.assert_array_equal(a, b)


def test_a_killed_run_continues_from_its_last_checkpoint(dataset, unbroken, tmp_path):
    """kill −9 in step 6: the finished checkpoint of step 4 is what is left."""
    program = f"""
import os, signal
from hqclip_jax import train
real, seen = train.to_device, []
def to_device(*args):
    seen.append(1)
    if len(seen) == 6:
        import time
        while not os.path.exists({str(tmp_path / "checkpoints" / "4")!r}):
            time.sleep(0.01)  # the save runs in the background; its end is what we wait for
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.to_device = to_device
train.main({arguments(dataset, tmp_path, "6 steps")!r})
"""
    alike = os.environ | {"XLA_FLAGS": CPU_FLAGS}  # other code would round otherwise
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=200, env=alike)
    assert killed.returncode == -signal.SIGKILL
    assert Checkpoints(tmp_path, read_only=True).latest() == 4
    assert train_lib.main(arguments(dataset, tmp_path, "6 steps")) == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path)[-1]["loss"] == read_metrics(unbroken)[-1]["loss"]
    for a, b in zip(params(tmp_path), params(unbroken)):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_started_again_does_nothing(dataset, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    assert train_lib.main(arguments(dataset, tmp_path / "run", "6 steps")) == 0
    assert len(read_metrics(tmp_path / "run")) == 6


def test_another_mesh_trains_alike(dataset, unbroken, tmp_path):
    mesh = {"mesh.fsdp": 4, "mesh.tensor": 2}
    assert train_lib.main(arguments(dataset, tmp_path, "2 steps", **mesh)) == 0
    # Only the first step: the learning rate of the second depends on the run's length.
    found, expected = read_metrics(tmp_path)[0], read_metrics(unbroken)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def error_of(capsys: pytest.CaptureFixture, command: list[str]) -> str:
    assert train_lib.main(command) == 2
    return capsys.readouterr().err


def test_wrong_key_is_refused_before_anything_is_written(dataset, tmp_path, capsys):
    workdir = tmp_path / "run"
    command = arguments(dataset, workdir, "1 steps", **{"optim.lrate": 1})
    assert "unknown config field 'optim.lrate': did you mean 'optim.lr'?" in error_of(
        capsys, command
    )
    assert not workdir.exists()


def test_batch_that_does_not_fit_the_devices(dataset, tmp_path, capsys):
    command = arguments(dataset, tmp_path / "run", "1 steps", **{"optim.batch": 12})
    assert "optim.batch=12 is not divisible" in error_of(capsys, command)


def test_data_path_must_be_set(dataset, tmp_path, capsys):
    command = arguments(dataset, tmp_path / "run", "1 steps", **{"data.path": ""})
    assert "data.path is not set" in error_of(capsys, command)


def test_missing_and_truncated_shards_are_refused_at_start(dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "data")
    shard = sorted(copy.glob("*array_record*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert "truncated" in error_of(capsys, arguments(copy, tmp_path / "run", "1 steps"))
    shard.unlink()
    assert "is missing" in error_of(capsys, arguments(copy, tmp_path / "run", "1 steps"))
    missing = error_of(capsys, arguments(tmp_path / "no", tmp_path / "run", "1 steps"))
    assert "set --config.data.path" in missing or "tag_counts.json is missing" in missing


def test_checkpoint_of_another_architecture_is_refused(dataset, unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    command = arguments(dataset, tmp_path / "run", "8 steps", **{"model.image_size": 24})
    assert "model.image_size is 16 there, 24 here" in error_of(capsys, command)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_saved(dataset, tmp_path, capsys):
    command = arguments(dataset, tmp_path, "9 steps", **{"optim.lr": 1e30, "optim.max_skipped": 3})
    assert train_lib.main(command) == 1
    error = capsys.readouterr().err
    assert re.search(r"the last 3 updates up to step \d were skipped.*Lower optim\.lr", error)
    assert read_metrics(tmp_path)[-1]["streak"] == 3
    # What was saved since is sound: no skipped update is in it.
    params = restore_model(tmp_path).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_that_had_stopped_itself_counts_anew_when_it_is_started_again(dataset, tmp_path):
    fields = {
        "optim.lr": 1e30, "optim.max_skipped": 2, "log.every": "7 steps",
        "checkpoint.every": "3 steps",
    }  # fmt: skip
    streaks = []
    for _ in range(2):
        assert train_lib.main(arguments(dataset, tmp_path, "9 steps", **fields)) == 1
        streaks.append([(row["step"], row["streak"]) for row in read_metrics(tmp_path)])
    assert streaks[0][-1][0] == 7 and streaks[0][-1][1] > 2
    assert streaks[1] == [(7, 1), (9, 3)]


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_lib.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--config.loss.hni=1.0" in out and "[inferred]" in out


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2], ids=["rows apart", "the same rows, layers shared"])
def test_two_processes_equal_one(dataset, tmp_path, tensor):
    """Two real processes over loopback, started as Slurm would; then one with two devices."""
    mesh = {"mesh.fsdp": 1, "mesh.tensor": tensor}
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    base = os.environ | {
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    command = [sys.executable, "-m", "hqclip_jax.train", "--distributed"]
    command += arguments(dataset, tmp_path / "two", "4 steps", **mesh)
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=base | {"SLURM_PROCID": str(rank), "XLA_FLAGS": ""},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, error = rank.communicate(timeout=400)
        assert rank.returncode == 0, error[-3000:]
    one = [sys.executable, "-m", "hqclip_jax.train"]
    one += arguments(dataset, tmp_path / "one", "4 steps", **mesh)
    two_devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run(one, cwd=ROOT, check=True, env=two_devices, timeout=400)
    found, expected = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    checkpoints = Checkpoints(tmp_path / "two", read_only=True)
    assert checkpoints.info(4).position == {"train": 32}
