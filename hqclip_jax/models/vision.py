"""The image tower: OpenAI CLIP's vision transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.transformer import LayerNorm, Transformer
from hqclip_jax.models.zoo import Architecture

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def patches_kept(arch: Architecture, image_size: int, patch_dropout: float) -> int:
    """How many patches of an image training shows; OpenCLIP's rounding."""
    return max(1, int((image_size // arch.patch) ** 2 * (1 - patch_dropout)))


def draw_patches(key: jax.Array, images: int, patches: int, kept: int) -> jax.Array:
    """Which patches each image keeps (FLIP, Li et al. 2023): `kept` distinct indices in rising
    order, int32 [images, kept], uniform over all choices."""
    order = jnp.argsort(jax.random.uniform(key, (images, patches)), axis=1)
    return jnp.sort(order[:, :kept], axis=1).astype(jnp.int32)


class VisionTransformer(nnx.Module):
    """Class token, ln_pre, blocks, class-token pooling, ln_post; or CLIPA's form of it.

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
        self.average = arch.clipa
        self.patch_embed = nnx.Linear(
            arch.patch**2 * 3, width, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.positional_embedding = nnx.Param(normal(rngs.params(), (tokens, width)))
        self.ln_pre = None if arch.clipa else LayerNorm(width, rngs=rngs)
        self.transformer = Transformer(arch.vision, config, causal=False, rngs=rngs)
        self.ln_post = LayerNorm(width, rngs=rngs)

    def __call__(self, image_BxHxWx3: jax.Array, keep_BxK: jax.Array | None = None) -> jax.Array:
        """Pooled features [B, width] of uint8 images; normalised here, on the device.

        Args:
            keep_BxK: indices of the patches that are seen, row by row from the top left, as
                `draw_patches` gives them. The others are dropped before anything is computed.
        """
        B, H, W, _ = image_BxHxWx3.shape
        p = self.patch
        # Before the patches are cut: afterwards, v5e's compiler moves f32 arrays of four times the
        # size and takes twice as long over the product.
        x = ((image_BxHxWx3.astype(jnp.float32) / 255 - CLIP_MEAN) / CLIP_STD).astype(self.dtype)
        x = x.reshape(B, H // p, p, W // p, p, 3)
        x = x.swapaxes(2, 3).reshape(B, -1, p * p * 3)
        class_position, positions = jnp.split(self.positional_embedding[...], [1])
        if keep_BxK is not None:
            x = jnp.take_along_axis(x, keep_BxK[..., None], axis=1)
            positions = positions[keep_BxK]
        x = self.patch_embed(x) + positions.astype(self.dtype)
        cls = (self.class_embedding[...] + class_position).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, x.shape[-1])), x], axis=1)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = self.transformer(x)
        return self.ln_post(jnp.mean(x[:, 1:], axis=1) if self.average else x[:, 0])
