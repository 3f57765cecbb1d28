import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hqclip_jax.config import Config, LossConfig, ModelConfig, OptimConfig
from hqclip_jax.models.clip import CLIP
from hqclip_jax.optim import decay_mask, make_tx, warmup_cosine


def test_decay_spares_norms_biases_temperature_and_class_token():
    config = Config(
        model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=8),
        loss=LossConfig(contrastive_form="sigmoid", hni_scale="own"),
    )
    model = nnx.eval_shape(lambda: CLIP(config, 50, 5, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    flat = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): decays for p, decays in flat}
    decayed = {name for name, decays in names.items() if decays}
    # OpenCLIP's matrices and embeddings, by name; the stacked norms have rank 2 and are not here.
    blocks = ("qkv/kernel", "out/kernel", "mlp_in/kernel", "mlp_out/kernel")
    expected = {f"{t}/transformer/blocks/{b}" for t in ("visual", "text") for b in blocks}
    expected |= {"visual/patch_embed/kernel", "visual/positional_embedding"}
    expected |= {"text/token_embedding", "text/positional_embedding"}
    expected |= {"visual_projection/kernel", "text_projection/kernel", "tag_head/kernel"}
    assert decayed == expected


def test_schedule_ramps_from_a_first_step_above_zero_and_ends_at_zero():
    lr = warmup_cosine(2.0, 4, 12)
    found = [float(lr(s)) for s in range(13)]
    np.testing.assert_allclose(found[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    expected = [1 + np.cos(np.pi * (s - 4) / 8) for s in range(4, 13)]
    np.testing.assert_allclose(found[4:], expected, atol=1e-6)


def test_schedule_without_warmup():
    assert float(warmup_cosine(1.0, 0, 10)(0)) == 1.0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_one_update_by_hand(clip):
    config = OptimConfig(lr=0.1, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6, clip_norm=clip)
    tx = make_tx(config, warmup=0, total=10)
    params = {"layer": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([1.0])}}
    grads = {"layer": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([-4.0])}}
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    # First AdamW step: the debiased ratio is the sign of the gradient; decay on the kernel alone.
    np.testing.assert_allclose(
        new["layer"]["kernel"], [1 - 0.1 * (1 + 0.2), -2 + 0.1 * 0.4], rtol=1e-5
    )
    np.testing.assert_allclose(new["layer"]["bias"], [1.1], rtol=1e-5)


def test_clipping_bounds_the_moments():
    tx = make_tx(OptimConfig(clip_norm=1.0), 0, 10)
    params = {"kernel": jnp.zeros(2)}
    _, state = tx.update({"kernel": jnp.array([30.0, 40.0])}, tx.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["kernel"]
    np.testing.assert_allclose(moment, [0.06, 0.08], rtol=1e-5)
