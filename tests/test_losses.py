import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hqclip_jax import losses
from hqclip_jax.config import LossConfig, MeshConfig
from hqclip_jax.models.clip import normalise
from hqclip_jax.sharding import make_mesh
from tests.models.torch_peers import open_clip

B, D, V = 16, 8, 11
SCALE, BIAS = jnp.float32(14.3), jnp.float32(-3.0)
MESHES = [(1, MeshConfig()), (2, MeshConfig()), (8, MeshConfig(fsdp=2, tensor=2))]


def embeddings(*seeds: int) -> list[jax.Array]:
    return [normalise(jax.random.normal(jax.random.key(s), (B, D))) for s in seeds]


def mesh_of(devices: int = 8, config: MeshConfig | None = None) -> jax.sharding.Mesh:
    return make_mesh(config or MeshConfig(), B, jax.devices()[:devices])


def mean_tags(logits, ids, *options) -> tuple[jax.Array, jax.Array]:
    """Loss and recall of the batch."""
    loss_B, recall_B, mask_B = losses.tag_classification(logits, ids, *options)
    return losses.masked_mean(loss_B, mask_B), losses.masked_mean(recall_B, mask_B)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("devices", "mesh"), MESHES)
def test_a_tie_is_wrong_however_the_towers_collapse(devices, mesh, form):
    zimg, ztxt = embeddings(1, 2)
    loss = LossConfig(contrastive_form=form, hni=0)
    of = jax.jit(
        lambda a, b: losses.image_text(a, b, SCALE, loss, mesh_of(devices, mesh), bias=BIAS)
    )
    assert of(zimg, ztxt[:1].repeat(B, 0))["accuracy"] == 0
    # Pairs of equal texts: both images of each are wrong, whichever the image is nearer to.
    assert of(ztxt, ztxt)["accuracy"] == 1
    assert of(ztxt, ztxt.at[1].set(ztxt[0]))["accuracy"] == (B - 2) / B


def test_contrastive_reference_on_two_pairs_by_hand():
    zimg = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    ztxt = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # the second text is wrong
    loss, accuracy = losses.contrastive_reference(zimg, ztxt, jnp.float32(2.0))
    # logits [[2, 2], [0, 0]]: every row is a tie, log 2; columns: log(1+e^-2) and log(1+e^2).
    by_row = np.log(2)
    by_column = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    np.testing.assert_allclose(loss, (by_row + by_column) / 2, rtol=1e-6)
    assert accuracy == 0  # a tie is wrong


def test_a_pair_of_weight_zero_is_as_if_it_were_not_there():
    zimg, ztxt = embeddings(1, 2)
    weight = jnp.ones(B).at[jnp.array([3, 7])].set(0)
    there = np.flatnonzero(weight)
    found = losses.contrastive_reference(zimg, ztxt, SCALE, weight)
    expected = losses.contrastive_reference(zimg[there], ztxt[there], SCALE)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = losses.sigmoid_reference(zimg, ztxt, SCALE, BIAS, weight)
    expected = losses.sigmoid_reference(zimg[there], ztxt[there], SCALE, BIAS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_references_equal_openclip_in_value_and_gradients():
    zimg, ztxt = embeddings(1, 2)
    ours = {
        "ClipLoss": lambda a, b, s, bias: losses.contrastive_reference(a, b, s)[0] + 0 * bias,
        "SigLipLoss": losses.sigmoid_reference,
    }
    for name, loss in ours.items():
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(zimg, ztxt, SCALE, BIAS)
        inputs = [
            torch.tensor(np.asarray(x), requires_grad=True) for x in (zimg, ztxt, SCALE, BIAS)
        ]
        peer = getattr(open_clip.loss, name)()
        expected = peer(*inputs) if name == "SigLipLoss" else peer(*inputs[:3])
        expected.backward()
        np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
        for grad, x in zip(grads, inputs):
            right = 0.0 if x.grad is None else x.grad.numpy()
            np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-7)


