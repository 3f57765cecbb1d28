"""AdamW with the paper's masks and schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hqclip_jax.config import OptimConfig

# By name, not by rank: stacked norms and biases are [layers, width] and would look like matrices.
# The list is OpenCLIP's: norms, biases, the temperature and the (one-dimensional) class token.
_NO_DECAY = (
    "bias", "scale", "logit_scale", "logit_bias", "hni_logit_scale", "class_embedding",
)  # fmt: skip


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay pulls towards zero."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _NO_DECAY, params)


def warmup_cosine(peak: float, warmup: int, total: int) -> optax.Schedule:
    """OpenCLIP's schedule: linear from peak/warmup at the first step, then a cosine to 0."""

    def lr(step: jax.Array) -> jax.Array:
        ramp = (step + 1) / max(warmup, 1)
        progress = (step - warmup) / max(total - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return peak * jnp.where(step < warmup, ramp, cosine)

    return lr


def make_tx(config: OptimConfig, warmup: int, total: int) -> optax.GradientTransformation:
    """The optimizer of a run of `total` steps."""
    adamw = optax.adamw(
        warmup_cosine(config.lr, warmup, total),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.mu_dtype,
    )
    # A link in the chain either way, so that a run may continue with or without clipping.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
