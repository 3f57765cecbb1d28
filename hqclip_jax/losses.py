"""The losses: pure functions, f32 inside, each weighted and logged by `step.py`.

Shape suffixes: `b` images per device, `B` images of the global batch, D shared space, V tags,
T tags kept per image. Embeddings are unit length; `scale` is exp(logit_scale).

The label matrix of one batch, images down, texts across; + is pulled together, · pushed apart:

            ztxt_0  ztxt_1  ztxt_2      zneg_0  zneg_1  zneg_2
    zimg_0    +       ·       ·           ·
    zimg_1    ·       +       ·                   ·
    zimg_2    ·       ·       +                           ·
            contrastive, both ways      HNI: each image against its own negative only
"""

import jax
import jax.numpy as jnp

# On TPUs an f32 product is rounded to bf16 unless told otherwise: 0.4 of a logit at scale 100.
_EXACT = jax.lax.Precision.HIGHEST


def contrastive_reference(
    zimg_BxD: jax.Array, ztxt_BxD: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """CLIP's loss (Radford et al. 2021, figure 3), as one reads it: for tests and one device.

    Returns:
        loss, the mean of the image→text and text→image cross-entropies; and the share of images
        whose own text scores highest.
    """
    logits_BxB = scale * jnp.matmul(zimg_BxD, ztxt_BxD.T, precision=_EXACT)
    image_to_text = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits_BxB, axis=1)))
    text_to_image = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits_BxB, axis=0)))
    accuracy = jnp.mean(jnp.argmax(logits_BxB, axis=1) == jnp.arange(len(logits_BxB)))
    return (image_to_text + text_to_image) / 2, accuracy


def contrastive(
    zimg_bxD: jax.Array, ztxt_bxD: jax.Array, scale: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """`contrastive_reference` of the global batch, inside `shard_map` over the batch axes.

    Only the texts travel. The local block of logits gives the image→text log-sum-exp whole and
    this device's part of the text→image one, which two reductions of B numbers complete; so the
    work per device is b·B·D, not B²·D.

    Args:
        zimg_bxD: this device's images, f32.
        ztxt_bxD: their texts, in the same order.
        scale: exp(logit_scale), the same on every device.
        axes: the mesh axes that split the batch.

    Returns:
        loss and accuracy of the global batch, the same on every device.
    """
    b = zimg_bxD.shape[0]
    B = b * jax.lax.axis_size(axes)
    ztxt_BxD = jax.lax.all_gather(ztxt_bxD, axes, tiled=True)
    logits_bxB = scale * jnp.matmul(zimg_bxD, ztxt_BxD.T, precision=_EXACT)
    row_lse_b = jax.nn.logsumexp(logits_bxB, axis=1)
    # The maximum only guards the exponent; its derivative cancels.
    max_B = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_bxB, axis=0)), axes)
    sum_B = jax.lax.psum(jnp.sum(jnp.exp(logits_bxB - max_B), axis=0), axes)
    column_lse_B = max_B + jnp.log(sum_B)
    own_b = jax.lax.axis_index(axes) * b + jnp.arange(b)
    positive_b = logits_bxB[jnp.arange(b), own_b]
    rows = jax.lax.psum(jnp.sum(row_lse_b - 2 * positive_b), axes)
    loss = (rows + jnp.sum(column_lse_B)) / (2 * B)
    correct = jax.lax.psum(jnp.sum(jnp.argmax(logits_bxB, axis=1) == own_b), axes)
    return loss, correct / B


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the entries whose mask is 1; 0, with no gradient, where none is."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def hni(
    zimg_BxD: jax.Array,
    ztxt_BxD: jax.Array,
    zneg_BxD: jax.Array,
    mask_B: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Hard negative identification: which of its own two texts is the image's?

    Published: a loss over (image, positive, negative). Our inference: a two-way softmax per image,
    −log e^{s⁺}/(e^{s⁺}+e^{s⁻}) = softplus(s⁻ − s⁺), with the contrastive temperature. O(B·D), and
    nothing crosses devices but the mean.

    Args:
        mask_B: 0 where the record has no negative, or one that reads like the positive after the
            cut to the context length.

    Returns:
        loss, and the share of unmasked images that score their positive above their negative; an
        image that scores both the same counts as wrong.
    """
    positive_B = scale * jnp.sum(zimg_BxD * ztxt_BxD, axis=-1)
    negative_B = scale * jnp.sum(zimg_BxD * zneg_BxD, axis=-1)
    loss = masked_mean(jax.nn.softplus(negative_B - positive_B), mask_B)
    return loss, masked_mean(positive_B > negative_B, mask_B)


def tag_classification(
    logits_BxV: jax.Array,
    tag_ids_BxT: jax.Array,
    form: str = "softmax",
    weights_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Short tag classification from the image alone.

    Published: a classification loss against the multi-hot target of the positive tags. The form is
    our inference: `softmax` is SuperClass's, a cross-entropy with the multi-hot target scaled to
    sum 1; `bce` is a sigmoid per tag, summed over V. Neither builds the [B, V] target: the logits
    are gathered at the ids.

    Args:
        logits_BxV: the tag head's output.
        tag_ids_BxT: ids of the image's tags without repeats, padded with −1. An image with none is
            masked out, never given a zero target.
        form: `softmax` or `bce`.
        weights_V: per-tag weights of the softmax target, such as inverse document frequencies.

    Returns:
        loss, and recall: the share of an image's k tags that are among its k highest logits.
    """
    logits_BxV = logits_BxV.astype(jnp.float32)
    known_BxT = (tag_ids_BxT >= 0).astype(jnp.float32)
    ids_BxT = jnp.maximum(tag_ids_BxT, 0)
    count_B = jnp.sum(known_BxT, axis=1)
    at_BxT = jnp.take_along_axis(logits_BxV, ids_BxT, axis=1)
    if form == "softmax":
        weight_BxT = known_BxT if weights_V is None else known_BxT * weights_V[ids_BxT]
        # A tag that every record has weighs log 1 = 0; an image with only such tags is masked.
        total_B = jnp.sum(weight_BxT, axis=1)
        mask_B = total_B > 0
        mean_B = jnp.sum(weight_BxT * at_BxT, axis=1) / jnp.where(mask_B, total_B, 1)
        loss_B = jax.nn.logsumexp(logits_BxV, axis=1) - mean_B
    else:
        mask_B = count_B > 0
        # −log σ(x) = softplus(x) − x, so the whole target is a sum of x over the known tags.
        loss_B = jnp.sum(jax.nn.softplus(logits_BxV), axis=1) - jnp.sum(known_BxT * at_BxT, axis=1)
    T = min(tag_ids_BxT.shape[1], logits_BxV.shape[1])
    highest_BxT = jax.lax.top_k(jax.lax.stop_gradient(logits_BxV), T)[0]
    last_B = jnp.clip(count_B.astype(jnp.int32) - 1, 0, T - 1)
    threshold_B = jnp.take_along_axis(highest_BxT, last_B[:, None], axis=1)
    hits_B = jnp.sum(known_BxT * (at_BxT >= threshold_B), axis=1)
    recall = masked_mean(hits_B / jnp.maximum(count_B, 1), count_B > 0)
    return masked_mean(loss_B, mask_B), recall