def expected_losses(config, zimg, ztxt, zneg, scale, mask, weight):
    if config.contrastive_form == "softmax":
        contrastive, accuracy = losses.contrastive_reference(zimg, ztxt, scale, weight)
    else:
        contrastive = losses.sigmoid_reference(zimg, ztxt, scale, BIAS, weight)
        accuracy = losses.contrastive_reference(zimg, ztxt, scale, weight)[1]
    found = {"loss/contrastive": contrastive, "accuracy": accuracy}
    # The reference knows no weights of pairs: those of weight zero are left out beforehand.
    there = np.flatnonzero(weight)
    found["loss/hni"] = losses.hni_reference(
        *(z[there] for z in (zimg, ztxt, zneg, mask)), scale, config.hni_form
    )
    return found


MASKS = {
    "all usable": np.ones(B),
    "some masked": (np.arange(B) % 3 > 0).astype(float),
    "all masked": np.zeros(B),
}


@pytest.mark.parametrize(
    ("config", "masked", "weighed"),
    [
        (LossConfig(), "some masked", False),
        (LossConfig(), "all masked", False),
        (LossConfig(), "some masked", True),
        (LossConfig(hni_form="own"), "some masked", True),
        (LossConfig(hni_form="own"), "all masked", False),
        (LossConfig(hni_form="all"), "all usable", False),
        (LossConfig(hni_form="all"), "some masked", True),
        (LossConfig(hni_form="all"), "all masked", False),
        (LossConfig(contrastive_form="sigmoid"), "some masked", True),
    ],
    ids=lambda x: f"{x.contrastive_form}-{x.hni_form}" if isinstance(x, LossConfig) else str(x),
)
@pytest.mark.parametrize(("devices", "mesh"), MESHES, ids=["1", "2", "8 with fsdp and tensor"])
def test_image_text_equals_the_references_in_value_and_gradients(
    devices, mesh, config, masked, weighed
):
    z, mask = embeddings(1, 2, 3), jnp.asarray(MASKS[masked])
    weight = jnp.ones(B) if not weighed else (jnp.arange(B) % 5 > 0).astype(jnp.float32)
    of_mesh = mesh_of(devices, mesh)
    sigmoid = config.contrastive_form == "sigmoid"

    def ours(zimg, ztxt, zneg, scale):
        found = losses.image_text(
            zimg, ztxt, scale, config, of_mesh, zneg_BxD=zneg, neg_mask_B=mask,
            bias=BIAS if sigmoid else None, weight_B=weight if weighed else None,
        )  # fmt: skip
        return 0.7 * found["loss/contrastive"] + 1.3 * found["loss/hni"], found

    def reference(zimg, ztxt, zneg, scale):
        found = expected_losses(config, zimg, ztxt, zneg, scale, mask, weight)
        return 0.7 * found["loss/contrastive"] + 1.3 * found["loss/hni"], found

    gradient = lambda f: jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True)
    (_, found), grads = jax.jit(gradient(ours))(*z, SCALE)
    (_, expected), right = gradient(reference)(*z, SCALE)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(grads, right):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-4))


def test_hni_with_a_temperature_of_its_own():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    found = losses.image_text(
        zimg, ztxt, SCALE, LossConfig(hni_scale="own"), mesh_of(), zneg_BxD=zneg,
        neg_mask_B=jnp.ones(B), hni_scale=jnp.float32(5),
    )  # fmt: skip
    expected = losses.hni_reference(zimg, ztxt, zneg, jnp.ones(B), jnp.float32(5))
    np.testing.assert_allclose(found["loss/hni"], expected, rtol=1e-5)


def test_a_loss_that_is_off_is_not_there():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    for off, name in (("contrastive", "loss/contrastive"), ("hni", "loss/hni")):
        config = dataclasses.replace(LossConfig(), **{off: 0.0})
        found = losses.image_text(
            zimg, ztxt, SCALE, config, mesh_of(), zneg_BxD=zneg, neg_mask_B=jnp.ones(B)
        )
        assert name not in found
        assert len([k for k in found if k.startswith("loss/")]) == 1


