import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hqclip_jax import losses
from hqclip_jax.config import MeshConfig
from hqclip_jax.models.clip import normalise
from hqclip_jax.sharding import BATCH_AXES, P, make_mesh

B, D, V = 16, 8, 11


def embeddings(*seeds: int) -> list[jax.Array]:
    return [normalise(jax.random.normal(jax.random.key(s), (B, D))) for s in seeds]


def sharded(mesh: Mesh):
    return jax.shard_map(
        lambda zimg, ztxt, scale: losses.contrastive(zimg, ztxt, scale, BATCH_AXES),
        mesh=mesh,
        in_specs=(P(BATCH_AXES), P(BATCH_AXES), P()),
        out_specs=(P(), P()),
    )


def test_reference_on_two_pairs_by_hand():
    zimg = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    ztxt = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # the second text is wrong
    loss, accuracy = losses.contrastive_reference(zimg, ztxt, jnp.float32(2.0))
    # logits [[2, 2], [0, 0]]: every row is a tie, log 2; columns: log(1+e^-2) and log(1+e^2).
    by_row = np.log(2)
    by_column = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    np.testing.assert_allclose(loss, (by_row + by_column) / 2, rtol=1e-6)
    assert accuracy == 0.5  # a tie goes to the first text


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (1, MeshConfig()),
        (2, MeshConfig()),
        (4, MeshConfig(fsdp=2)),
        (8, MeshConfig()),
        (8, MeshConfig(fsdp=8)),
        (8, MeshConfig(fsdp=2, tensor=2)),
    ],
)
def test_sharded_contrastive_equals_reference_in_value_and_gradients(devices, mesh):
    zimg, ztxt = embeddings(1, 2)
    scale = jnp.float32(14.3)
    of_mesh = sharded(make_mesh(mesh, B, jax.devices()[:devices]))
    gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    expected = gradient(losses.contrastive_reference)(zimg, ztxt, scale)
    found = gradient(of_mesh)(zimg, ztxt, scale)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_sharded_contrastive_holds_at_the_largest_scale_and_collapsed_embeddings():
    zimg, ztxt = embeddings(3, 4)
    loss = jax.jit(sharded(make_mesh(MeshConfig(), B)))
    for a, b in ((zimg, zimg), (zimg, -zimg), (zimg[:1].repeat(B, 0), ztxt)):
        found = loss(a, b, jnp.float32(100.0))
        expected = losses.contrastive_reference(a, b, jnp.float32(100.0))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
        assert np.isfinite(found[0])


def test_sharded_contrastive_moves_texts_only_and_no_all_to_all():
    mesh = make_mesh(MeshConfig(), B)
    text = jax.jit(sharded(mesh)).lower(*embeddings(1, 2), jnp.float32(1)).compile().as_text()
    assert "all-gather" in text
    assert "all-to-all" not in text
    # Nothing of the size of the whole logit matrix: a device holds b rows of it.
    assert f"f32[{B},{B}]" not in text
    assert f"f32[{B // 8},{B}]" in text


def test_hni_is_the_two_way_cross_entropy_of_unmasked_images():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    mask = jnp.arange(B) % 3 > 0
    scale = jnp.float32(7.0)
    loss, accuracy = losses.hni(zimg, ztxt, zneg, mask, scale)
    by_image, right = [], []
    for i in np.flatnonzero(mask):
        positive, negative = (float(scale * zimg[i] @ z[i]) for z in (ztxt, zneg))
        by_image.append(-np.log(np.exp(positive) / (np.exp(positive) + np.exp(negative))))
        right.append(positive > negative)
    np.testing.assert_allclose(loss, np.mean(by_image), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-6)


def test_hni_gives_masked_images_no_gradient_and_none_at_all_when_all_are():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    mask = jnp.zeros(B).at[4].set(1)
    gradient = jax.grad(lambda z, m: losses.hni(z, ztxt, zneg, m, jnp.float32(5))[0])
    moved = np.abs(gradient(zimg, mask)).sum(axis=1) > 0
    assert np.flatnonzero(moved).tolist() == [4]
    assert not np.any(gradient(zimg, jnp.zeros(B)))
    assert losses.hni(zimg, ztxt, zneg, jnp.zeros(B), jnp.float32(5))[0] == 0


def test_hni_counts_a_tie_as_wrong():
    zimg, ztxt = embeddings(1, 2)
    loss, accuracy = losses.hni(zimg, ztxt, ztxt, jnp.ones(B), jnp.float32(5))
    assert accuracy == 0
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


IDS = np.array([[0, 3, -1], [2, -1, -1], [-1, -1, -1], [10, 1, 4]], np.int32)


def multi_hot() -> np.ndarray:
    target = np.zeros((len(IDS), V))
    for row, ids in enumerate(IDS):
        target[row, ids[ids >= 0]] = 1
    return target


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_tag_loss_is_cross_entropy_with_the_normalised_multi_hot(weighted):
    logits = jax.random.normal(jax.random.key(0), (len(IDS), V)) * 3
    weights = jnp.linspace(0.5, 2.0, V) if weighted else None
    target = multi_hot() * (np.asarray(weights) if weighted else 1)
    known = target.sum(axis=1) > 0
    target = target[known] / target[known].sum(axis=1, keepdims=True)
    expected = -(target * np.asarray(jax.nn.log_softmax(logits))[known]).sum(axis=1).mean()
    loss, _ = losses.tag_classification(logits, IDS, "softmax", weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_bce_tag_loss_is_a_sigmoid_per_tag_summed():
    logits = jax.random.normal(jax.random.key(0), (len(IDS), V)) * 3
    target = multi_hot()
    p = np.asarray(jax.nn.sigmoid(logits), np.float64)
    by_image = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1)
    loss, _ = losses.tag_classification(logits, IDS, "bce")
    np.testing.assert_allclose(loss, by_image[[0, 1, 3]].mean(), rtol=1e-5)


def test_images_without_tags_have_no_gradient_in_either_form():
    logits = jax.random.normal(jax.random.key(0), (len(IDS), V))
    for form in ("softmax", "bce"):
        gradient = jax.grad(lambda x, f=form: losses.tag_classification(x, IDS, f)[0])(logits)
        moved = np.abs(gradient).sum(axis=1) > 0
        assert moved.tolist() == [True, True, False, True]
        none = losses.tag_classification(logits, np.full_like(IDS, -1), form)
        assert [float(x) for x in none] == [0, 0]


def test_tags_that_weigh_nothing_mask_their_image():
    logits = jax.random.normal(jax.random.key(0), (2, V))
    ids = np.array([[0, -1], [1, -1]], np.int32)
    weights = jnp.ones(V).at[0].set(0)
    expected = losses.tag_classification(logits[1:], ids[1:])[0]
    np.testing.assert_allclose(
        losses.tag_classification(logits, ids, "softmax", weights)[0], expected
    )


def test_recall_is_the_share_of_tags_among_as_many_highest_logits():
    logits = jnp.zeros((2, V)).at[0, 0].set(5).at[0, 7].set(4).at[1, 2].set(1)
    ids = np.array([[0, 3, -1], [2, -1, -1]], np.int32)
    # First image: 0 is among the two highest, 3 is not. Second: its one tag is the highest.
    assert losses.tag_classification(logits, ids)[1] == pytest.approx(0.75)


def test_losses_are_computed_in_f32_whatever_the_head_computes_in():
    logits = (jax.random.normal(jax.random.key(0), (len(IDS), V)) * 8).astype(jnp.bfloat16)
    loss, recall = losses.tag_classification(logits, IDS)
    assert loss.dtype == recall.dtype == jnp.float32
    assert normalise(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
