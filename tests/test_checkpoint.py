import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hqclip_jax import checkpoint
from hqclip_jax.checkpoint import (
    FOLDER,
    FORMAT,
    CheckpointError,
    Checkpoints,
    RunInfo,
    check_same_run,
)
from hqclip_jax.config import (
    CheckpointConfig,
    Config,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.optim import make_tx
from hqclip_jax.restore import find, restore_model
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import TrainState, init_state

ROOT = Path(__file__).parent.parent
CONFIG = Config(
    model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=8, dtype="float32"),
    optim=OptimConfig(batch=8),
    seed=5,
)
TAGS = TagVocabulary(("cup", "red"), (3, 1), 4)
INFO = RunInfo(CONFIG, {"train": 24}, TAGS, timers={"train": 12.5}, records={"train": 40})


def initialise(devices: int, mesh: MeshConfig) -> tuple[TrainState, TrainState, nnx.GraphDef]:
    tx = make_tx(CONFIG.optim, 1, 10)
    mesh = make_mesh(mesh, 8, jax.devices()[:devices])
    graphdef, abstract, _, init = init_state(CONFIG, 49408, len(TAGS), tx, mesh)
    return init(), abstract, graphdef


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, TrainState]:
    """Step 3, written from eight devices in a 4 × 2 mesh."""
    workdir = tmp_path_factory.mktemp("saved")
    state, _, _ = initialise(8, MeshConfig(fsdp=4, tensor=2))
    state = state._replace(step=jnp.int32(3))
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=2))
    checkpoints.save(3, state, INFO)
    checkpoints.close()
    return workdir, jax.device_get(state)


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(8, MeshConfig(fsdp=4, tensor=2)), (4, MeshConfig(fsdp=2)), (1, MeshConfig())],
)
def test_another_mesh_restores_the_same_bits(saved, devices, mesh):
    workdir, expected = saved
    _, abstract, _ = initialise(devices, mesh)
    checkpoints = Checkpoints(workdir, read_only=True)
    state = checkpoints.restore(checkpoints.latest(), abstract)
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(str(a)), state, abstract)


def test_all_that_describes_the_run_is_in_the_checkpoint(saved):
    checkpoints = Checkpoints(saved[0], read_only=True)
    assert checkpoints.info(3) == INFO


def test_restored_model_embeds_as_the_saved_one(saved):
    workdir, expected = saved
    restored = restore_model(workdir)
    assert (restored.step, restored.config, restored.tags) == (3, CONFIG, TAGS)
    assert restored.tokenizer.context_length == 8
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    found = nnx.merge(restored.model, restored.params).encode_image(images)
    same = nnx.merge(restored.model, expected.params).encode_image(images)
    np.testing.assert_allclose(found, same, atol=1e-6)


@pytest.mark.parametrize("inside", ["", FOLDER, f"{FOLDER}/3"])
def test_a_run_its_checkpoints_or_one_step_may_be_named(saved, inside):
    assert restore_model(saved[0] / inside).step == 3


def test_what_is_no_checkpoint_is_refused_by_name(saved, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: give the --workdir"):
        restore_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no step 9; it has \[3\]"):
        restore_model(saved[0], step=9)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"):
        restore_model(tmp_path)


def test_an_unfinished_save_is_not_seen(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run" / FOLDER
    shutil.copytree(folder / "3", folder / "7.orbax-checkpoint-tmp")
    assert restore_model(tmp_path / "run").step == 3
    assert Checkpoints(tmp_path / "run").latest() == 3


def damage(run: Path, change) -> None:
    """Rewrites the JSON that describes the run."""
    (path,) = (run / FOLDER / "3" / "run").rglob("metadata")
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["config"]["model"].update(arch="ViT-Nano/8"), "does not fit.*ViT-Nano/8"),
        (
            lambda s: s["config"]["model"].update(colour=1),
            r"not written by this code.*model\.colour",
        ),
        (lambda s: s.pop("position"), "not written by this code"),
        (lambda s: s.update(tokenizer="bert"), "tokenizer 'bert' is unknown"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(saved, tmp_path, change, says):
    shutil.copytree(saved[0], tmp_path / "run")
    damage(tmp_path / "run", change)
    with pytest.raises(CheckpointError, match=says):
        restore_model(tmp_path / "run")


def test_continuing_another_model_is_refused_with_the_fields(tmp_path):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, image_size=32))
    with pytest.raises(CheckpointError, match=r"model\.image_size is 16 there, 32 here.*--workdir"):
        check_same_run(INFO, other, 2, tmp_path)
    with pytest.raises(CheckpointError, match="tag head has 2 classes there, 0 here"):
        check_same_run(INFO, CONFIG, 0, tmp_path)
    faster = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="full"))
    check_same_run(INFO, faster, 2, tmp_path)


