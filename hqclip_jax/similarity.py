"""Sums over the rows and columns of the global batch's logit matrix, which no device ever holds.

The matrix is l_ij = scale · zimg_i · ztxt_j + bias, B × B numbers; every contrastive loss is a
function of its diagonal and of sums along its rows and columns. Each device keeps its b images and
sees all texts, k at a time, in one of two ways:

    gathered   all texts are gathered once: B·D numbers per device
    ring       k texts travel from device to device with what is known of their columns, and in
               the backward pass with their gradient; nothing of the size of the batch exists.
               Where devices are in slices with a slower network between, they go round their
               own slice first, then all at once to the next one

In both the blocks of the matrix are computed again in the backward pass, and row and column sums
come from the same block, so only one side ever travels.

Suffixes as in `losses`: `b` images per device, `B` in the global batch, `k` texts at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from hqclip_jax.sharding import BATCH_AXES, P, slices_among

WAYS = ("gathered", "ring")
FORMS = ("softmax", "sigmoid")

# What one device may spend on the gathered texts and their gradient.
GATHERED_BYTES = 64 * 2**20
# One block of logits, b × k in f32. A few of that size live at once.
BLOCK_BYTES = 4 * 2**20
# Fewer texts at a time would leave a matrix unit idle.
MIN_CHUNK = 128

# Added to the logits of images and texts that are masked out: e^_MASKED is 0 beside any logit in
# reach, and unlike -inf it leaves differences of masked numbers finite.
_MASKED = -1e4


class Sums(NamedTuple):
    """Of the logit matrix, f32 [B] each.

    Attributes:
        rows_B: softmax: log Σ_j e^{l_ij}, image i against all texts. sigmoid: −Σ_j log σ(±l_ij).
        columns_B: softmax: log Σ_i e^{l_ij}, text j against all images. sigmoid: 0.
        margin_B: l_ii − max_{j≠i} l_ij, of image i's own text over the best wrong one; 0 is a tie.
            It has no gradient.
    """

    rows_B: jax.Array
    columns_B: jax.Array
    margin_B: jax.Array


class _Images(NamedTuple):
    """This device's images: embeddings, what masks them, their place in the global batch."""

    z_bxD: jax.Array
    mask_b: jax.Array
    index_b: jax.Array


class _Texts(NamedTuple):
    """Texts on their way. The backward pass adds each column's sum and the sum's cotangent."""

    z_kxD: jax.Array
    mask_k: jax.Array
    index_k: jax.Array
    sum_k: jax.Array | None = None
    dsum_k: jax.Array | None = None


