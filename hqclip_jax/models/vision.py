"""The image tower: OpenAI CLIP's vision transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.transformer import Transformer, layer_norm
from hqclip_jax.models.zoo import Architecture

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class VisionTransformer(nnx.Module):
    """Class token, ln_pre, blocks, class-token pooling, ln_post.

    The projection to the shared space belongs to `CLIP`: the tag head reads what comes before it.
    """

    def __init__(self, arch: Architecture, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        size, dtype = config.image_size, jnp.dtype(config.dtype)
        if size % arch.patch:
            raise ValueError(f"image_size {size} is not a multiple of the patch {arch.patch}")
        width = arch.vision.width
        tokens = (size // arch.patch) ** 2 + 1
        normal = nnx.initializers.normal(width**-0.5)
        self.patch = arch.patch
        self.dtype = dtype
        self.patch_embed = nnx.Linear(
            arch.patch**2 * 3, width, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.positional_embedding = nnx.Param(normal(rngs.params(), (tokens, width)))
        self.ln_pre = layer_norm(width, dtype, rngs)
        self.transformer = Transformer(arch.vision, config, causal=False, rngs=rngs)
        self.ln_post = layer_norm(width, dtype, rngs)

    def __call__(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Pooled features [B, width] of uint8 images; normalised here, on the device."""
        B, H, W, _ = image_BxHxWx3.shape
        p = self.patch
        x = (image_BxHxWx3.astype(jnp.float32) / 255 - CLIP_MEAN) / CLIP_STD
        x = x.reshape(B, H // p, p, W // p, p, 3).swapaxes(2, 3).reshape(B, -1, p * p * 3)
        x = self.patch_embed(x.astype(self.dtype))
        cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (B, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positional_embedding[...].astype(self.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0])
