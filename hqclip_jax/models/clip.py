"""The dual encoder."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hqclip_jax.config import Config
from hqclip_jax.models.text import TextTransformer
from hqclip_jax.models.vision import VisionTransformer
from hqclip_jax.models.zoo import ARCHITECTURES

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
# Zhai et al. 2023: nearly all pairs of a batch are negatives, so start from "no match".
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10), -10.0


def normalise(z_BxD: jax.Array) -> jax.Array:
    """Unit length, in f32 whatever comes in."""
    z_BxD = z_BxD.astype(jnp.float32)
    return z_BxD * jax.lax.rsqrt(jnp.sum(z_BxD**2, axis=-1, keepdims=True) + 1e-12)


class CLIP(nnx.Module):
    """Two towers, their projections, the temperature and, in training, the tag head.

    Args:
        config: `config.model` says what the towers are; `config.loss` adds the parameters that its
            forms learn: `logit_bias` (sigmoid), `hni_logit_scale` (a temperature of HNI's own).
        vocab_size: entries of the token embedding.
        num_tags: classes of the tag head; 0 builds none. The head is linear on the image feature,
            before the projection by default (our inference), and no part of an exported model.
    """

    def __init__(
        self, config: Config, vocab_size: int, num_tags: int = 0, *, rngs: nnx.Rngs
    ) -> None:
        arch, loss = ARCHITECTURES[config.model.arch], config.loss
        dtype = jnp.dtype(config.model.dtype)
        self.visual = VisionTransformer(arch, config.model, rngs=rngs)
        self.text = TextTransformer(arch, config.model, vocab_size, rngs=rngs)
        self.visual_projection = self._projection(arch.vision.width, arch.embed_dim, dtype, rngs)
        self.text_projection = self._projection(arch.text.width, arch.embed_dim, dtype, rngs)
        sigmoid = loss.contrastive_form == "sigmoid"
        initial = SIGMOID_LOGIT_SCALE if sigmoid else INITIAL_LOGIT_SCALE
        self.logit_scale = nnx.Param(jnp.float32(initial))
        self.logit_bias = nnx.Param(jnp.float32(SIGMOID_LOGIT_BIAS)) if sigmoid else None
        own = loss.hni and loss.hni_scale == "own"
        self.hni_logit_scale = nnx.Param(jnp.float32(INITIAL_LOGIT_SCALE)) if own else None
        self.tags_from_projected = loss.tag_input == "projected"
        width = arch.embed_dim if self.tags_from_projected else arch.vision.width
        # Sums of bf16 products are f32 anyway; rounded, many of thousands of logits would be equal.
        self.tag_head = (
            nnx.Linear(width, num_tags, dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs)
            if num_tags
            else None
        )

    @staticmethod
    def _projection(width: int, out: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
        init = nnx.initializers.normal(width**-0.5)
        return nnx.Linear(width, out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

    def encode_image(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """zimg f32 [B, D], unit length, of uint8 images [B, H, W, 3]."""
        return normalise(self.visual_projection(self.visual(image_BxHxWx3)))

    def encode_image_and_tags(
        self, image_BxHxWx3: jax.Array, keep_BxK: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """zimg [B, D] and the tag head's logits f32 [B, V], or None where there is no head.

        Args:
            keep_BxK: patches that are seen, as `VisionTransformer` takes them; None shows all.
        """
        pooled = self.visual(image_BxHxWx3, keep_BxK)
        projected = self.visual_projection(pooled)
        if self.tag_head is None:
            return normalise(projected), None
        tag_logits = self.tag_head(projected if self.tags_from_projected else pooled)
        return normalise(projected), tag_logits

    def encode_text(self, text_BxL: jax.Array) -> jax.Array:
        """ztxt f32 [B, D], unit length, of int32 token ids [B, L]."""
        return normalise(self.text_projection(self.text(text_BxL)))
