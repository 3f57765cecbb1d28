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
from hqclip_jax.signals import Control, send
from hqclip_jax.step import (
    TrainState,
    batch_shapes,
    init_state,
    loss_fn,
    make_train_step,
    signal_shapes,
)  # fmt: skip

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
        "text_cut": np.float32(np.arange(B) % 4 == 0),
        "replaced": np.int32([1, 3, 3] + [0] * (B - 3)),
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
        state, metrics = train_step(state, batch, send(mesh))
        control = metrics.pop("control")
        assert control.shape == (3,)
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
    state, history = one_device
    assert state.ema is None
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
    _, metrics = jax.eval_shape(step, abstract, batch, signal_shapes(mesh))
    assert f"loss/{off}" not in metrics


def changed(**sections) -> Config:
    """CONFIG with other values: `changed(optim={"micro_batches": 2})`."""
    return dataclasses.replace(
        CONFIG,
        **{k: dataclasses.replace(getattr(CONFIG, k), **v) for k, v in sections.items()},
    )


def loss_and_gradient(config: Config, mesh: jax.sharding.Mesh, batch: dict):
    graphdef, _, _, init = init_state(config, VOCAB, TAGS, make_tx(config.optim, 1, 10), mesh)
    of_params = lambda params: loss_fn(graphdef, params, batch, config, mesh)
    return jax.jit(jax.value_and_grad(of_params, has_aux=True))(init().params)


@pytest.mark.parametrize("hni_form", ["pair", "all"])
@pytest.mark.parametrize("mesh", [MeshConfig(replica=1), MeshConfig(fsdp=2)], ids=["1", "2 × fsdp"])
def test_micro_batches_change_no_loss_and_no_gradient(mesh, hni_form):
    whole = changed(loss={"hni_form": hni_form})
    parts = changed(loss={"hni_form": hni_form}, optim={"micro_batches": 4})
    devices = 1 if mesh.replica == 1 else 4
    of = make_mesh(mesh, B, jax.devices()[:devices], parts=4)
    batch = jax.device_put(make_batch(), batch_sharding(of))
    (_, expected), right = loss_and_gradient(whole, of, batch)
    (_, found), grads = loss_and_gradient(parts, of, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(np.abs(b).max()), 1e-2))


def test_an_average_of_the_gradients_of_parts_would_be_another():
    """What micro-batches must not do: each part alone has other rivals."""
    of = make_mesh(MeshConfig(replica=1), B, jax.devices()[:1])
    batch = make_batch()
    half = lambda i: {k: v[i * B // 2 : (i + 1) * B // 2] for k, v in batch.items()}
    (_, expected), _ = loss_and_gradient(CONFIG, of, batch)
    averaged = [loss_and_gradient(CONFIG, of, half(i))[0][1]["loss/contrastive"] for i in (0, 1)]
    assert abs(np.mean(averaged) - expected["loss/contrastive"]) > 0.1


def test_memory_falls_with_the_number_of_micro_batches():
    rows = 2048
    of = make_mesh(MeshConfig(), rows, parts=8)
    sizes = []
    for parts in (1, 8):
        config = changed(optim={"micro_batches": parts, "batch": rows}, loss={"tag": 0.0})
        tx = make_tx(config.optim, 1, 10)
        graphdef, abstract, shardings, _ = init_state(config, VOCAB, 0, tx, of)
        step = make_train_step(graphdef, tx, config, of, shardings)
        compiled = step.lower(abstract, batch_shapes(config, of), signal_shapes(of)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 3 * sizes[1], sizes


def test_an_update_that_is_no_number_is_skipped_and_counted():
    config = changed(optim={"ema": 0.9, "max_skipped": 3})
    mesh = make_mesh(MeshConfig(), B)
    tx = make_tx(config.optim, 1, 10)
    graphdef, _, shardings, init = init_state(config, VOCAB, TAGS, tx, mesh)
    train_step = make_train_step(graphdef, tx, config, mesh, shardings)
    good = jax.device_put(make_batch(), batch_sharding(mesh))
    # A weight that is no number stands for whatever may go wrong in the towers.
    bad = good | {"neg_mask": good["neg_mask"].at[0].set(jnp.nan)}
    state, _ = train_step(init(), good, send(mesh))
    before = jax.device_get(state)
    for i in (1, 2):
        state, metrics = train_step(state, bad, send(mesh))
        assert not np.isfinite(metrics["loss"])
        assert (int(metrics["skipped"]), int(metrics["streak"])) == (i, i)
    after = jax.device_get(state)
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert int(after.step) == 3
    state, metrics = train_step(state, good, send(mesh))
    assert np.isfinite(metrics["loss"])
    assert (int(metrics["skipped"]), int(metrics["streak"])) == (2, 0)
    assert np.any(
        state.params["visual"]["class_embedding"] != before.params["visual"]["class_embedding"]
    )
    before = jax.device_get(state)
    for i, batch in enumerate((bad, bad, bad, good), 1):
        state, metrics = train_step(state, batch, send(mesh))
        assert int(metrics["streak"]) == i
    # The third in a row has stopped it: what is sound again comes too late.
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)


def test_the_average_follows_the_parameters():
    config = changed(optim={"ema": 0.75})
    first, _ = run(1, MeshConfig(), config, steps=1)
    start = init_state(
        config, VOCAB, TAGS, make_tx(config.optim, 1, 10), make_mesh(MeshConfig(), B)
    )[3]()
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.params, first.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.ema, expected)


def test_first_moment_in_bf16_and_second_in_f32():
    state, _ = run(1, MeshConfig(), changed(optim={"mu_dtype": "bfloat16"}), steps=1)
    adam = state.opt_state[1][0]
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "loss",
    [
        {"contrastive_form": "sigmoid"},
        {"hni_form": "own"},
        {"hni_scale": "own"},
        {"tag_form": "bce", "tag_input": "projected"},
    ],
    ids=str,
)
def test_every_form_trains(loss):
    state, history = run(1, MeshConfig(), changed(loss=loss))
    assert history[-1]["loss"] < history[0]["loss"]
    assert ("logit_bias" in state.params) == ("contrastive_form" in loss)
    assert ("hni_logit_scale" in state.params) == ("hni_scale" in loss)


