import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hqclip_jax.config import MeshConfig
from hqclip_jax.models.clip import normalise
from hqclip_jax.sharding import batch_sharding, make_mesh, replicated
from hqclip_jax.similarity import FORMS, WAYS, Sums, logit_sums

B, D = 48, 8
SCALE, BIAS = jnp.float32(14.3), jnp.float32(-2.0)
MESHES = {
    "1 device": (1, MeshConfig()),
    "2 devices": (2, MeshConfig()),
    "4 devices": (4, MeshConfig(fsdp=2)),
    "8 devices": (8, MeshConfig()),
    "8 devices, fsdp": (8, MeshConfig(fsdp=8)),
    "8 devices, fsdp and tensor": (8, MeshConfig(fsdp=2, tensor=2)),
}


def mesh_of(name: str, batch: int = B) -> jax.sharding.Mesh:
    devices, config = MESHES[name]
    return make_mesh(config, batch, jax.devices()[:devices])


def embeddings(*seeds: int, rows: int = B) -> list[jax.Array]:
    return [normalise(jax.random.normal(jax.random.key(s), (rows, D))) for s in seeds]


def reference(zimg, ztxt, scale, bias, form, image_mask, text_mask) -> Sums:
    """The matrix whole; what is masked is far below everything else."""
    l_BxB = scale * jnp.matmul(zimg, ztxt.T, precision="highest") + bias
    l_BxB = l_BxB + jnp.where(image_mask, 0, -1e4)[:, None] + jnp.where(text_mask, 0, -1e4)
    eye = jnp.eye(len(zimg), dtype=bool)
    margin_B = jnp.diag(l_BxB) - jnp.max(jnp.where(eye, -jnp.inf, l_BxB), axis=1)
    if form == "sigmoid":
        rows_B = jnp.sum(-jax.nn.log_sigmoid(jnp.where(eye, l_BxB, -l_BxB)), axis=1)
        return Sums(rows_B, jnp.zeros(len(zimg)), margin_B)
    lse = jax.nn.logsumexp
    return Sums(lse(l_BxB, axis=1), lse(l_BxB, axis=0), margin_B)


def gradients(sums_of, image_mask, text_mask):
    """Values, and gradients of a random weighing of rows and columns that are not masked. All
    weights are positive: else the sums cancel to a hundredth of their terms and of their digits."""
    weigh_rows, weigh_columns = jax.random.uniform(
        jax.random.key(9), (2, len(image_mask)), minval=0.5, maxval=1.5
    )

    def weighed(zimg, ztxt, scale, bias):
        rows_B, columns_B, margin_B = sums_of(zimg, ztxt, scale, bias)
        seen = (rows_B * image_mask, columns_B * text_mask, margin_B * image_mask)
        return jnp.sum(seen[0] * weigh_rows) + jnp.sum(seen[1] * weigh_columns), seen

    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2, 3), has_aux=True))


