"""The text tower: OpenAI CLIP's causal transformer, pooled at the end-of-text token."""

import jax
import jax.numpy as jnp
from flax import nnx

from hqclip_jax.config import ModelConfig
from hqclip_jax.models.transformer import Transformer, layer_norm
from hqclip_jax.models.zoo import Tower


class TextTransformer(nnx.Module):
    """Token and positional embeddings, causal blocks, ln_final, EOT pooling."""

    def __init__(
        self, tower: Tower, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs
    ) -> None:
        normal, dtype = nnx.initializers.normal, jnp.dtype(config.dtype)
        self.dtype = dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (vocab_size, tower.width)))
        self.positional_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, tower.width))
        )
        self.transformer = Transformer(tower, config, causal=True, rngs=rngs)
        self.ln_final = layer_norm(tower.width, dtype, rngs)

    def __call__(self, text_BxL: jax.Array) -> jax.Array:
        """Pooled features [B, width]. The end-of-text token has the highest id of the vocabulary,
        so its first position is the arg max; normalising only the pooled token is the same."""
        x = self.token_embedding[...].at[text_BxL].get(mode="clip").astype(self.dtype)
        x = x + self.positional_embedding[...].astype(self.dtype)
        x = self.transformer(x)
        end_B = jnp.argmax(text_BxL, axis=-1)
        return self.ln_final(jnp.take_along_axis(x, end_B[:, None, None], axis=1)[:, 0])