def test_the_last_step_may_be_asked_for_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.save(1, small(), INFO)
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_an_average_of_the_parameters_is_saved_and_restored_apart(tmp_path):
    config = dataclasses.replace(CONFIG, optim=OptimConfig(batch=8, ema=0.9))
    mesh = make_mesh(MeshConfig(), 8)
    _, abstract, _, init = init_state(config, 49408, len(TAGS), make_tx(config.optim, 1, 10), mesh)
    state = init()
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    expected = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, dataclasses.replace(INFO, config=config))
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, abstract), expected)
    checkpoints.close()
    restored = restore_model(tmp_path, weights="ema").params
    jax.tree.map(np.testing.assert_array_equal, restored, expected.ema)
    jax.tree.map(np.testing.assert_array_equal, restore_model(tmp_path).params, expected.params)


def test_a_checkpoint_without_an_average_says_so(saved):
    with pytest.raises(CheckpointError, match=r"has no average: optim\.ema was 0"):
        restore_model(saved[0], weights="ema")


def test_a_form_of_the_losses_with_other_parameters_is_another_model():
    sigmoid = dataclasses.replace(CONFIG, loss=LossConfig(contrastive_form="sigmoid"))
    with pytest.raises(CheckpointError, match=r"loss\.contrastive_form is 'softmax' there"):
        check_same_run(INFO, sigmoid, len(TAGS), Path("x"))
    average = dataclasses.replace(CONFIG, optim=OptimConfig(batch=8, ema=0.9))
    with pytest.raises(CheckpointError, match=r"optim\.ema > 0 is False there, True here"):
        check_same_run(INFO, average, len(TAGS), Path("x"))
    own = dataclasses.replace(CONFIG, loss=LossConfig(hni_scale="own"))
    with pytest.raises(CheckpointError, match=r"loss\.hni_scale=own is False there, True here"):
        check_same_run(INFO, own, len(TAGS), Path("x"))
    there = dataclasses.replace(INFO, config=own)
    without = dataclasses.replace(CONFIG, loss=LossConfig(hni_scale="own", hni=0))
    with pytest.raises(CheckpointError, match=r"loss\.hni_scale=own is True there, False here"):
        check_same_run(there, without, len(TAGS), Path("x"))
    check_same_run(INFO, without, len(TAGS), Path("x"))


def test_continuing_with_another_batch_is_refused():
    other = dataclasses.replace(CONFIG, optim=OptimConfig(batch=16))
    with pytest.raises(CheckpointError, match=r"optim\.batch is 8 there, 16 here"):
        check_same_run(INFO, other, len(TAGS), Path("x"))


def test_a_checkpoint_of_another_format_is_refused():
    stored = json.loads(json.dumps(INFO.to_json()))
    assert RunInfo.from_json(stored) == INFO
    with pytest.raises(CheckpointError, match=f"format 1, and this version reads {FORMAT}"):
        RunInfo.from_json(stored | {"format": 1})


def small(value: float = 0.0, mesh: Mesh | None = None) -> TrainState:
    """A state of few bytes; over a mesh if there is one."""
    x = jnp.full((8, 4), value)
    if mesh:
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    scalars = set(TrainState._fields) - {"params", "ema", "opt_state"}
    rest = {name: jnp.int32(0) for name in scalars}  # one each: JAX donates none twice
    return TrainState(params={"w": x}, ema=None, opt_state={"m": x + 1}, **rest)


def steps_left(workdir: Path, config: CheckpointConfig, keep_every: int, losses: dict) -> list[int]:
    checkpoints = Checkpoints(workdir, config, keep_every)
    for step, loss in losses.items():
        checkpoints.save(step, small(), INFO, {"loss": loss, "accuracy": -loss})
    checkpoints.close()
    return sorted(int(p.name) for p in (workdir / FOLDER).iterdir())


LOSSES = {1: 4.0, 2: 3.0, 3: 0.5, 4: 2.0, 5: math.nan, 6: 3.0}


@pytest.mark.parametrize(
    ("best", "mode", "keep_every", "expected"),
    [
        ("", "min", 0, [5, 6]),
        ("", "min", 2, [2, 4, 5, 6]),
        ("loss", "min", 0, [3, 5, 6]),
        ("loss", "max", 4, [1, 4, 5, 6]),
        ("accuracy", "max", 4, [3, 4, 5, 6]),
    ],
)
def test_the_latest_the_regular_and_the_best_stay(tmp_path, best, mode, keep_every, expected):
    config = CheckpointConfig(keep=2, best=best, best_mode=mode)
    assert steps_left(tmp_path, config, keep_every, LOSSES) == expected