def logit_sums(
    zimg_BxD: jax.Array,
    ztxt_BxD: jax.Array,
    scale: jax.Array,
    mesh: Mesh,
    *,
    bias: jax.Array | None = None,
    form: str = "softmax",
    image_mask_B: jax.Array | None = None,
    text_mask_B: jax.Array | None = None,
    way: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Sums:
    """Row and column sums of the whole logit matrix, differentiable in z, scale and bias.

    Args:
        zimg_BxD: unit-length embeddings, split over the batch axes of `mesh`; f32, or bf16 for half
            the traffic. Products are exact and sums f32 in either.
        ztxt_BxD: their texts in the same order and type.
        scale: exp(logit_scale).
        bias: added to every logit (SigLIP's); 0 where None.
        form: `softmax` or `sigmoid`; see `Sums`.
        image_mask_B: 0 takes an image out of all columns. Its own row is then meaningless.
        text_mask_B: 0 takes a text out of all rows.
        way: `gathered` or `ring`; by size where None.
        block_bytes: bound on one block of logits.
    """
    B, D = zimg_BxD.shape
    devices = mesh.shape["replica"] * mesh.shape["fsdp"]
    if way is None:
        gathered = B * D * (ztxt_BxD.dtype.itemsize + 4)
        way = "gathered" if devices == 1 or gathered <= GATHERED_BYTES else "ring"
    chunk = max(MIN_CHUNK, block_bytes // (4 * (B // devices)))
    masks = (
        jnp.zeros(B, jnp.float32) if m is None else jnp.where(m > 0, 0.0, _MASKED)
        for m in (image_mask_B, text_mask_B)
    )
    bias = jnp.float32(0) if bias is None else bias
    slices = slices_among(list(mesh.devices.flat))
    # Where `tensor` spans several nodes, so does each place of the ring.
    plan = _Plan(mesh, form, way, chunk, slices if devices % slices == 0 else 1)
    return Sums(*_sums(plan, zimg_BxD, ztxt_BxD, scale, bias, *masks))


@dataclass(frozen=True)
class _Plan:
    """How the sums are made; static."""

    mesh: Mesh
    form: str
    way: str
    chunk: int
    slices: int  # that the devices of a ring are in, one after the other


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(plan: _Plan, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    return _forward(plan, *inputs)[0]


def _forward(plan: _Plan, *inputs: jax.Array) -> tuple[tuple, tuple]:
    batch = P(BATCH_AXES)
    sums = jax.shard_map(
        partial(_device_forward, plan),
        mesh=plan.mesh,
        in_specs=(batch, batch, P(), P(), batch, batch),
        out_specs=(batch, batch, batch),
    )(*inputs)
    return sums, (*inputs, *sums[:2])


def _backward(plan: _Plan, residuals: tuple, cotangents: tuple) -> tuple:
    batch = P(BATCH_AXES)
    dzimg_BxD, dztxt_BxD, drow_B, dscale_B = jax.shard_map(
        partial(_device_backward, plan),
        mesh=plan.mesh,
        in_specs=(batch, batch, P(), P(), *[batch] * 6),
        out_specs=(batch,) * 4,
    )(*residuals, *cotangents[:2])
    masks = (jnp.zeros_like(mask) for mask in residuals[4:6])  # no gradient through them
    return dzimg_BxD, dztxt_BxD, jnp.sum(dscale_B), jnp.sum(drow_B), *masks


_sums.defvjp(_forward, _backward)


def _device_forward(
    plan: _Plan,
    zimg_bxD: jax.Array,
    ztxt_bxD: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    image_mask_b: jax.Array,
    text_mask_b: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    index_b = _index(len(zimg_bxD))
    images = _Images(zimg_bxD, image_mask_b, index_b)

    def visit(rows: tuple, texts: _Texts, columns: tuple) -> tuple[tuple, tuple]:
        l_bxk, own_bxk = _block(images, texts, scale, bias)
        max_b, sum_b, own_b, rival_b = rows
        # Both from this product: by another one, what is equal would differ by its rounding.
        own_b = jnp.maximum(own_b, jnp.max(jnp.where(own_bxk, l_bxk, -jnp.inf), axis=1))
        rival_b = jnp.maximum(rival_b, jnp.max(jnp.where(own_bxk, -jnp.inf, l_bxk), axis=1))
        if plan.form == "sigmoid":
            sum_b += jnp.sum(jax.nn.softplus(jnp.where(own_bxk, -l_bxk, l_bxk)), axis=1)
            return (max_b, sum_b, own_b, rival_b), columns
        return (*_add(max_b, sum_b, l_bxk, axis=1), own_b, rival_b), _add(*columns, l_bxk, axis=0)

    low_b, zero_b = (_varying(jnp.full(len(index_b), x, jnp.float32)) for x in (-jnp.inf, 0))
    texts = _Texts(ztxt_bxD, text_mask_b, index_b)
    (max_b, sum_b, own_b, rival_b), (column_max_b, column_sum_b) = _visit_all(
        plan, visit, (low_b, zero_b, low_b, low_b), texts, (low_b, zero_b), _combine
    )
    if plan.form == "sigmoid":
        return sum_b, zero_b, own_b - rival_b
    return max_b + jnp.log(sum_b), column_max_b + jnp.log(column_sum_b), own_b - rival_b


def _device_backward(
    plan: _Plan,
    zimg_bxD: jax.Array,
    ztxt_bxD: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    image_mask_b: jax.Array,
    text_mask_b: jax.Array,
    rows_b: jax.Array,
    columns_b: jax.Array,
    drows_b: jax.Array,
    dcolumns_b: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    index_b = _index(len(zimg_bxD))
    images = _Images(zimg_bxD, image_mask_b, index_b)

    def visit(grads: tuple, texts: _Texts, dz_kxD: jax.Array) -> tuple[tuple, jax.Array]:
        dzimg_bxD, dl_b = grads
        l_bxk, own_bxk = _block(images, texts, scale, bias)
        if plan.form == "sigmoid":
            sign_bxk = jnp.where(own_bxk, -1.0, 1.0)
            dl_bxk = drows_b[:, None] * sign_bxk * jax.nn.sigmoid(sign_bxk * l_bxk)
        else:
            dl_bxk = drows_b[:, None] * jnp.exp(l_bxk - rows_b[:, None])
            dl_bxk += texts.dsum_k * jnp.exp(l_bxk - texts.sum_k)
        dl_b += jnp.sum(dl_bxk, axis=1)
        # Rounded like the embeddings: with bf16 ones the matrix unit multiplies bf16 only.
        dl_bxk = dl_bxk.astype(texts.z_kxD.dtype)
        dzimg_bxD += _product("bk,kd->bd", dl_bxk, texts.z_kxD)
        return (dzimg_bxD, dl_b), dz_kxD + _product("bk,bd->kd", dl_bxk, images.z_bxD)

    zero_bxD = _varying(jnp.zeros(zimg_bxD.shape, jnp.float32))
    zero_b = _varying(jnp.zeros(len(index_b), jnp.float32))
    texts = _Texts(ztxt_bxD, text_mask_b, index_b, columns_b, dcolumns_b)
    (dzimg_bxD, dl_b), dztxt_bxD = _visit_all(
        plan, visit, (zero_bxD, zero_b), texts, zero_bxD,
        partial(lax.psum_scatter, axis_name=BATCH_AXES, tiled=True),
    )  # fmt: skip
    # Σ_ij dl_ij · cos_ij, without the matrix: the sum over j is already in dzimg.
    dscale_b = jnp.sum(dzimg_bxD * zimg_bxD.astype(jnp.float32), axis=1)
    dzimg_bxD, dztxt_bxD = scale * dzimg_bxD, scale * dztxt_bxD
    return dzimg_bxD.astype(zimg_bxD.dtype), dztxt_bxD.astype(ztxt_bxD.dtype), dl_b, dscale_b


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # On TPUs an f32 product is rounded to bf16 unless told otherwise: 0.4 of a logit at scale 100.
    # Of bf16 numbers it is exact in one pass.
    return jnp.einsum(
        spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _block(
    images: _Images, texts: _Texts, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits f32 [b, k] of this device's images and those texts, and which are positives."""
    l_bxk = scale * _product("bd,kd->bk", images.z_bxD, texts.z_kxD) + bias
    l_bxk += images.mask_b[:, None] + texts.mask_k
    return l_bxk, images.index_b[:, None] == texts.index_k


def _add(
    max_: jax.Array, sum_: jax.Array, l_bxk: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The running maximum and Σ e^{l − max} with one more block."""
    new = jnp.maximum(max_, jnp.max(l_bxk, axis=axis))
    shifted = jnp.exp(l_bxk - jnp.expand_dims(new, axis))
    return new, sum_ * jnp.exp(max_ - new) + jnp.sum(shifted, axis=axis)


def _index(b: int) -> jax.Array:
    """Places of this device's pairs in the global batch, int32 [b]."""
    return lax.axis_index(BATCH_AXES) * b + jnp.arange(b, dtype=jnp.int32)


def _varying(x: jax.Array) -> jax.Array:
    """A constant that is going to differ between devices, which shard_map wants to be told."""
    return lax.pcast(x, BATCH_AXES, to="varying")


def _combine(sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """This device's part of running sums that every device has over its own images."""
    max_B, sum_B = sums
    most_B = lax.pmax(max_B, BATCH_AXES)
    sum_b = lax.psum_scatter(sum_B * jnp.exp(max_B - most_B), BATCH_AXES, tiled=True)
    start = lax.axis_index(BATCH_AXES) * len(sum_b)
    return lax.dynamic_slice_in_dim(most_B, start, len(sum_b)), sum_b


# (sums over this device's rows, some texts, sums over their columns) → both sums, with this block
Visit = Callable[[Any, _Texts, Any], tuple[Any, Any]]


def _visit_all(
    plan: _Plan, visit: Visit, rows: Any, texts: _Texts, columns: Any, combine: Callable
) -> tuple[Any, Any]:
    """`visit` with the texts of all devices.

    Args:
        rows: sums over this device's images, where they start.
        texts: this device's.
        columns: sums over these texts' columns, where they start.
        combine: this device's columns whole, from every device's part of all columns.

    Returns:
        the sums over this device's rows and over its own texts' columns.
    """
    if plan.way == "ring":
        return _ring(visit, rows, texts, columns, plan.chunk, plan.slices)
    rows, columns = _gathered(visit, rows, texts, columns, plan.chunk)
    return rows, combine(columns)


def _ring(
    visit: Visit, rows: Any, texts: _Texts, columns: Any, chunk: int, slices: int
) -> tuple[Any, Any]:
    """Each device's texts and columns, `chunk` at a time, pass all devices and come home."""
    devices = lax.axis_size(BATCH_AXES)
    within = devices // slices
    next_device = [(i, i - i % within + (i + 1) % within) for i in range(devices)]
    next_slice = [(i, (i + within) % devices) for i in range(devices)]

    def send(to: list[tuple[int, int]], *travellers: Any) -> Any:
        return jax.tree.map(lambda x: lax.ppermute(x, BATCH_AXES, to), travellers)

    def hop(_: int, state: tuple) -> tuple:
        rows, texts, columns = state
        rows, columns = visit(rows, texts, columns)
        return rows, *send(next_device, texts, columns)

    def tour(_: int, state: tuple) -> tuple:
        rows, texts, columns = lax.fori_loop(0, within, hop, state)
        # One wait for the slower network in a tour, not one in each hop.
        return rows, *send(next_slice, texts, columns)

    def round_trip(*state: Any) -> tuple[Any, Any]:
        rows, _, columns = lax.fori_loop(0, slices, tour, state)
        return rows, columns

    return _over_chunks(round_trip, rows, texts, columns, chunk)


def _gathered(visit: Visit, rows: Any, texts: _Texts, columns: Any, chunk: int) -> tuple[Any, Any]:
    """Every device sees all texts; what it returns of their columns is its images' part."""
    texts = jax.tree.map(lambda x: lax.all_gather(x, BATCH_AXES, tiled=True), texts)
    devices = lax.axis_size(BATCH_AXES)
    columns = jax.tree.map(lambda x: jnp.tile(x, (devices,) + (1,) * (x.ndim - 1)), columns)
    return _over_chunks(visit, rows, texts, columns, chunk)


def _over_chunks(
    visit: Visit, rows: Any, texts: _Texts, columns: Any, chunk: int
) -> tuple[Any, Any]:
    """`visit` on `chunk` texts at a time, and on what is left over."""
    count = len(texts.index_k)
    whole = count // chunk * chunk
    split = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), (texts, columns))
    rows, done = lax.scan(lambda rows, x: visit(rows, *x), rows, split)
    done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), done)
    if whole < count:
        rest = jax.tree.map(lambda x: x[whole:], (texts, columns))
        rows, rest = visit(rows, *rest)
        done = jax.tree.map(lambda *parts: jnp.concatenate(parts), done, rest)
    return rows, done
