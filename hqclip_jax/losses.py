"""The losses: pure functions, f32 inside, each weighted and logged by `step.py`.

Shape suffixes: `b` images per device, `B` images of the global batch, D shared space, V tags,
T tags kept per image. Embeddings are unit length; `scale` is exp(logit_scale).

The label matrix of one batch, images down, texts across; + is pulled together, · pushed apart:

            ztxt_0  ztxt_1  ztxt_2      zneg_0  zneg_1  zneg_2
    zimg_0    +       ·       ·           ·       a       a
    zimg_1    ·       +       ·           a       ·       a
    zimg_2    ·       ·       +           a       a       ·
            contrastive, both ways      HNI: each image against its own negative (pair), that and
                                        the batch's texts (own), those and all negatives a (all)

What ends in `_reference` builds the matrices as one reads them, for tests and one device;
`image_text` is what training runs, on any mesh, through `similarity`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hqclip_jax.config import LossConfig
from hqclip_jax.similarity import Sums, logit_sums

Metrics = dict[str, jax.Array]


def _logits(z_BxD: jax.Array, other_BxD: jax.Array, scale: jax.Array) -> jax.Array:
    z_BxD, other_BxD = z_BxD.astype(jnp.float32), other_BxD.astype(jnp.float32)
    return scale * jnp.matmul(z_BxD, other_BxD.T, precision=jax.lax.Precision.HIGHEST)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the entries with weights `mask`; 0, with no gradient, where all are 0."""
    mask = mask.astype(jnp.float32)
    total = jnp.sum(mask)
    return jnp.sum(jnp.where(mask > 0, values, 0) * mask) / jnp.where(total > 0, total, 1)


