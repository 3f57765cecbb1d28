"""The dual encoder."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.text import TextTransformer
from hqclip_jax.models.vision import VisionTransformer
from hqclip_jax.models.zoo import ARCHITECTURES

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


def normalise(z_BxD: jax.Array) -> jax.Array:
    """Unit length, in f32 whatever comes in."""
    z_BxD = z_BxD.astype(jnp.float32)
    return z_BxD * jax.lax.rsqrt(jnp.sum(z_BxD**2, axis=-1, keepdims=True) + 1e-12)


class CLIP(nnx.Module):
    """Two towers, their projections, the temperature and, in training, the tag head.

    Args:
        config: architecture and resolution.
        vocab_size: entries of the token embedding.
        num_tags: classes of the tag head; 0 builds none. The head is linear on the pooled image
            feature before the projection (our inference) and no part of an exported model.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, num_tags: int = 0, *, rngs: nnx.Rngs
    ) -> None:
        arch = ARCHITECTURES[config.arch]
        dtype = jnp.dtype(config.dtype)
        self.visual = VisionTransformer(arch, config, rngs=rngs)
        self.text = TextTransformer(arch.text, config, vocab_size, rngs=rngs)
        self.visual_projection = self._projection(arch.vision.width, arch.embed_dim, dtype, rngs)
        self.text_projection = self._projection(arch.text.width, arch.embed_dim, dtype, rngs)
        self.logit_scale = nnx.Param(jnp.float32(INITIAL_LOGIT_SCALE))
        self.tag_head = (
            nnx.Linear(arch.vision.width, num_tags, dtype=dtype, rngs=rngs) if num_tags else None
        )

    @staticmethod
    def _projection(width: int, out: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
        init = nnx.initializers.normal(width**-0.5)
        return nnx.Linear(width, out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

    def encode_image(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """zimg f32 [B, D], unit length, of uint8 images [B, H, W, 3]."""
        return normalise(self.visual_projection(self.visual(image_BxHxWx3)))

    def encode_image_and_tags(self, image_BxHxWx3: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """zimg [B, D] and the tag head's logits f32 [B, V], or None where there is no head."""
        pooled = self.visual(image_BxHxWx3)
        tag_logits = None if self.tag_head is None else self.tag_head(pooled).astype(jnp.float32)
        return normalise(self.visual_projection(pooled)), tag_logits

    def encode_text(self, text_BxL: jax.Array) -> jax.Array:
        """ztxt f32 [B, D], unit length, of int32 token ids [B, L]."""
        return normalise(self.text_projection(self.text(text_BxL)))
