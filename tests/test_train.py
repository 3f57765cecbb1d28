import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from hqclip_jax import train as train_lib
from hqclip_jax.checkpoint import Checkpoints
from hqclip_jax.config import load
from hqclip_jax.data.pipeline import Pipeline
from hqclip_jax.data.record import DatasetError
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.lease import Lease
from hqclip_jax.restore import restore_model
from hqclip_jax.telemetry import read_metrics
from tests.conftest import CPU_FLAGS, make_record

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


def pipeline_of(dataset: Path, **position: int) -> Pipeline:
    """What the runs here read."""
    overrides = {k: str(v) for k, v in (SMALL | {"data.path": dataset}).items()}
    config = load(f"{ROOT / 'configs' / 'demo.py'}", overrides)
    return Pipeline(config, ClipTokenizer(12), None, position)


def params(workdir: Path) -> list[np.ndarray]:
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(restore_model(workdir).params)]


def test_metrics_of_every_report(unbroken):
    rows = read_metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {
        "loss", "loss/contrastive", "loss/hni", "loss/tag", "accuracy", "hni_accuracy",
        "tag_recall", "logit_scale", "neg_share", "grad_norm/visual", "grad_norm/text", "lr",
        "samples", "samples/train", "epoch/train", "replaced", "replaced/image", "text_cut",
        "skipped", "streak", "seconds", "time/step", "time/data", "time/compile",
    } <= rows[0].keys()  # fmt: skip
    speed = {"images_per_s", "images_per_s_per_chip", "tflops_per_chip", "data_wait"}
    assert not speed & rows[0].keys()  # the first step compiles
    assert all(row["tflops_per_chip"] > 0 and speed <= row.keys() for row in rows[1:])
    assert "mfu" not in rows[-1]  # a CPU has no published peak
    assert rows[-1]["samples"] == 48 and rows[-1]["epoch/train"] == 0.8
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
    assert info.position == {"train": 48} and info.timers["compile"] > 0
    assert info.records == {"train": 60}
    assert info.tags.tags[0] == "picture"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_equals_the_unbroken_run(
    dataset, unbroken, tmp_path, monkeypatch, stop
):
    """The signal comes in step 3, between two periodic checkpoints."""
    real, seen = train_lib.send, []

    def send(*args, **told):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), stop)
        return real(*args, **told)

    command = arguments(dataset, tmp_path, "6 steps")
    monkeypatch.setattr(train_lib, "send", send)
    assert train_lib.main(command) == 128 + stop
    assert Checkpoints(tmp_path, read_only=True).latest() == 3
    assert train_lib.main(command) == 0
    timed = re.compile("images_per_s|tflops|data_wait|time|seconds|resumed_from")
    keep = lambda rows: [{k: v for k, v in r.items() if not timed.match(k)} for r in rows]
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


def test_a_wait_for_data_is_broken_off(dataset, tmp_path, monkeypatch):
    """The signal comes when the fourth batch does not."""
    real, never = Pipeline.batches, threading.Event()

    def batches(self, *share):
        yield from islice(real(self, *share), 3)
        while Checkpoints(tmp_path, read_only=True).latest() != 2:
            never.wait(0.01)  # by then step 3 is under way
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait()

    monkeypatch.setattr(Pipeline, "batches", batches)
    assert train_lib.main(arguments(dataset, tmp_path, "6 steps")) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path, read_only=True).latest() == 3


def test_data_that_can_no_longer_be_read_end_the_run_with_its_steps_saved(
    dataset, unbroken, tmp_path, monkeypatch, capsys
):
    real = Pipeline.batches

    def batches(self, *share):
        yield from islice(real(self, *share), 3)
        raise DatasetError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "batches", batches)
        assert "the disk is gone" in error_of(capsys, arguments(dataset, tmp_path, "6 steps"))
    assert Checkpoints(tmp_path, read_only=True).latest() == 3
    assert train_lib.main(arguments(dataset, tmp_path, "6 steps")) == 0
    for a, b in zip(params(tmp_path), params(unbroken)):
        np.testing.assert_array_equal(a, b)


def test_a_stop_before_the_first_report_saves_though_the_best_metric_is_not_known(
    dataset, tmp_path, monkeypatch
):
    real, seen = train_lib.send, []

    def send(*args, **told):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **told)

    monkeypatch.setattr(train_lib, "send", send)
    fields = {
        "checkpoint.best": "loss", "log.every": "50 steps", "checkpoint.every": "50 steps",
    }  # fmt: skip
    command = arguments(dataset, tmp_path, "60 steps", **fields)
    assert train_lib.main(command) == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path, read_only=True).latest() == 2


def test_a_best_metric_that_there_is_not_is_refused_before_the_first_step(
    dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_lib.Loop, "run", lambda *_: pytest.fail("too late"))
    command = arguments(dataset, tmp_path, "6 steps", **{"checkpoint.best": "los"})
    error = error_of(capsys, command)
    assert "checkpoint.best='los' is none of the reported metrics: " in error
    assert "accuracy, " in error and "loss/hni" in error


