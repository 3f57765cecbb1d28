"""The TPU's kernels: their numbers by interpretation, and that real TPUs' compiler takes them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hqclip_jax.config import MeshConfig
from hqclip_jax.hardware import topology_devices
from hqclip_jax.models import attention as attention_lib
from hqclip_jax.models.attention import attention
from hqclip_jax.models.tpu_attention import MAX_TOKENS, fused_attention, supports
from hqclip_jax.sharding import P, batch_sharding, make_mesh


def plain(qkv_3xBxLxD, heads, causal):
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in qkv_3xBxLxD)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(qkv_3xBxLxD.shape[1:])


def value_and_gradient(form, qkv, do):
    out, vjp = jax.vjp(form, qkv)
    return out, vjp(do)[0]


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "causal"),
    [
        (17, 128, 2, False),
        (13, 384, 6, True),  # three registers of two heads
        (9, 256, 2, True),  # one head a register
        (9, 128, 4, False),
    ],
)
def test_kernels_equal_plain_attention(tokens, width, heads, causal):
    rng = np.random.default_rng(0)
    qkv = rng.normal(0, 1.5, (3, 2, tokens, width)).astype(np.float32)
    do = rng.normal(size=qkv.shape[1:]).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        found = value_and_gradient(lambda x: fused_attention(x, heads, causal, True), qkv, do)
        expected = value_and_gradient(lambda x: plain(x, heads, causal), qkv, do)
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max(), rtol=1e-5)


def test_scores_of_any_size_are_finite_and_bf16_stays_near_f32():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(3, 2, 21, 128)).astype(np.float32)
    qkv, do = jnp.bfloat16(exact), jnp.bfloat16(rng.normal(size=exact.shape[1:]))
    huge = fused_attention(qkv * 1e4, 2, True, True)
    assert huge.dtype == jnp.bfloat16 and bool(jnp.isfinite(huge).all())
    found = value_and_gradient(lambda x: fused_attention(x, 2, True, True), qkv, do)
    expected = value_and_gradient(
        lambda x: plain(x, 2, True), qkv.astype(jnp.float32), do.astype(jnp.float32)
    )
    for x, y in zip(found, expected):
        assert np.abs(np.float32(x) - y).max() <= 0.02 * np.abs(y).max()


def test_on_a_mesh_each_device_has_its_rows_and_heads(monkeypatch):
    """What a TPU would run, interpreted on the devices at hand."""
    heads, mesh = 4, make_mesh(MeshConfig(fsdp=2, tensor=2), 8)
    rng = np.random.default_rng(0)
    qkv_BxLx3xD = rng.normal(size=(8, 9, 3, 256)).astype(np.float32)
    do = rng.normal(size=(8, 9, 256)).astype(np.float32)

    def ours(qkv):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention(qkv, heads, causal=True)

    expected = value_and_gradient(
        lambda x: plain(jnp.moveaxis(x, 2, 0), heads, True), qkv_BxLx3xD, do
    )
    interpreted = []

    def interpret(qkv_3xbxLxd, heads, causal):
        interpreted.append((qkv_3xbxLxd.shape, heads))
        return fused_attention(qkv_3xbxLxd, heads, causal, True)

    monkeypatch.setattr(attention_lib, "target", lambda: ("tpu", 2))
    monkeypatch.setattr(attention_lib, "is_fused", lambda *_: True)
    monkeypatch.setattr(attention_lib, "tpu_attention", SimpleNamespace(fused_attention=interpret))
    on_mesh = jax.device_put((qkv_BxLx3xD, do), batch_sharding(mesh))
    found = jax.jit(lambda qkv, do: value_and_gradient(ours, qkv, do))(*on_mesh)
    assert interpreted == [((3, 2, 9, 128), 2)]
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "dtype"),
    [
        (257, 1280, 16, "bfloat16"),  # ViT-H/14's images: heads 80 wide lie across registers
        (257, 192, 3, "bfloat16"),
        (1025, 1024, 16, "bfloat16"),
        (257, 1024, 16, "float32"),
    ],
)
def test_what_does_not_fit_the_chip_is_left_to_xla(tokens, width, heads, dtype):
    assert not supports(tokens, width, heads, jnp.dtype(dtype))
    assert supports(257, 1024, 16, jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
    ("topology", "mesh_config", "tokens", "width", "heads"),
    [
        ("v5e:2x2", MeshConfig(), 257, 1024, 16),
        ("v5e:2x2", MeshConfig(tensor=2), 77, 768, 12),
        ("v4:2x2x1", MeshConfig(fsdp=2), MAX_TOKENS, 1024, 16),
        ("v5p:2x2x1", MeshConfig(), 37, 1664, 26),
    ],
)
def test_tpu_compilers_take_the_kernels_and_no_scores_are_written(
    topology, mesh_config, tokens, width, heads
):
    mesh = make_mesh(mesh_config, 64, topology_devices(topology))

    def loss(qkv):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(attention(qkv, heads, causal=True).astype(jnp.float32) ** 2)

    split = jax.sharding.NamedSharding(mesh, P(("replica", "fsdp"), None, None, "tensor"))
    qkv = jax.ShapeDtypeStruct((64, tokens, 3, width), jnp.bfloat16, sharding=split)
    text = jax.jit(jax.grad(loss), out_shardings=split).lower(qkv).compile().as_text()
    assert "attention_forward" in text and "attention_backward" in text
    assert f"{tokens},{tokens}]" not in text