def test_the_best_stays_best_when_the_run_is_started_again(tmp_path):
    config = CheckpointConfig(keep=1, best="loss")
    assert steps_left(tmp_path, config, 0, {1: 3.0, 2: 0.5, 3: 2.0}) == [2, 3]
    assert steps_left(tmp_path, config, 0, {4: 1.0, 5: 1.0}) == [2, 5]
    # One that did not record the metric is not taken for the best.
    assert steps_left(tmp_path, CheckpointConfig(keep=1), 0, {6: 0.0}) == [6]
    assert steps_left(tmp_path, config, 0, {7: 9.0, 8: 9.5}) == [7, 8]


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best="los"))
    with pytest.raises(CheckpointError, match=r"best='los' is none of.*: accuracy, loss$"):
        checkpoints.save(1, small(), INFO, {"loss": 1.0, "accuracy": 0.0})
    checkpoints.close()


@pytest.mark.parametrize("room", [True, False])
def test_the_state_may_be_donated_as_soon_as_a_save_returns(tmp_path, monkeypatch, room):
    monkeypatch.setattr(checkpoint, "_room_for_copy", lambda state: room)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), 8)
    state = small(1.0, mesh)
    expected = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    handed = []
    write = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda *args: (handed.append(args[1]), write(*args)))
    checkpoints.prepare(state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints.save(1, state, INFO)
    step(state)
    checkpoints.wait()
    assert (handed[0] is state) != room
    assert handed[0].params["w"].sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0.0, mesh)
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, abstract), expected)
    checkpoints.close()


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    happened, released = [], threading.Event()
    wait = checkpoints.wait

    def write(step: int, *_) -> None:
        released.wait()
        happened.append(step)

    def copy(state: TrainState) -> TrainState:
        happened.append("copy")
        return state

    monkeypatch.setattr(checkpoints, "_write", write)
    monkeypatch.setattr(checkpoints, "_copy", copy)
    monkeypatch.setattr(checkpoints, "wait", lambda: (released.set(), wait()))
    checkpoints.save(1, small(), INFO)
    released.clear()
    checkpoints.save(2, small(), INFO)
    checkpoints.close()
    assert happened == ["copy", 1, "copy", 2]


@pytest.mark.parametrize("later", ["save", "close"])
def test_an_error_of_a_save_comes_up_at_the_next_call(tmp_path, monkeypatch, later):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    checkpoints.save(1, small(), INFO)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, small(), INFO) if later == "save" else checkpoints.close()
    checkpoints.close()


def test_an_error_while_orbax_writes_comes_up_too(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
    checkpoints.save(1, small(), INFO)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    assert Checkpoints(tmp_path, read_only=True).latest() is None


def test_a_device_without_memory_for_a_copy_gets_none():
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 300, "peak_bytes_in_use": 200}

    device = Device()
    for count, room in ((50, True), (51, False)):
        shard = SimpleNamespace(device=device, data=SimpleNamespace(nbytes=count))
        array = SimpleNamespace(addressable_shards=[shard])
        assert checkpoint._room_for_copy([array, array]) == room


DIE = """
import os, signal, sys
from pathlib import Path
import orbax.checkpoint as ocp
from hqclip_jax.checkpoint import Checkpoints
from hqclip_jax.config import CheckpointConfig
from tests.test_checkpoint import INFO, small

moment = sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def removed_by_half(path, *args, **kwargs):
    next(Path(path).rglob("metadata")).unlink()
    die()
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=2, best="loss"))
for step in (1, 2, 3):
    checkpoints.save(step, small(step), INFO, {"loss": step})
checkpoints.wait()
if moment == "begun":
    checkpoints._manager.save = die
elif moment == "written":
    ocp.PyTreeCheckpointHandler.finalize = die
elif moment == "renaming":
    os.rename = os.replace = die
elif moment == "deleting":
    import shutil
    shutil.rmtree = removed_by_half
checkpoints.save(4, small(4), INFO, {"loss": 4})
checkpoints.wait()
sys.exit("not killed")
"""


@pytest.mark.parametrize(
    ("moment", "latest"), [("begun", 3), ("written", 3), ("renaming", 3), ("deleting", 4)]
)
def test_a_kill_during_a_save_loses_that_save_alone(tmp_path, moment, latest):
    run = subprocess.run([sys.executable, "-c", DIE, tmp_path, moment], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    found = find(tmp_path)
    assert (found.step, found.info) == (latest, INFO)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small())
    state = found.checkpoints.restore(latest, abstract)
    jax.tree.map(np.testing.assert_array_equal, state, small(latest))
    assert steps_left(tmp_path, CheckpointConfig(keep=2, best="loss"), 0, {5: 9.0, 6: 9.0}) == [
        1, 5, 6,
    ]  # fmt: skip
