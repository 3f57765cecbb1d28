"""The pre-norm transformer that both towers share: layers stacked in one array and scanned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.attention import attention
from hqclip_jax.models.zoo import Tower
from hqclip_jax.sharding import gathered, rows_split, target

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


class JointLinear(nnx.LinearGeneral):
    """Queries, keys and values [..., 3, out] by one product, from a kernel [in, 3, out]."""

    def __init__(self, width: int, out: int, **options: Any) -> None:
        super().__init__(width, (3, out), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        platform, split = target()
        if platform == "tpu" or split > 1:
            # A TPU's compiler writes the three apart from one another at no cost; and as one
            # matrix, three parts that are each split over devices could not stay where they are.
            return super().__call__(x)
        # As a matrix: else XLA for CPUs transposes what it takes the kernel's gradient of.
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        y = x.astype(self.dtype) @ kernel.reshape(len(kernel), -1) + bias.reshape(-1)
        return y.reshape(*x.shape[:-1], *bias.shape)


class Block(nnx.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)); initialised as OpenCLIP's text tower."""

    def __init__(self, tower: Tower, act: str, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        width, normal = tower.width, nnx.initializers.normal
        residual_std = width**-0.5 * (2 * tower.layers) ** -0.5
        self.ln_1 = LayerNorm(width, rngs=rngs)
        # The last axis is the heads one after the other, so that a part of it is some of them.
        self.qkv = JointLinear(
            width, width, dtype=dtype, kernel_init=normal(width**-0.5), rngs=rngs
        )
        self.out = nnx.Linear(
            width, width, dtype=dtype, kernel_init=normal(residual_std), rngs=rngs
        )
        self.ln_2 = LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(
            width, tower.mlp, dtype=dtype, kernel_init=normal((2 * width) ** -0.5), rngs=rngs
        )
        self.mlp_out = nnx.Linear(
            tower.mlp, width, dtype=dtype, kernel_init=normal(residual_std), rngs=rngs
        )
        self.heads = tower.heads
        self.act = act

    def __call__(self, x_BxLxD: jax.Array, *, causal: bool) -> jax.Array:
        qkv_BxLx3xD = self.qkv(self.ln_1(x_BxLxD))
        x_BxLxD += self.out(attention(qkv_BxLx3xD, self.heads, causal=causal))
        hidden = self.mlp_in(self.ln_2(x_BxLxD))
        # Its input is all that the backward pass need keep of an activation.
        act = jax.checkpoint(ACTIVATIONS[self.act], prevent_cse=False)
        return x_BxLxD + self.mlp_out(act(hidden))


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

        def block(x_BxLxD: jax.Array, layer: dict) -> tuple[jax.Array, None]:
            layer = gathered(layer, x_BxLxD.dtype, stack="blocks")
            return nnx.merge(graphdef, layer)(rows_split(x_BxLxD), causal=self.causal), None

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            # Inside a scan nothing can be merged back, so the barrier would only cost time.
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x_BxLxD, _ = jax.lax.scan(block, x_BxLxD, nnx.to_pure_dict(layers), unroll=self.unroll)
        return x_BxLxD
