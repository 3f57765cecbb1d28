"""The towers against plain numpy, written from OpenAI's description and not from our code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from hqclip_jax.config import Config, ModelConfig, validate
from hqclip_jax.models import transformer as transformer_lib
from hqclip_jax.models.clip import CLIP
from hqclip_jax.models.zoo import ARCHITECTURES

CONFIG = ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=7, dtype="float32")
VOCAB, TAGS = 50, 5
HEADS = 2  # of both towers of ViT-Pico


@functools.cache
def build(config: ModelConfig = CONFIG, tags: int = TAGS) -> tuple[nnx.GraphDef, dict]:
    """A model with random biases and scales too: at 0 and 1 mistakes in them would not show."""
    abstract = nnx.eval_shape(lambda: CLIP(Config(model=config), VOCAB, tags, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(abstract, nnx.Param)
    rng = np.random.default_rng(0)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + rng.normal(0, 0.1, x.shape)).astype(x.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(shapes))


def encode(config: ModelConfig, method: str, *inputs: np.ndarray) -> jax.Array:
    graphdef, params = build(config)
    return jax.jit(lambda p, *x: getattr(nnx.merge(graphdef, p), method)(*x))(params, *inputs)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def activation(x, act):
    if act == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def transformer(x, blocks, act, causal, heads):
    layers = len(blocks["ln_1"]["scale"])
    for i in range(layers):
        p = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), blocks)
        y = layer_norm(x, p["ln_1"])
        qkv = np.einsum("ld,dce->cle", y, p["qkv"]["kernel"]) + p["qkv"]["bias"][:, None]
        of_heads = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in qkv)):
            scores = q @ k.T / np.sqrt(q.shape[-1])
            if causal:
                scores = np.where(np.tri(len(scores)) > 0, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            of_heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(of_heads, axis=1) @ p["out"]["kernel"] + p["out"]["bias"]
        hidden = layer_norm(x, p["ln_2"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        x = x + activation(hidden, act) @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    return x


def unit(x):
    return x / np.linalg.norm(x)


def reference_image(image, params, act):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    v = p["visual"]
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (image / 255 - mean) / std
    tokens = [v["class_embedding"]]
    for top in range(0, image.shape[0], 8):
        for left in range(0, image.shape[1], 8):
            patch = pixels[top : top + 8, left : left + 8].reshape(-1)
            tokens.append(patch @ v["patch_embed"]["kernel"])
    x = layer_norm(np.stack(tokens) + v["positional_embedding"], v["ln_pre"])
    pooled = layer_norm(
        transformer(x, v["transformer"]["blocks"], act, False, HEADS)[0], v["ln_post"]
    )
    tag_logits = pooled @ p["tag_head"]["kernel"] + p["tag_head"]["bias"]
    return unit(pooled @ p["visual_projection"]["kernel"]), tag_logits


def reference_text(ids, params, act):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    t = p["text"]
    x = t["token_embedding"][ids] + t["positional_embedding"]
    x = transformer(x, t["transformer"]["blocks"], act, True, HEADS)
    pooled = layer_norm(x, t["ln_final"])[list(ids).index(max(ids))]
    return unit(pooled @ p["text_projection"]["kernel"])


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
TEXTS = np.array([[48, 3, 9, 49, 0, 0, 0], [48, 7, 1, 2, 3, 4, 49]], np.int32)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_towers_equal_plain_numpy(act):
    config = ModelConfig(**{**vars(CONFIG), "act": act})
    _, params = build(config)
    zimg, tag_logits = encode(config, "encode_image_and_tags", IMAGES)
    ztxt = encode(config, "encode_text", TEXTS)
    for i in range(2):
        expected, expected_tags = reference_image(IMAGES[i], params, act)
        np.testing.assert_allclose(zimg[i], expected, atol=2e-6)
        np.testing.assert_allclose(tag_logits[i], expected_tags, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(ztxt[i], reference_text(TEXTS[i], params, act), atol=2e-6)


def test_norm_is_exact_where_the_mean_is_far_from_zero():
    # E[x²] − E[x]² in f32 would be wrong in the first digit here.
    x = 1000 + np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    p = {"scale": np.linspace(0.5, 2, 64, dtype=np.float32), "bias": np.ones(64, np.float32)}
    expected = layer_norm(x.astype(np.float64), p)
    np.testing.assert_allclose(transformer_lib.layer_norm(x, **p), expected, atol=2e-4)


@pytest.mark.parametrize("act", transformer_lib.ACTIVATIONS)
def test_activations_and_norms_keep_their_input_alone_for_the_backward_pass(act):
    def layer(x, scale, bias):
        return jax.checkpoint(transformer_lib.ACTIVATIONS[act], prevent_cse=False)(
            transformer_lib.layer_norm(x, scale, bias)
        )

    x, p = jnp.ones((3, 64), jnp.bfloat16), jnp.ones(64)
    kept = jax.tree.leaves(jax.vjp(layer, x, p, p)[1])
    assert sorted((a.shape, a.dtype.name) for a in kept if a.ndim == 2) == 2 * [
        ((3, 64), "bfloat16")
    ]


def test_gelu_in_bf16_is_the_rounded_exact_one():
    x = np.linspace(-4, 4, 101).astype(jnp.bfloat16)
    expected = activation(x.astype(np.float64), "gelu")
    np.testing.assert_allclose(
        transformer_lib.ACTIVATIONS["gelu"](x).astype(np.float64), expected, rtol=4e-3
    )


def test_what_follows_the_end_of_a_text_does_not_count():
    other = TEXTS.copy()
    other[0, 4:] = 11
    found, expected = (encode(CONFIG, "encode_text", texts)[0] for texts in (other, TEXTS))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change", [{"remat": "dots"}, {"remat": "full"}, {"remat": "offload"}, {"unroll": 4}]
)
def test_remat_and_unrolling_change_no_gradient(change):
    def gradient(change: dict):
        graphdef, params = build(ModelConfig(**{**vars(CONFIG), **change}))
        loss = lambda p: nnx.merge(graphdef, p).encode_image(IMAGES)[:, 0].sum()
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(change), gradient({})
    )


def test_compute_in_bf16_keeps_f32_parameters_and_embeddings():
    config = ModelConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    assert {x.dtype for x in jax.tree.leaves(build(config)[1])} == {np.dtype("float32")}
    zimg, exact = (encode(c, "encode_image", IMAGES) for c in (config, CONFIG))
    assert zimg.dtype == np.float32
    assert np.sum(zimg * exact, axis=-1).min() > 0.99


def test_tag_logits_are_not_rounded_to_the_compute_type():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    logits = encode(config, "encode_image_and_tags", IMAGES)[1]
    assert logits.dtype == jnp.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_tag_head_exists_only_where_it_is_asked_for():
    graphdef, params = build(tags=0)
    assert "tag_head" not in params
    logits = jax.eval_shape(lambda p: nnx.merge(graphdef, p).encode_image_and_tags(IMAGES), params)
    assert logits[1] is None


def test_image_size_must_fit_the_patch():
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        build(ModelConfig(**{**vars(CONFIG), "image_size": 20}))


# Parameter counts of OpenAI's and OpenCLIP's models (model cards and profile table).
@pytest.mark.parametrize(
    ("name", "millions"),
    [("ViT-B/32", 151.28), ("ViT-B/16", 149.62), ("ViT-L/14", 427.62), ("ViT-H/14", 986.11),
     ("ViT-g/14", 1366.68), ("ViT-bigG/14", 2539.57)],
)  # fmt: skip
def test_published_parameter_counts(name, millions):
    config = validate(Config(model=ModelConfig(arch=name)))
    model = nnx.eval_shape(lambda: CLIP(config, 49408, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_every_architecture_has_whole_heads():
    for name, arch in ARCHITECTURES.items():
        for tower in (arch.vision, arch.text):
            assert tower.width % tower.heads == 0, name
