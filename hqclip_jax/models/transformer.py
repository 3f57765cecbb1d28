"""The pre-norm transformer that both towers share: layers stacked in one array and scanned."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.zoo import Tower
from hqclip_jax.sharding import gathered, join_rows, rows_per_device, rows_split, split_rows

LN_EPSILON = 1e-5  # OpenAI's; NNX's default is 1e-6


def gelu(x: jax.Array) -> jax.Array:
    """Exactly, by erf in f32: `jax.nn.gelu` takes erfc, several times the work for accuracy in the
    negative tail that x, or bf16, does not have."""
    x32 = x.astype(jnp.float32)
    return (x32 * (0.5 + 0.5 * jax.lax.erf(x32 * np.sqrt(0.5, dtype=np.float32)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's weights were trained with it
}

# What a layer keeps for the backward pass; the rest is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# Scores in f32 that a device may hold at a time. Those of 352 images of 257 tokens, 16 heads, are
# 1.4 GiB, and the backward pass has several of that size: more than all else of a layer.
SCORES_BYTES = 400 * 2**20


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Softmax attention over [B, L, heads, width of a head].

    On a GPU cuDNN's fused kernel, which never writes the L × L scores; it takes 16-bit numbers and
    heads that are a multiple of 8 wide. JAX does not choose it by itself. Elsewhere a few sequences
    at a time, where the scores of all would be large.
    """
    fused = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0
    heads = partial(
        jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn" if fused else "xla"
    )
    B, L, H, _ = q.shape
    rows, parts = rows_per_device(B), 1
    while not fused and rows % (2 * parts) == 0 and rows // parts * H * L**2 * 4 > SCORES_BYTES:
        parts *= 2
    if parts == 1:
        return heads(q, k, v)
    split = jax.tree.map(lambda x: split_rows(x, parts), (q, k, v))
    again = jax.checkpoint(lambda qkv: heads(*qkv), prevent_cse=False)
    return join_rows(jax.lax.map(again, split))


@partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Zero mean and unit variance over the last axis, in f32; the backward pass starts from x,
    which is kept anyway."""
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + LN_EPSILON)
    return (x32 * scale + bias).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """As torch has it. NNX's own spreads the deviations over all features before it multiplies, and
    so writes and sums arrays of the size of x that hold one number a row."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...])


class Block(nnx.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)); initialised as OpenCLIP's text tower."""

    def __init__(self, tower: Tower, act: str, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        width, head = tower.width, tower.width // tower.heads
        normal = nnx.initializers.normal
        residual_std = width**-0.5 * (2 * tower.layers) ** -0.5
        self.ln_1 = LayerNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(
            width, (3, tower.heads, head), dtype=dtype, kernel_init=normal(width**-0.5), rngs=rngs
        )
        self.out = nnx.LinearGeneral(
            (tower.heads, head), width, axis=(-2, -1), dtype=dtype,
            kernel_init=normal(residual_std), rngs=rngs,
        )  # fmt: skip
        self.ln_2 = LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(
            width, tower.mlp, dtype=dtype, kernel_init=normal((2 * width) ** -0.5), rngs=rngs
        )
        self.mlp_out = nnx.Linear(
            tower.mlp, width, dtype=dtype, kernel_init=normal(residual_std), rngs=rngs
        )
        self.act = act

    def __call__(self, x_NxD: jax.Array, length: int, *, causal: bool) -> jax.Array:
        """N tokens, which are sequences of `length` one after the other."""
        qkv_NxCxHxW = self.qkv(self.ln_1(x_NxD))
        qkv_BxLxCxHxW = qkv_NxCxHxW.reshape(-1, length, *qkv_NxCxHxW.shape[1:])
        # Of a split the gradient is one concatenation; of three slices, three padded arrays' sum.
        q, k, v = (part[:, :, 0] for part in jnp.split(qkv_BxLxCxHxW, 3, axis=2))
        heads_BxLxHxW = attention(q, k, v, causal=causal)
        x_NxD += self.out(heads_BxLxHxW.reshape(-1, *heads_BxLxHxW.shape[2:]))
        hidden = self.mlp_in(self.ln_2(x_NxD))
        # Its input is all that the backward pass need keep of an activation.
        act = jax.checkpoint(ACTIVATIONS[self.act], prevent_cse=False)
        return x_NxD + self.mlp_out(act(hidden))


class Transformer(nnx.Module):
    """`tower.layers` blocks whose parameters carry a leading layer axis.

    One block is traced, whatever the depth, and `unroll` of them are compiled; `remat` names what
    each keeps.
    """

    def __init__(self, tower: Tower, config: ModelConfig, *, causal: bool, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        stack = nnx.vmap(
            lambda rngs: Block(tower, config.act, dtype, rngs=rngs), in_axes=0, out_axes=0
        )
        self.blocks = nnx.split_rngs(splits=tower.layers)(stack)(rngs)
        self.remat = config.remat
        self.unroll = min(config.unroll, tower.layers)
        self.causal = causal

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        graphdef, layers = nnx.split(self.blocks)

        length = x_BxLxD.shape[1]

        def block(x_NxD: jax.Array, layer: dict) -> tuple[jax.Array, None]:
            layer = gathered(layer, x_NxD.dtype, stack="blocks")
            return nnx.merge(graphdef, layer)(rows_split(x_NxD), length, causal=self.causal), None

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            # Inside a scan nothing can be merged back, so the barrier would only cost time.
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x_NxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
        x_NxD, _ = jax.lax.scan(block, x_NxD, nnx.to_pure_dict(layers), unroll=self.unroll)
        return x_NxD.reshape(x_BxLxD.shape)
