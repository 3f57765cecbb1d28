import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hqclip_jax import losses
from hqclip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig
from hqclip_jax.models.clip import MAX_LOGIT_SCALE
from hqclip_jax.optim import make_tx
from hqclip_jax.sharding import batch_sharding, make_mesh
from hqclip_jax.step import TrainState, init_state, loss_fn, make_train_step

B, L, VOCAB, TAGS = 16, 8, 40, 12
CONFIG = Config(
    model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=L, dtype="float32"),
    optim=OptimConfig(batch=B, lr=1e-3),
)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text = lambda: np.concatenate(
        [rng.integers(1, VOCAB - 1, (B, L - 1)), np.full((B, 1), VOCAB - 1)], axis=1
    ).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (B, 16, 16, 3), np.uint8),
        "text": text(),
        "neg_text": text(),
        "neg_mask": (np.arange(B) % 4 > 0).astype(np.float32),
        "tag_ids": np.stack([rng.permutation(TAGS + 4)[:4] - 4 for _ in range(B)]).astype(np.int32),
    }


def run(devices: int, mesh_config: MeshConfig, config: Config = CONFIG, steps: int = 3):
    mesh = make_mesh(mesh_config, B, jax.devices()[:devices])
    tx = make_tx(config.optim, 1, 10)
    graphdef, _, shardings, init = init_state(config, VOCAB, TAGS, tx, mesh)
    state = init()
    train_step = make_train_step(graphdef, tx, config, mesh, shardings)
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    history = []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        history.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state), history


def moments(state: TrainState) -> dict:
    """AdamW's first: after one step the gradient, but for a factor."""
    return state.opt_state[1][0].mu


@pytest.fixture(scope="module")
def one_device():
    return run(1, MeshConfig())


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [(8, MeshConfig()), (8, MeshConfig(fsdp=4, tensor=2)), (4, MeshConfig(fsdp=2, tensor=2))],
)
def test_many_devices_equal_one(one_device, devices, mesh):
    state, history = run(devices, mesh)
    expected_state, expected = one_device
    for found, step in zip(history, expected):
        assert found == pytest.approx(step, rel=2e-4, abs=1e-5)
        assert found["loss"] == pytest.approx(step["loss"], rel=1e-5)
    # Adam divides by the root of the second moment: where a gradient is all but zero, rounding
    # decides the sign of the step. Hence the moments tightly, the parameters within two steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        moments(state), moments(expected_state),
    )  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
        state.params, expected_state.params,
    )  # fmt: skip


def test_loss_is_the_weighted_sum_of_the_references():
    config = dataclasses.replace(CONFIG, loss=LossConfig(contrastive=0.5, hni=2.0, tag=0.25))
    mesh = make_mesh(MeshConfig(), B)
    graphdef, _, _, init = init_state(config, VOCAB, TAGS, make_tx(config.optim, 1, 10), mesh)
    params, batch = init().params, make_batch()

    @jax.jit
    def both(params, batch):
        model = nnx.merge(graphdef, params)
        zimg, tag_logits = model.encode_image_and_tags(batch["image"])
        z = zimg, model.encode_text(batch["text"]), model.encode_text(batch["neg_text"])
        return loss_fn(graphdef, params, batch, config, mesh), z, tag_logits

    (loss, metrics), (zimg, ztxt, zneg), tag_logits = both(params, batch)
    scale = jnp.exp(params["logit_scale"])
    tag_loss, _, tag_mask = losses.tag_classification(tag_logits, batch["tag_ids"])
    parts = {
        "contrastive": losses.contrastive_reference(zimg, ztxt, scale)[0],
        "hni": losses.hni_reference(zimg, ztxt, zneg, batch["neg_mask"], scale),
        "tag": losses.masked_mean(tag_loss, tag_mask),
    }
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=1e-5)
    expected = 0.5 * parts["contrastive"] + 2 * parts["hni"] + 0.25 * parts["tag"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["neg_share"] == 0.75


def test_training_lowers_every_loss(one_device):
    _, history = one_device
    for name in ("loss", "loss/contrastive", "loss/hni", "loss/tag"):
        assert history[-1][name] < history[0][name]


@pytest.mark.parametrize("off", ["contrastive", "hni", "tag"])
def test_a_loss_of_weight_zero_is_not_computed(off):
    config = dataclasses.replace(CONFIG, loss=LossConfig(**{off: 0.0}))
    mesh = make_mesh(MeshConfig(), B, jax.devices()[:1])
    tx = make_tx(config.optim, 1, 10)
    graphdef, abstract, shardings, _ = init_state(config, VOCAB, TAGS, tx, mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch())
    step = make_train_step(graphdef, tx, config, mesh, shardings)
    _, metrics = jax.eval_shape(step, abstract, batch)
    assert f"loss/{off}" not in metrics


def test_logit_scale_is_clamped():
    config = dataclasses.replace(CONFIG, optim=OptimConfig(batch=B, lr=10.0))
    state, history = run(1, MeshConfig(), config, steps=2)
    assert 0 <= state.params["logit_scale"] <= np.float32(MAX_LOGIT_SCALE)
    assert 1 <= history[-1]["logit_scale"] <= 100.001


def test_state_is_sharded_donated_and_stays_where_it_is():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), B)
    tx = make_tx(CONFIG.optim, 1, 10)
    graphdef, abstract, shardings, init = init_state(CONFIG, VOCAB, TAGS, tx, mesh)
    state = init()
    kernel = lambda s: s.params["text"]["transformer"]["blocks"]["mlp_in"]["kernel"]
    assert kernel(state).addressable_shards[0].data.size * 8 == kernel(state).size
    train_step = make_train_step(graphdef, tx, CONFIG, mesh, shardings)
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    new, _ = train_step(state, batch)
    assert kernel(state).is_deleted()
    assert kernel(new).sharding == kernel(abstract).sharding
    assert int(new.step) == 1


def test_no_all_to_all_and_no_logits_of_the_global_batch():
    mesh = make_mesh(MeshConfig(), B)
    tx = make_tx(CONFIG.optim, 1, 10)
    graphdef, abstract, shardings, _ = init_state(CONFIG, VOCAB, TAGS, tx, mesh)
    batch = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=batch_sharding(mesh))
        for k, v in make_batch().items()
    }
    step = make_train_step(graphdef, tx, CONFIG, mesh, shardings)
    text = step.lower(abstract, batch).compile().as_text()
    assert "all-to-all" not in text
    assert not re.search(rf"f32\[{B},{B}\]", text)