def contrastive_reference(
    zimg_BxD: jax.Array, ztxt_BxD: jax.Array, scale: jax.Array, weight_B: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """CLIP's loss (Radford et al. 2021, figure 3), as one reads it.

    Args:
        weight_B: of each pair in the mean; at 0 its text and image are no rivals of others either.

    Returns:
        loss, the mean of the image→text and text→image cross-entropies; and the share of images
        whose own text scores above all others. A tie is wrong.
    """
    B = len(zimg_BxD)
    weight_B = jnp.ones(B) if weight_B is None else weight_B
    there_BxB = (weight_B[:, None] > 0) & (weight_B > 0) | jnp.eye(B, dtype=bool)
    logits_BxB = jnp.where(there_BxB, _logits(zimg_BxD, ztxt_BxD, scale), -jnp.inf)
    image_to_text_B = -jnp.diag(jax.nn.log_softmax(logits_BxB, axis=1))
    text_to_image_B = -jnp.diag(jax.nn.log_softmax(logits_BxB, axis=0))
    above_B = jnp.sum(logits_BxB >= jnp.diag(logits_BxB)[:, None], axis=1) == 1
    loss = masked_mean((image_to_text_B + text_to_image_B) / 2, weight_B)
    return loss, masked_mean(above_B, weight_B)


def sigmoid_reference(
    zimg_BxD: jax.Array,
    ztxt_BxD: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    weight_B: jax.Array | None = None,
) -> jax.Array:
    """SigLIP's loss (Zhai et al. 2023, algorithm 1), as one reads it: every pair of the batch is
    its own yes or no, summed over texts, averaged over images."""
    B = len(zimg_BxD)
    weight_B = jnp.ones(B) if weight_B is None else weight_B
    labels_BxB = 2 * jnp.eye(B) - 1
    loss_BxB = -jax.nn.log_sigmoid(labels_BxB * (_logits(zimg_BxD, ztxt_BxD, scale) + bias))
    return masked_mean(jnp.sum(loss_BxB * (weight_B > 0), axis=1), weight_B)


def hni_reference(
    zimg_BxD: jax.Array,
    ztxt_BxD: jax.Array,
    zneg_BxD: jax.Array,
    mask_B: jax.Array,
    scale: jax.Array,
    form: str = "pair",
) -> jax.Array:
    """Hard negative identification, as one reads it: cross-entropies over explicit rivals."""
    B, eye = len(zimg_BxD), jnp.eye(len(zimg_BxD), dtype=bool)
    texts_BxB, negatives_BxB = (_logits(zimg_BxD, z, scale) for z in (ztxt_BxD, zneg_BxD))
    usable_BxB = jnp.broadcast_to(mask_B > 0, (B, B))
    rivals = {
        "pair": [jnp.where(eye, texts_BxB, -jnp.inf), jnp.where(eye, negatives_BxB, -jnp.inf)],
        "own": [texts_BxB, jnp.where(eye & usable_BxB, negatives_BxB, -jnp.inf)],
        "all": [texts_BxB, jnp.where(usable_BxB, negatives_BxB, -jnp.inf)],
    }[form]
    log_p_Bx2B = jax.nn.log_softmax(jnp.concatenate(rivals, axis=1), axis=1)
    return masked_mean(-jnp.diag(log_p_Bx2B[:, :B]), mask_B)


def contrastive(
    positive_B: jax.Array, sums: Sums, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`contrastive_reference` from the diagonal of the logit matrix and its sums."""
    loss_B = (sums.rows_B + sums.columns_B) / 2 - positive_B
    return masked_mean(loss_B, weight_B), masked_mean(sums.margin_B > 0, weight_B)


def hni(
    positive_B: jax.Array,
    negative_B: jax.Array,
    mask_B: jax.Array,
    texts_B: jax.Array | None = None,
    negatives_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Hard negative identification: which texts are the image's, which were made to mislead?

    Published: a loss over (image, positive, negative). Our inference are the forms, all
    −log e^{s⁺} / (Σ e^{texts} + Σ e^{negatives}) with the contrastive temperature. The default has
    the two own texts alone: softplus(s⁻ − s⁺), O(B·D), and nothing crosses devices but the mean.

    Args:
        positive_B: s⁺, the image's logit with its own text; `negative_B` with its own negative.
        mask_B: 0 where the record has no negative, or one that reads like the positive after the
            cut to the context length.
        texts_B: log-sum-exp of the image's logits with the batch's texts; its own alone where None.
        negatives_B: of those with the batch's usable negatives; its own alone where None.

    Returns:
        loss, and the share of unmasked images that score their positive above their own negative;
        an image that scores both the same counts as wrong.
    """
    texts_B = positive_B if texts_B is None else texts_B
    negatives_B = negative_B if negatives_B is None else negatives_B
    loss_B = jax.nn.softplus(negatives_B - texts_B) + (texts_B - positive_B)
    return masked_mean(loss_B, mask_B), masked_mean(positive_B > negative_B, mask_B)


def image_text(
    zimg_BxD: jax.Array,
    ztxt_BxD: jax.Array,
    scale: jax.Array,
    config: LossConfig,
    mesh: Mesh,
    *,
    zneg_BxD: jax.Array | None = None,
    neg_mask_B: jax.Array | None = None,
    bias: jax.Array | None = None,
    hni_scale: jax.Array | None = None,
    weight_B: jax.Array | None = None,
) -> Metrics:
    """The losses on embeddings, of the global batch: contrastive and HNI in their configured forms.

    Args:
        zimg_BxD: unit-length embeddings, rows split over the batch axes of `mesh`; f32 or bf16.
        ztxt_BxD: their texts.
        zneg_BxD: their negatives, with `neg_mask_B`; needed where `config.hni` is not 0.
        bias: SigLIP's, for `config.contrastive_form` sigmoid.
        hni_scale: temperature of HNI's own; `scale` where None.
        weight_B: of each pair; 0 takes it out of all sums. 1 where None.

    Returns:
        `loss/contrastive` and `accuracy`, `loss/hni`, `hni_accuracy` and `neg_share`: f32 scalars.
    """
    metrics: Metrics = {}
    softmax = config.contrastive_form == "softmax"
    mask_B = jnp.ones(len(zimg_BxD)) if weight_B is None else weight_B.astype(jnp.float32)
    cosine_B = _cosines(zimg_BxD, ztxt_BxD)
    if config.contrastive or (config.hni and config.hni_form != "pair"):
        sums = logit_sums(
            zimg_BxD, ztxt_BxD, scale, mesh,
            bias=bias, form=config.contrastive_form, image_mask_B=weight_B, text_mask_B=weight_B,
        )  # fmt: skip
    if config.contrastive and softmax:
        loss, accuracy = contrastive(scale * cosine_B, sums, mask_B)
        metrics |= {"loss/contrastive": loss, "accuracy": accuracy}
    elif config.contrastive:
        metrics["loss/contrastive"] = masked_mean(sums.rows_B, mask_B)
        metrics["accuracy"] = masked_mean(sums.margin_B > 0, mask_B)
    if config.hni:
        hni_scale = scale if hni_scale is None else hni_scale
        negative_B = hni_scale * _cosines(zimg_BxD, zneg_BxD)
        neg_mask_B = neg_mask_B * mask_B
        texts_B = negatives_B = None
        if config.hni_form != "pair":
            texts_B = sums.rows_B
        if config.hni_form == "all":
            negatives_B = logit_sums(zimg_BxD, zneg_BxD, scale, mesh, text_mask_B=neg_mask_B).rows_B
        metrics["loss/hni"], metrics["hni_accuracy"] = hni(
            hni_scale * cosine_B, negative_B, neg_mask_B, texts_B, negatives_B
        )
        metrics["neg_share"] = jnp.mean((neg_mask_B > 0).astype(jnp.float32))
    return metrics


def _cosines(z_BxD: jax.Array, other_BxD: jax.Array) -> jax.Array:
    """Row by row, f32 [B]."""
    return jnp.sum(z_BxD.astype(jnp.float32) * other_BxD.astype(jnp.float32), axis=-1)


def tag_classification(
    logits_BxV: jax.Array,
    tag_ids_BxT: jax.Array,
    form: str = "softmax",
    weights_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Short tag classification from the image alone.

    Published: a classification loss against the multi-hot target of the positive tags. The form is
    our inference: `softmax` is SuperClass's, a cross-entropy with the multi-hot target scaled to
    sum 1; `bce` is a sigmoid per tag, summed over V. Neither builds the [B, V] target.

    Args:
        logits_BxV: the tag head's output.
        tag_ids_BxT: ids of the image's tags without repeats, padded with −1. An image with none is
            masked out, never given a zero target.
        form: `softmax` or `bce`.
        weights_V: per-tag weights of the softmax target, such as inverse document frequencies.

    Returns:
        by image, f32 [B]: its loss; its recall, the share of its k tags that are among its k
        highest logits, where a tie counts as lower; and a mask that is 0 where it has no tag, or
        only tags that weigh nothing.
    """
    logits_BxV = logits_BxV.astype(jnp.float32)
    known_BxT = (tag_ids_BxT >= 0).astype(jnp.float32)
    ids_BxT = jnp.maximum(tag_ids_BxT, 0)
    count_B = jnp.sum(known_BxT, axis=1)
    # By comparing, not by indexing: of that the gradient is a scatter, and a head that is split
    # over devices would be gathered. What is compared is never written to memory.
    is_tag_BxTxV = tag_ids_BxT[:, :, None] == jnp.arange(logits_BxV.shape[1])
    at_BxT = jnp.sum(jnp.where(is_tag_BxTxV, logits_BxV[:, None, :], 0), axis=2)
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
    # Likewise by counting what scores as high, itself apart, not by sorting.
    seen_BxV = jax.lax.stop_gradient(logits_BxV)
    above_BxT = jnp.sum(seen_BxV[:, None, :] >= at_BxT[:, :, None], axis=2) - 1
    hits_B = jnp.sum(known_BxT * (above_BxT < count_B[:, None]), axis=1)
    return loss_B, hits_B / jnp.maximum(count_B, 1), mask_B.astype(jnp.float32)