def test_hni_reference_is_the_two_way_cross_entropy_of_unmasked_images():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    mask = jnp.arange(B) % 3 > 0
    scale = jnp.float32(7.0)
    by_image, right = [], []
    for i in np.flatnonzero(mask):
        positive, negative = (float(scale * zimg[i] @ z[i]) for z in (ztxt, zneg))
        by_image.append(-np.log(np.exp(positive) / (np.exp(positive) + np.exp(negative))))
        right.append(positive > negative)
    loss = losses.hni_reference(zimg, ztxt, zneg, mask, scale)
    np.testing.assert_allclose(loss, np.mean(by_image), rtol=1e-5)
    found = losses.image_text(
        zimg, ztxt, scale, LossConfig(), mesh_of(), zneg_BxD=zneg, neg_mask_B=mask
    )
    np.testing.assert_allclose(found["hni_accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(found["neg_share"], np.mean(mask))


def test_hni_gives_masked_images_no_gradient_and_none_at_all_when_all_are():
    zimg, ztxt, zneg = embeddings(1, 2, 3)
    cosines = lambda z, other: 5 * jnp.sum(z * other, axis=1)
    loss = lambda z, mask: losses.hni(cosines(z, ztxt), cosines(z, zneg), mask)[0]
    moved = np.abs(jax.grad(loss)(zimg, jnp.zeros(B).at[4].set(1))).sum(axis=1) > 0
    assert np.flatnonzero(moved).tolist() == [4]
    assert not np.any(jax.grad(loss)(zimg, jnp.zeros(B)))
    assert loss(zimg, jnp.zeros(B)) == 0


def test_hni_counts_a_tie_as_wrong():
    loss, accuracy = losses.hni(jnp.ones(B), jnp.ones(B), jnp.ones(B))
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
    loss, _ = mean_tags(logits, IDS, "softmax", weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_bce_tag_loss_is_a_sigmoid_per_tag_summed():
    logits = jax.random.normal(jax.random.key(0), (len(IDS), V)) * 3
    target = multi_hot()
    p = np.asarray(jax.nn.sigmoid(logits), np.float64)
    by_image = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum(axis=1)
    loss, _ = mean_tags(logits, IDS, "bce")
    np.testing.assert_allclose(loss, by_image[[0, 1, 3]].mean(), rtol=1e-5)


def test_images_without_tags_have_no_gradient_in_either_form():
    logits = jax.random.normal(jax.random.key(0), (len(IDS), V))
    for form in ("softmax", "bce"):
        gradient = jax.grad(lambda x, f=form: mean_tags(x, IDS, f)[0])(logits)
        moved = np.abs(gradient).sum(axis=1) > 0
        assert moved.tolist() == [True, True, False, True]
        none = mean_tags(logits, np.full_like(IDS, -1), form)
        assert [float(x) for x in none] == [0, 0]


def test_tags_that_weigh_nothing_mask_their_image():
    logits = jax.random.normal(jax.random.key(0), (2, V))
    ids = np.array([[0, -1], [1, -1]], np.int32)
    weights = jnp.ones(V).at[0].set(0)
    expected = mean_tags(logits[1:], ids[1:])[0]
    np.testing.assert_allclose(mean_tags(logits, ids, "softmax", weights)[0], expected)


def test_recall_is_the_share_of_tags_among_as_many_highest_logits():
    logits = jnp.zeros((2, V)).at[0, 0].set(5).at[0, 7].set(4).at[1, 2].set(1)
    ids = np.array([[0, 3, -1], [2, -1, -1]], np.int32)
    # First image: 0 is among the two highest, 3 is not. Second: its one tag is the highest.
    assert mean_tags(logits, ids)[1] == pytest.approx(0.75)
    # Of a head that has collapsed nothing is found, and tags that tie with one another are.
    assert mean_tags(jnp.zeros((2, V)), ids)[1] == 0
    assert mean_tags(logits.at[0, 3].set(5), ids)[1] == 1


def test_losses_are_computed_in_f32_whatever_the_head_computes_in():
    logits = (jax.random.normal(jax.random.key(0), (len(IDS), V)) * 8).astype(jnp.bfloat16)
    loss, recall = mean_tags(logits, IDS)
    assert loss.dtype == recall.dtype == jnp.float32
    assert normalise(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
