"""Softmax attention, by the form that the device at hand is best at."""

from functools import partial

import jax
import jax.numpy as jnp

from hqclip_jax.models import tpu_attention
from hqclip_jax.sharding import BATCH_AXES, P, join_rows, rows_per_device, split_rows, target

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


def attention(qkv_BxLx3xD: jax.Array, heads: int, *, causal: bool) -> jax.Array:
    """Attention of each sequence over itself.

    Args:
        qkv_BxLx3xD: queries, keys and values; the D / heads features of a head side by side.
        heads: how many.
        causal: a token sees none behind it.

    Returns:
        [B, L, D], of the type that came in; scores and softmax are f32.
    """
    B, L, _, D = qkv_BxLx3xD.shape
    platform, split = target()
    fused = heads % split == 0 and is_fused(
        platform, L, D // split, heads // split, qkv_BxLx3xD.dtype
    )
    if platform == "tpu":
        # Without a mesh it can't be told here whether the program is for one device or several,
        # and the kernel has to know.
        fused = fused and not jax.sharding.get_abstract_mesh().empty
        if fused:
            return jax.shard_map(
                lambda qkv: tpu_attention.fused_attention(qkv, heads // split, causal),
                in_specs=P(None, BATCH_AXES, None, "tensor"),
                out_specs=P(BATCH_AXES, None, "tensor"),
                check_vma=False,
            )(jnp.moveaxis(qkv_BxLx3xD, 2, 0))
    of_heads = partial(
        jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn" if fused else "xla"
    )
    # Of a split the gradient is one concatenation; of three slices, three padded arrays' sum.
    q, k, v = (x.reshape(B, L, heads, -1) for x in jnp.split(qkv_BxLx3xD, 3, axis=2))
    rows, parts = rows_per_device(B), 1
    while not fused and rows % (2 * parts) == 0 and rows // parts * heads * L**2 * 4 > SCORES_BYTES:
        parts *= 2
    if parts == 1:
        return of_heads(q, k, v).reshape(B, L, D)
    # A few sequences at a time, whose scores are computed again for the backward pass.
    again = jax.checkpoint(lambda qkv: of_heads(*qkv), prevent_cse=False)
    split_qkv = jax.tree.map(lambda x: split_rows(x, parts), (q, k, v))
    return join_rows(jax.lax.map(again, split_qkv)).reshape(B, L, D)