def test_a_tracker_without_its_key_is_refused_before_anything_is_written(
    dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = arguments(dataset, tmp_path / "run", "1 steps", **{"log.mlflow": "mine"})
    assert "needs the environment variable MLFLOW_TRACKING_URI" in error_of(capsys, command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_whatever_ends_a_run_all_is_closed_and_the_trackers_hear_of_it(
    dataset, tmp_path, monkeypatch, error
):
    """Also where the last save is what fails."""
    ends: list[object] = []
    close = lambda name: lambda *_, **told: ends.append((name, *told.values()))
    monkeypatch.setattr(train_lib.MetricWriter, "close", close("writer"))
    monkeypatch.setattr(train_lib.Tracer, "close", close("tracer"))

    def fails(*_):
        raise error

    def run(*_) -> int:
        monkeypatch.setattr(Checkpoints, "wait", fails)
        return 6

    monkeypatch.setattr(train_lib.Loop, "run", run)
    command = arguments(dataset, tmp_path, "6 steps")
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="No space left"):
            train_lib.main(command)
    else:
        assert train_lib.main(command) == 128 + signal.SIGINT
    assert ends == [("tracer",), ("writer", True)]
    assert not (tmp_path / "lease.json").exists()


def test_a_signal_in_the_first_compile_ends_at_once_and_frees_the_workdir(dataset, tmp_path):
    """Where Python's own handlers would wait until the compiler returns."""
    program = f"""
import hashlib, os, signal
from hqclip_jax import train
def compiling(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes in C
train.Checkpoints.prepare = compiling
train.main({arguments(dataset, tmp_path, "6 steps")!r})
"""
    command = [sys.executable, "-c", program]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, cwd=ROOT, timeout=100, capture_output=True, text=True, env=env)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before there was anything to save" in ended.stdout
    assert not (tmp_path / "lease.json").exists()


def test_a_second_run_in_the_same_workdir_is_refused(dataset, tmp_path, capsys):
    with Lease(tmp_path):
        error = error_of(capsys, arguments(dataset, tmp_path, "1 steps"))
    assert f"{tmp_path} is in use by process {os.getpid()}" in error
    assert not (tmp_path / "checkpoints").exists()


def test_minutes_save_too(dataset, tmp_path):
    fields = {"checkpoint.minutes": 1e-9, "checkpoint.every": "100 steps", "checkpoint.keep": 9}
    assert train_lib.main(arguments(dataset, tmp_path, "5 steps", **fields)) == 0
    # Asked for in the step before, heard of when the next one is under way.
    assert Checkpoints(tmp_path, read_only=True).steps() == [2, 4, 5]


def test_too_many_unreadable_pictures_stop_the_run_with_the_list(dataset_of, tmp_path, capsys):
    records = [make_record(i) for i in range(40)]
    broken = [dataclasses.replace(r, image=r.image[:400]) if i % 2 else r
              for i, r in enumerate(records)]  # fmt: skip
    command = arguments(dataset_of(broken), tmp_path / "run", "9 steps")
    error = error_of(capsys, command)
    assert re.search(
        r"1\d of \d\d records could not be read, more than data\.max_replaced=0\.01", error
    )
    lines = [json.loads(line) for line in error.splitlines() if line.startswith("{")]
    assert len(lines) >= 11 and {line["reason"] for line in lines} == {"image"}
    assert all(line["record"] % 2 and "rendered-train.array_record" in line["shard"][0]
               for line in lines)  # fmt: skip
    assert read_metrics(tmp_path / "run")[-1]["replaced/image"] > 10


def test_a_step_that_was_asked_for_is_traced(dataset, tmp_path):
    (tmp_path / "profile").touch()
    assert train_lib.main(arguments(dataset, tmp_path, "3 steps")) == 0
    assert not (tmp_path / "profile").exists()
    assert list((tmp_path / "traces").rglob("*.xplane.pb"))


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
    found = re.search(r"the updates of steps (\d) to (\d) were skipped.*Lower optim\.lr", error)
    first, last = map(int, found.groups())
    assert last - first == 2 and read_metrics(tmp_path)[-1]["streak"] == 3
    named = json.loads((tmp_path / "diverged-0.json").read_text())
    assert named["steps"] == [first, last]
    assert {len(uids) for uids in named["uids"].values()} == {8}
    batches = islice(pipeline_of(dataset).batches(), last)
    expected = [[uid.decode() for uid in batch["uid"]] for batch in batches]
    assert named["uids"] == {str(s): expected[s - 1] for s in range(first, last + 1)}
    # What was saved since is sound: no skipped update is in it.
    params = restore_model(tmp_path).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_that_had_stopped_itself_counts_anew_when_it_is_started_again(dataset, tmp_path):
    fields = {
        "optim.lr": 1e30, "optim.max_skipped": 2, "checkpoint.every": "3 steps",
    }  # fmt: skip
    steps = []
    for _ in range(2):
        assert train_lib.main(arguments(dataset, tmp_path, "9 steps", **fields)) == 1
        steps.append(json.loads((tmp_path / "diverged-0.json").read_text())["steps"])
        (tmp_path / "checkpoints" / "3").is_dir()
    # One made an update in the first step; what was saved at step 3 had seen two that were none.
    assert steps == [[2, 3], [4, 5]]


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_lib.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--config.loss.hni=1.0" in out and "[inferred]" in out
