"""Softmax attention, by the form that the device at hand is best at."""

from functools import partial

import jax
import jax.numpy as jnp

from hqclip_jax.models import tpu_attention
from hqclip_jax.sharding import BATCH_AXES, P, join_rows, rows_per_device, split_rows

# Scores in f32 that a device may hold at a time, where no kernel keeps them on the chip: those of
# 352 images of 257 tokens, 16 heads, are 1.4 GiB, and the backward pass has several of that size.
SCORES_BYTES = 400 * 2**20


def is_fused(platform: str, tokens: int, width: int, heads: int, dtype: jnp.dtype) -> bool:
    """Whether a kernel does it all, and scores are never written to memory.

    Args:
        platform: "tpu", "gpu" or "cpu".
        width: features of all heads that a device has.
    """
    if platform == "gpu":  # cuDNN's
        return dtype == jnp.bfloat16 and width // heads % 8 == 0
    return platform == "tpu" and tpu_attention.supports(tokens, width, heads, dtype)


def attention(qkv_3xBxLxD: jax.Array, heads: int, *, causal: bool) -> jax.Array:
    """Attention of each sequence over itself.

    Args:
        qkv_3xBxLxD: queries, keys and values; the D / heads features of a head side by side.
        heads: how many.
        causal: a token sees none behind it.

    Returns:
        [B, L, D], of the type that came in; scores and softmax are f32.
    """
    _, B, L, D = qkv_3xBxLxD.shape
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        # A program for several devices can't be told from one for a single device here, and the
        # TPU's kernel has to be.
        platform, split = jax.default_backend(), 1
        platform = "cpu" if platform == "tpu" else platform
    else:
        platform, split = mesh.abstract_device.platform, mesh.shape["tensor"]
    whole_heads = heads % split == 0
    fused = whole_heads and is_fused(platform, L, D // split, heads // split, qkv_3xBxLxD.dtype)
    if fused and platform == "tpu":
        return jax.shard_map(
            lambda qkv: tpu_attention.fused_attention(qkv, heads // split, causal),
            in_specs=P(None, BATCH_AXES, None, "tensor"),
            out_specs=P(BATCH_AXES, None, "tensor"),
            check_vma=False,
        )(qkv_3xBxLxD)
    of_heads = partial(
        jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn" if fused else "xla"
    )
    q, k, v = (x.reshape(B, L, heads, -1) for x in qkv_3xBxLxD)
    rows, parts = rows_per_device(B), 1
    while not fused and rows % (2 * parts) == 0 and rows // parts * heads * L**2 * 4 > SCORES_BYTES:
        parts *= 2
    if parts == 1:
        return of_heads(q, k, v).reshape(B, L, D)
    # A few sequences at a time, whose scores are computed again for the backward pass.
    again = jax.checkpoint(lambda qkv: of_heads(*qkv), prevent_cse=False)
    split_qkv = jax.tree.map(lambda x: split_rows(x, parts), (q, k, v))
    return join_rows(jax.lax.map(again, split_qkv)).reshape(B, L, D)
