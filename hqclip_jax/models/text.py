"""The text tower: OpenAI CLIP's causal transformer, or CLIPA's without the mask."""

import jax
import jax.numpy as jnp
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.transformer import LayerNorm, Transformer
from hqclip_jax.models.zoo import Architecture


class TextTransformer(nnx.Module):
    """Token and positional embeddings, blocks, one token pooled, ln_final."""

    def __init__(
        self, arch: Architecture, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs
    ) -> None:
        normal, dtype = nnx.initializers.normal, jnp.dtype(config.dtype)
        width = arch.text.width
        self.dtype = dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (vocab_size, width)))
        self.positional_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, width))
        )
        self.transformer = Transformer(arch.text, config, causal=not arch.clipa, rngs=rngs)
        self.ln_final = LayerNorm(width, rngs=rngs)
        self.pool_last = arch.clipa

    def __call__(self, text_BxL: jax.Array) -> jax.Array:
        """Pooled features [B, width] of int32 token ids. Normalising the pooled token alone equals
        normalising all and then pooling."""
        # In f32, so that its gradient is: hundreds of texts add to the row of the start token, and
        # in bf16 a sum stops growing at 256 times its next term.
        table = self.token_embedding[...].astype(jnp.float32)
        x = table.at[text_BxL].get(mode="clip").astype(self.dtype)
        x = x + self.positional_embedding[...].astype(self.dtype)
        x = self.transformer(x)
        if self.pool_last:
            return self.ln_final(x[:, -1])
        # The end-of-text token has the highest id of the vocabulary, so its first position is this.
        end_B = jnp.argmax(text_BxL, axis=-1)
        return self.ln_final(jnp.take_along_axis(x, end_B[:, None, None], axis=1)[:, 0])