def assert_close(found, expected):
    """Largest difference within 1e-5 of the largest value, array by array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(np.abs(b).max()), 1e-6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_way_equals_the_whole_matrix_in_value_and_gradients(mesh, way, form):
    mask = jnp.ones(B, bool)
    z = embeddings(1, 2)
    sums_of = lambda *x: logit_sums(x[0], x[1], x[2], mesh_of(mesh), bias=x[3], form=form, way=way)
    found = gradients(sums_of, mask, mask)(*z, SCALE, BIAS)
    whole = lambda *x: reference(*x, form, mask, mask)
    assert_close(found, gradients(whole, mask, mask)(*z, SCALE, BIAS))


@pytest.mark.parametrize(("way", "form"), itertools.product(WAYS, FORMS))
def test_uneven_chunks_and_masked_rows_and_columns(way, form, monkeypatch):
    monkeypatch.setattr("hqclip_jax.similarity.MIN_CHUNK", 1)
    image_mask, text_mask = jnp.arange(B) % 5 > 0, jnp.arange(B) % 7 > 1
    z = embeddings(3, 4)
    mesh = mesh_of("4 devices")
    chunk = 5  # of 12 texts a device, or of 48 gathered ones: 2 or 3 are left over
    sums_of = lambda *x: logit_sums(
        x[0], x[1], x[2], mesh, bias=x[3], form=form, way=way, block_bytes=4 * (B // 4) * chunk,
        image_mask_B=image_mask, text_mask_B=text_mask,
    )  # fmt: skip
    found = gradients(sums_of, image_mask, text_mask)(*z, SCALE, BIAS)
    whole = lambda *x: reference(*x, form, image_mask, text_mask)
    assert_close(found, gradients(whole, image_mask, text_mask)(*z, SCALE, BIAS))


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_is_masked_gets_no_gradient(way):
    text_mask = jnp.ones(B).at[5].set(0)
    zimg, ztxt = embeddings(1, 2)
    mesh = mesh_of("8 devices")
    total = lambda z: jnp.sum(logit_sums(zimg, z, SCALE, mesh, text_mask_B=text_mask, way=way)[0])
    moved_B = np.abs(jax.jit(jax.grad(total))(ztxt)).sum(axis=1) > 0
    assert np.flatnonzero(~moved_B).tolist() == [5]


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_scale_and_collapsed_embeddings_stay_finite_and_right(way):
    zimg, ztxt = embeddings(3, 4)
    mesh, mask = mesh_of("8 devices"), jnp.ones(B, bool)
    sums = jax.jit(lambda *z: logit_sums(*z, jnp.float32(100), mesh, way=way))
    for z in ((zimg, zimg), (zimg, -zimg), (zimg[:1].repeat(B, 0), ztxt)):
        expected = reference(*z, jnp.float32(100), 0.0, "softmax", mask, mask)
        for found, right in zip(sums(*z), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4)


def test_bf16_embeddings_lose_only_their_own_rounding():
    z = [x.astype(jnp.bfloat16) for x in embeddings(1, 2)]
    mesh, mask = mesh_of("8 devices"), jnp.ones(B, bool)
    whole = lambda *x: reference(
        *(y.astype(jnp.float32) for y in x[:2]), *x[2:], "softmax", mask, mask
    )
    of_mesh = lambda *x: logit_sums(*x[:3], mesh, bias=x[3], way="ring")
    found = gradients(of_mesh, mask, mask)(*z, SCALE, BIAS)
    expected = gradients(whole, mask, mask)(*z, SCALE, BIAS)
    assert_close(found[0], expected[0])
    for a, b in zip(found[1], expected[1]):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def compiled(way: str, mesh: str, rows: int, **options) -> jax.stages.Compiled:
    of = mesh_of(mesh, rows)
    z = jax.ShapeDtypeStruct((rows, D), jnp.float32, sharding=batch_sharding(of))
    total = lambda a, b: sum(
        jnp.sum(x) for x in logit_sums(a, b, SCALE, of, way=way, **options)[:2]
    )
    shardings = (replicated(of), (batch_sharding(of),) * 2)
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), out_shardings=shardings)
    return step.lower(z, z).compile()


def test_the_ring_gathers_nothing_and_no_way_moves_all_to_all():
    ring = compiled("ring", "8 devices", B).as_text()
    assert "collective-permute" in ring
    assert "all-gather" not in ring
    gathered = compiled("gathered", "8 devices", B).as_text()
    assert "all-gather" in gathered
    assert "all-to-all" not in ring + gathered
    # The gathered texts are of the size of the batch, the logits of no device are.
    assert f"f32[{B},{B}]" not in ring + gathered


@pytest.mark.parametrize("slices", (2, 4, 8))
def test_the_ring_goes_round_each_slice_and_crosses_between_them_apart(slices, monkeypatch):
    monkeypatch.setattr("hqclip_jax.similarity.slices_among", lambda devices: slices)
    mesh, mask = mesh_of("8 devices, fsdp and tensor" if slices == 2 else "8 devices"), jnp.ones(B)
    z = embeddings(5, 6)
    sums_of = lambda *x: logit_sums(*x[:3], mesh, bias=x[3], way="ring")
    found = gradients(sums_of, mask, mask)(*z, SCALE, BIAS)
    whole = lambda *x: reference(*x, "softmax", mask, mask)
    assert_close(found, gradients(whole, mask, mask)(*z, SCALE, BIAS))

    text = compiled("ring", "8 devices", B).as_text()
    within = 8 // slices
    kinds = set()
    for pairs in re.findall(r"source_target_pairs=\{(.*?)\}\}", text):
        ends = [tuple(map(int, p)) for p in re.findall(r"(\d+),(\d+)", pairs)]
        kinds.add(tuple(a // within == b // within for a, b in ends))
    # Either every device sends to its own slice or every one to another.
    assert kinds <= {(True,) * 8, (False,) * 8}
    assert (False,) * 8 in kinds


@pytest.mark.parametrize("way", WAYS)
def test_memory_of_a_device_falls_as_devices_are_added(way):
    rows = 8192
    small, large = (
        compiled(way, mesh, rows, block_bytes=2**18).memory_analysis().temp_size_in_bytes
        for mesh in ("2 devices", "8 devices")
    )
    assert large < (0.35 if way == "ring" else 0.5) * small, (small, large)


def test_large_batches_travel_and_small_ones_are_gathered():
    def text(rows: int, width: int) -> str:
        mesh = mesh_of("8 devices", rows)
        z = jax.ShapeDtypeStruct((rows, width), jnp.float32)
        return str(jax.make_jaxpr(lambda a, b: logit_sums(a, b, SCALE, mesh))(z, z))

    assert "all_gather" in text(4096, 512)
    assert "ppermute" not in text(4096, 512)
    assert "ppermute" in text(90_112, 768)
    assert "all_gather" not in text(90_112, 768)
