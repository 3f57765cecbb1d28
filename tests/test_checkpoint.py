import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hqclip_jax.checkpoint import (
    FOLDER,
    FORMAT,
    CheckpointError,
    Checkpoints,
    RunInfo,
    check_same_run,
    restore_model,
)
from hqclip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import make_mesh
from hqclip_jax.step import TrainState, init_state

CONFIG = Config(
    model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=8, dtype="float32"),
    optim=OptimConfig(batch=8),
    seed=5,
)
TAGS = TagVocabulary(("cup", "red"), (3, 1), 4)
INFO = RunInfo(CONFIG, {"train": 24}, TAGS, seconds=12.5)


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
    checkpoints = Checkpoints(workdir, keep=2)
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


def test_only_the_latest_stay(tmp_path):
    state, _, _ = initialise(1, MeshConfig())
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state, INFO)
        checkpoints.save(step, state, INFO)  # the last step may be asked for twice
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["2", "3"]


def test_an_average_of_the_parameters_is_saved_and_restored_apart(tmp_path):
    config = dataclasses.replace(CONFIG, optim=OptimConfig(batch=8, ema=0.9))
    mesh = make_mesh(MeshConfig(), 8)
    _, abstract, _, init = init_state(config, 49408, len(TAGS), make_tx(config.optim, 1, 10), mesh)
    state = init()
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    expected = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, dataclasses.replace(INFO, config=config))
    checkpoints.manager.wait_until_finished()
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
