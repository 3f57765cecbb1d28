"""Softmax attention for TPUs as one kernel each way, for sequences as short as CLIP's.

All scores of a head fit on the chip, so no running maximum is needed, as flash attention has it: a
head's scores are made, used and forgotten, in the backward pass anew, and the L × L matrix never
reaches memory. Queries, keys and values are read as the projection wrote them, tokens × features;
XLA's own form transposes each of them, and 257 tokens fill its tiles by two thirds.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # the width of a register, and of the heads that are worked on together
# Of the 16 MiB that a kernel gets: five f32 matrices of scores, and two of each block.
MAX_TOKENS = 640
_BLOCK_BYTES = 2**22
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # x yᵀ
_COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # xᵀ y


def supports(tokens: int, width: int, heads: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take so many heads of so many features in all."""
    return (
        dtype == jnp.bfloat16
        and tokens <= MAX_TOKENS
        and width % LANES == 0
        and width % heads == 0
        and LANES % (width // heads) == 0
    )


_dot = partial(lax.dot_general, preferred_element_type=jnp.float32)


def _probabilities(q_LxD: jax.Array, k_LxD: jax.Array, scale: float, causal: bool) -> jax.Array:
    """Softmax over the keys, f32 [L, L]. Queries that are zero outside of a head see that head."""
    s_LxL = _dot(q_LxD, k_LxD, _ROWS_BY_ROWS)
    if causal:
        query, key = (lax.broadcasted_iota(jnp.int32, s_LxL.shape, i) for i in (0, 1))
        s_LxL = jnp.where(query >= key, s_LxL, -jnp.inf)
    e_LxL = jnp.exp((s_LxL - jnp.max(s_LxL, axis=1, keepdims=True)) * scale)
    return e_LxL / jnp.sum(e_LxL, axis=1, keepdims=True)


def _for_heads(tokens: int, width: int, head: int, work: Callable) -> None:
    """Calls `work` for each slice of `LANES` features, with a mask of every head in it. A product
    with what is masked costs no more than one with the head alone, which would leave the rest of
    the register and of the matrix unit empty, and it moves nothing."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    masks = [lane // head == h for h in range(LANES // head)]

    # Short sequences leave the chip waiting for one product's end before the next one's start,
    # unless several are under way; of long ones more code would only take longer to compile.
    slices = width // LANES
    at_once = next(
        n for n in range(slices, 0, -1) if n == 1 or (slices % n == 0 and n * tokens <= 512)
    )

    @pl.loop(0, slices, unroll=at_once)
    def _(i: jax.Array) -> None:
        work(pl.ds(pl.multiple_of(i * LANES, LANES), LANES), masks)


def _forward(qkv_ref, o_ref, *, head: int, causal: bool) -> None:
    def work(lanes: pl.Slice, masks: list[jax.Array]) -> None:
        q, k, v = (qkv_ref[i, 0, :, lanes] for i in range(3))
        o = jnp.zeros(q.shape, jnp.float32)
        for mask in masks:
            p = _probabilities(jnp.where(mask, q, 0), k, head**-0.5, causal)
            o = jnp.where(mask, jnp.dot(p.astype(v.dtype), v, preferred_element_type=o.dtype), o)
        o_ref[0, :, lanes] = o.astype(o_ref.dtype)

    _for_heads(*o_ref.shape[1:], head, work)


def _backward(qkv_ref, do_ref, dqkv_ref, *, head: int, causal: bool) -> None:
    def work(lanes: pl.Slice, masks: list[jax.Array]) -> None:
        q, k, v = (qkv_ref[i, 0, :, lanes] for i in range(3))
        do = do_ref[0, :, lanes]
        dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
        for mask in masks:
            p = _probabilities(jnp.where(mask, q, 0), k, head**-0.5, causal)
            dp = _dot(jnp.where(mask, do, 0), v, _ROWS_BY_ROWS)
            ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * head**-0.5
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq = jnp.where(mask, jnp.dot(ds, k, preferred_element_type=dq.dtype), dq)
            dk = jnp.where(mask, _dot(ds, q, _COLUMNS_BY_COLUMNS), dk)
            dv = jnp.where(mask, _dot(p, do, _COLUMNS_BY_COLUMNS), dv)
        for i, d in enumerate((dq, dk, dv)):
            dqkv_ref[i, 0, :, lanes] = d.astype(dqkv_ref.dtype)

    _for_heads(*do_ref.shape[1:], head, work)


def _call(
    kernel: Callable,
    inputs: tuple[jax.Array, ...],
    out_shape: jax.ShapeDtypeStruct,
    products: int,
    heads: int,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """Runs a kernel over a grid of sequences and of as many heads at a time as fit."""
    B, L, D = inputs[-1].shape[-3:]
    groups = next(
        n for n in range(D // LANES, 0, -1)
        if D // LANES % n == 0 and (n == 1 or n * LANES * L * 7 * 2 <= _BLOCK_BYTES)
    )  # fmt: skip
    joint = pl.BlockSpec((3, 1, L, groups * LANES), lambda b, g: (0, b, 0, g))
    single = pl.BlockSpec((1, L, groups * LANES), lambda b, g: (b, 0, g))

    def spec(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return joint if x.ndim == 4 else single

    size = sum(x.size * x.dtype.itemsize for x in (*inputs, out_shape))
    return pl.pallas_call(
        partial(kernel, head=D // heads, causal=causal),
        grid=(B, D // (groups * LANES)),
        in_specs=[spec(x) for x in inputs],
        out_specs=spec(out_shape),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        # For the scheduler, which lays transfers beside it.
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * B * L**2 * D, transcendentals=B * heads * L**2,
            bytes_accessed=size,
        ),
        interpret=interpret,
        name=f"attention{kernel.__name__}",
    )(*inputs)  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def fused_attention(
    qkv_3xBxLxD: jax.Array, heads: int, causal: bool, interpret: bool = False
) -> jax.Array:
    """Attention of each sequence over itself, on one device.

    Args:
        qkv_3xBxLxD: queries, keys and values, the features of a head side by side, as `supports`
            has it; scores and sums are f32 whatever the type.
        heads: how many share the D features; D / heads divides 128.
        causal: a token sees none behind it.
        interpret: run by XLA on any device, for tests.

    Returns:
        [B, L, D], of the type that came in.
    """
    x = qkv_3xBxLxD
    out = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    # Two products of L × L × D: the scores and the outputs.
    return _call(_forward, (x,), out, 2, heads, causal, interpret)


def _fused_fwd(
    qkv: jax.Array, heads: int, causal: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    return fused_attention(qkv, heads, causal, interpret), qkv


def _fused_bwd(
    heads: int, causal: bool, interpret: bool, qkv: jax.Array, do: jax.Array
) -> tuple[jax.Array]:
    out = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
    return (_call(_backward, (qkv, do), out, 5, heads, causal, interpret),)


fused_attention.defvjp(_fused_fwd, _fused_bwd)