def test_dropped_patches_differ_by_step_and_not_by_mesh():
    config = changed(model={"patch_dropout": 0.5, "image_size": 32})
    batch = make_batch() | {
        "image": np.random.default_rng(1).integers(0, 256, (B, 32, 32, 3), np.uint8)
    }
    found = []
    for devices, mesh_config in ((1, MeshConfig()), (8, MeshConfig(fsdp=2, tensor=2))):
        mesh = make_mesh(mesh_config, B, jax.devices()[:devices])
        tx = make_tx(dataclasses.replace(config.optim, lr=1e-30), 1, 10)  # nothing moves
        graphdef, _, shardings, init = init_state(config, VOCAB, TAGS, tx, mesh)
        train_step = make_train_step(graphdef, tx, config, mesh, shardings)
        state, losses_seen = init(), []
        for _ in range(2):
            placed = jax.device_put(batch, batch_sharding(mesh))
            state, metrics = train_step(state, placed, send(mesh))
            losses_seen.append(float(metrics["loss"]))
        found.append(losses_seen)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert abs(found[0][0] - found[0][1]) > 1e-4


def test_initialisation_leaves_no_device_with_the_whole_model():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), B)
    _, abstract, _, init = init_state(CONFIG, 4096, 64, make_tx(CONFIG.optim, 1, 10), mesh)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(init()):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < whole / 5


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
    new, _ = train_step(state, batch, send(mesh))
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
    text = step.lower(abstract, batch, signal_shapes(mesh)).compile().as_text()
    assert "all-to-all" not in text
    assert not re.search(rf"f32\[{B},{B}\]", text)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_that_one_device_is_told_to_stop_and_all_after_it_change_nothing(devices):
    mesh = make_mesh(MeshConfig(tensor=min(devices, 2)), B, jax.devices()[:devices])
    tx = make_tx(CONFIG.optim, 1, 10)
    graphdef, _, shardings, init = init_state(CONFIG, VOCAB, TAGS, tx, mesh)
    train_step = make_train_step(graphdef, tx, CONFIG, mesh, shardings)
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    state, metrics = train_step(init(), batch, send(mesh))
    assert Control(*np.asarray(metrics["control"])) == (0, 0, 0)
    assert metrics["text_cut"] == 0.25
    before = jax.device_get(state)
    assert before.replaced.tolist() == [1, 0, 2]
    one = np.zeros((devices, 2), np.int32)
    one[-1, 0] = 1
    void = jax.tree.map(lambda x: x[:0:-1].repeat(2, axis=0)[:B], make_batch())
    void |= {"neg_mask": np.full(B, np.nan, np.float32)}
    for signals in (one, np.zeros_like(one)):
        placed = jax.device_put(void, batch_sharding(mesh))
        state, metrics = train_step(state, placed, signals)
        assert Control(*np.asarray(metrics["control"])) == (1, 0, 0)
    after = jax.device_get(state)
    assert after.stopped == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(stopped=before.stopped), before)


def test_one_device_that_asks_to_save_is_heard_and_the_step_is_made():
    mesh = make_mesh(MeshConfig(fsdp=2), B)
    tx = make_tx(CONFIG.optim, 1, 10)
    graphdef, _, shardings, init = init_state(CONFIG, VOCAB, TAGS, tx, mesh)
    train_step = make_train_step(graphdef, tx, CONFIG, mesh, shardings)
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    one = np.zeros((8, 2), np.int32)
    one[5, 1] = 1
    state, metrics = train_step(init(), batch, one)
    assert Control(*np.asarray(metrics["control"])) == (0, 1, 0) and int(state.step) == 1
