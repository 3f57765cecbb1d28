"""Converted weights give the outputs that OpenCLIP's and transformers' models give."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from hqclip_jax.config import Config, LossConfig, ModelConfig
from hqclip_jax.models import convert
from hqclip_jax.models.clip import CLIP
from hqclip_jax.models.convert import ConvertError
from hqclip_jax.models.zoo import ARCHITECTURES
from tests.models import torch_peers
from tests.models.torch_peers import Sizes, open_clip, transformers

SMALL = Sizes(image_size=32, context_length=9, vocab_size=60)
CLIPA = "ViT-Pico/8-CLIPA"


@pytest.fixture
def clipa(monkeypatch):
    """A small architecture of CLIPA's form."""
    small = replace(ARCHITECTURES["ViT-Pico/8"], clipa=True, context_length=8)
    monkeypatch.setitem(ARCHITECTURES, CLIPA, small)
    return small


def open_clip_weights(arch="ViT-Pico/8", **kwargs):
    model = torch_peers.open_clip_model(ARCHITECTURES[arch], SMALL, **kwargs)
    return torch_peers.weights_of(model)


def transformers_weights():
    model = torch_peers.transformers_model(ARCHITECTURES["ViT-Pico/8"], SMALL)
    return torch_peers.weights_of(model)


def our_model(arch, sizes, sigmoid=False):
    config = Config(
        model=ModelConfig(
            arch=arch,
            image_size=sizes.image_size,
            context_length=sizes.context_length,
            act=sizes.act,
            dtype="float32",
        ),
        loss=LossConfig(contrastive_form="sigmoid" if sigmoid else "softmax"),
    )
    model = nnx.eval_shape(lambda: CLIP(config, sizes.vocab_size, 0, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def our_cosines(params, arch, sizes, image, text):
    graphdef, _ = our_model(arch, sizes)

    @jax.jit
    def encode(params, image, text):
        model = nnx.merge(graphdef, params)
        return model.encode_image(image), model.encode_text(text)

    with jax.default_matmul_precision("highest"):
        zimg, ztxt = encode(params, image, text)
    return cosines(zimg, ztxt)


def cosines(zimg, ztxt):
    return np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T


def assert_same_cosines(peer, params, arch, sizes):
    image = torch_peers.random_images(4, sizes.image_size)
    text = torch_peers.random_texts(5, sizes)
    want = cosines(*torch_peers.embed(peer, image, text))
    assert np.ptp(want) > 0.02, "all pairs look alike, so that nothing is compared"
    got = our_cosines(params, arch, sizes, image, text)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def assert_same_bits(got, want):
    got, want = convert.flatten(got), convert.flatten(want)
    assert set(got) == set(want)
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert got[name].tobytes() == x.tobytes(), name


PARITY = [
    ("ViT-Pico/8", SMALL),
    ("ViT-Pico/8", SMALL._replace(act="quick_gelu")),
    ("ViT-S/32", Sizes(96, 16, 500, "quick_gelu")),
    ("ViT-B/32", Sizes(224, 77, 500)),
]


@pytest.mark.parametrize(("arch", "sizes"), PARITY)
def test_open_clip_weights_give_open_clip_cosines(arch, sizes):
    peer = torch_peers.open_clip_model(ARCHITECTURES[arch], sizes)
    params = convert.from_open_clip(torch_peers.weights_of(peer), arch)
    assert_same_cosines(peer, params, arch, sizes)


@pytest.mark.parametrize(("arch", "sizes"), PARITY[:3])
def test_transformers_weights_give_transformers_cosines(arch, sizes):
    peer = torch_peers.transformers_model(ARCHITECTURES[arch], sizes)
    params = convert.from_transformers(torch_peers.weights_of(peer), arch)
    assert_same_cosines(peer, params, arch, sizes)


def test_clipa_weights_give_open_clip_cosines(clipa):
    sizes = SMALL._replace(context_length=8)
    peer = torch_peers.open_clip_model(clipa, sizes)
    params = convert.from_open_clip(torch_peers.weights_of(peer), CLIPA)
    assert_same_cosines(peer, params, CLIPA, sizes)


def test_one_activation_is_not_the_other():
    peer = torch_peers.open_clip_model(ARCHITECTURES["ViT-Pico/8"], SMALL)
    params = convert.from_open_clip(torch_peers.weights_of(peer), "ViT-Pico/8")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_cosines(peer, params, "ViT-Pico/8", SMALL._replace(act="quick_gelu"))


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_open_clip_reads_the_file_that_we_write(act, tmp_path):
    arch, sizes = "ViT-Pico/8", SMALL._replace(act=act)
    params = convert.from_transformers(transformers_weights(), arch)
    convert.write_safetensors(tmp_path / "m.safetensors", convert.to_open_clip(params))
    for custom_text in (False, True):
        peer = torch_peers.open_clip_model(
            ARCHITECTURES[arch], sizes, custom_text=custom_text, seed=1
        )
        open_clip.load_checkpoint(peer, str(tmp_path / "m.safetensors"))
        assert_same_cosines(peer, params, arch, sizes)


def test_transformers_reads_the_file_that_we_write(tmp_path):
    arch = "ViT-Pico/8"
    params = convert.from_open_clip(open_clip_weights(), arch)
    convert.write_safetensors(tmp_path / "model.safetensors", convert.to_transformers(params))
    torch_peers.transformers_model(ARCHITECTURES[arch], SMALL).config.save_pretrained(tmp_path)
    peer, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_cosines(peer.eval(), params, arch, SMALL)


def test_a_round_trip_through_our_parameters_keeps_every_bit(clipa):
    for arch, bias in (("ViT-Pico/8", False), ("ViT-Pico/8", True), (CLIPA, False)):
        weights = open_clip_weights(arch, logit_bias=bias)
        assert ("logit_bias" in weights) == bias
        assert_same_bits(convert.to_open_clip(convert.from_open_clip(weights, arch)), weights)
    weights = transformers_weights()
    again = convert.to_transformers(convert.from_transformers(weights, "ViT-Pico/8"))
    assert_same_bits(again, weights)


def test_a_round_trip_through_a_file_keeps_every_bit_of_our_parameters(tmp_path):
    params = convert.from_open_clip(open_clip_weights(), "ViT-Pico/8")
    for to, back in (
        (convert.to_open_clip, convert.from_open_clip),
        (convert.to_transformers, convert.from_transformers),
    ):
        convert.write_safetensors(tmp_path / "m.safetensors", to(params))
        read = convert.read_safetensors(tmp_path / "m.safetensors")
        assert_same_bits(back(read, "ViT-Pico/8"), params)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_every_parameter_of_every_architecture_has_a_place(arch, form):
    spec = ARCHITECTURES[arch]
    _, state = our_model(arch, Sizes(spec.patch * 3, 5, 7), form == "sigmoid")
    # One number behind each: a bigG in full would take 10 GB.
    params = jax.tree.map(
        lambda x: np.broadcast_to(np.float32(0), x.shape), nnx.to_pure_dict(state)
    )
    weights = convert.to_open_clip(params)
    assert sum(x.size for x in weights.values()) == sum(x.size for x in jax.tree.leaves(params))


def test_an_image_grid_that_is_no_square_is_refused():
    weights = open_clip_weights()
    weights["visual.positional_embedding"] = np.zeros((13, 128), np.float32)
    with pytest.raises(ConvertError, match=r"positional_embedding is \[13, 128\], expected \[10"):
        convert.from_open_clip(weights, "ViT-Pico/8")


def test_a_text_tower_with_a_prefix_is_read():
    prefixed = open_clip_weights(custom_text=True)
    assert "text.token_embedding.weight" in prefixed
    plain = {name.removeprefix("text."): x for name, x in prefixed.items()}
    assert_same_bits(
        convert.from_open_clip(prefixed, "ViT-Pico/8"), convert.from_open_clip(plain, "ViT-Pico/8")
    )


def test_constants_of_older_files_and_scalars_with_an_axis_are_read():
    weights = open_clip_weights()
    want = convert.from_open_clip(weights, "ViT-Pico/8")
    weights |= {"input_resolution": np.array(32), "context_length": np.array(9)}
    weights |= {"vocab_size": np.array(60), "logit_scale": weights["logit_scale"].reshape(1)}
    assert_same_bits(convert.from_open_clip(weights, "ViT-Pico/8"), want)
    theirs = transformers_weights()
    want = convert.from_transformers(theirs, "ViT-Pico/8")
    theirs["text_model.embeddings.position_ids"] = np.arange(9)[None]
    theirs["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    assert_same_bits(convert.from_transformers(theirs, "ViT-Pico/8"), want)


def test_sixteen_bit_weights_become_the_same_numbers_in_f32():
    half = {name: x.astype(np.float16) for name, x in open_clip_weights().items()}
    params = convert.from_open_clip(half, "ViT-Pico/8")
    assert_same_bits(
        params,
        convert.from_open_clip({k: x.astype(np.float32) for k, x in half.items()}, "ViT-Pico/8"),
    )


def test_what_only_training_uses_is_left_out():
    weights = open_clip_weights()
    params = convert.from_open_clip(weights, "ViT-Pico/8")
    params["tag_head"] = {"kernel": np.zeros((128, 3)), "bias": np.zeros(3)}
    params["hni_logit_scale"] = np.float32(1)
    assert_same_bits(convert.to_open_clip(params), weights)
    assert set(convert.to_transformers(params)) == set(transformers_weights())


def test_weights_that_do_not_fit_are_named():
    weights = open_clip_weights()
    name = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    whose = "not OpenCLIP weights of ViT-Pico/8"
    with pytest.raises(ConvertError, match=f"{whose}: missing: {name}$"):
        convert.from_open_clip({k: x for k, x in weights.items() if k != name}, "ViT-Pico/8")
    with pytest.raises(ConvertError, match=f"{whose}: unexpected: visual.head$"):
        convert.from_open_clip(weights | {"visual.head": np.zeros(3)}, "ViT-Pico/8")
    with pytest.raises(ConvertError, match=rf"{name} is \[128, 512\], expected \[512, 128\]"):
        convert.from_open_clip(weights | {name: weights[name].T}, "ViT-Pico/8")
    with pytest.raises(ConvertError, match=f"{name} is int8"):
        convert.from_open_clip(weights | {name: weights[name].astype(np.int8)}, "ViT-Pico/8")
    with pytest.raises(ConvertError, match=r"these are not OpenCLIP weights of ViT-Nano/8: .*more"):
        convert.from_open_clip(weights, "ViT-Nano/8")
    with pytest.raises(ConvertError, match="these are not transformers weights"):
        convert.from_transformers(weights, "ViT-Pico/8")
    with pytest.raises(ConvertError, match="no architecture 'ViT-Pico/9'; there are ViT-Pico/8"):
        convert.from_open_clip(weights, "ViT-Pico/9")
    with pytest.raises(ConvertError, match=r"missing: visual.conv1.weight, .* and 93 more"):
        convert.from_open_clip({}, "ViT-Pico/8")


def test_parameters_that_do_not_fit_are_named():
    params = convert.from_open_clip(open_clip_weights(), "ViT-Pico/8")
    with pytest.raises(ConvertError, match="with no place there: adapter"):
        convert.to_open_clip(params | {"adapter": np.zeros(3)})
    del params["text"]["ln_final"]["bias"]
    with pytest.raises(ConvertError, match="missing parameters text/ln_final/bias"):
        convert.to_transformers(params)


def test_what_a_transformers_model_cannot_hold_is_refused(clipa):
    with pytest.raises(ConvertError, match="pools the class token"):
        convert.to_transformers(convert.from_open_clip(open_clip_weights(CLIPA), CLIPA))
    with pytest.raises(ConvertError, match=f"{CLIPA}: .*masks its text causally"):
        convert.from_transformers(transformers_weights(), CLIPA)
    biased = convert.from_open_clip(open_clip_weights(logit_bias=True), "ViT-Pico/8")
    with pytest.raises(ConvertError, match="no logit_bias"):
        convert.to_transformers(biased)


def test_a_clipa_model_is_not_taken_for_another_nor_another_for_it(clipa):
    with pytest.raises(ConvertError, match=r"missing: visual.ln_pre.weight, visual.ln_pre.bias"):
        convert.from_open_clip(open_clip_weights(CLIPA), "ViT-Pico/8")
    with pytest.raises(ConvertError, match=r"unexpected: visual.ln_pre.bias, visual.ln_pre.weight"):
        convert.from_open_clip(open_clip_weights(), CLIPA)


def test_sixteen_bit_files_are_read_as_f32_without_loss(tmp_path):
    values = np.array([1.5, -3e-5, 60000, 0], np.float32)
    halves = {"f": values.astype(np.float16), "b": values.astype(ml_dtypes.bfloat16)}
    save_file(halves | {"i": np.arange(3)}, tmp_path / "m.safetensors")
    read = convert.read_safetensors(tmp_path / "m.safetensors")
    assert read["f"].dtype == read["b"].dtype == np.float32
    np.testing.assert_array_equal(read["f"], halves["f"].astype(np.float32))
    np.testing.assert_array_equal(read["b"], halves["b"].astype(np.float32))
    assert read["i"].dtype == np.int64


def test_an_index_leads_to_the_weights_of_several_files(tmp_path):
    for file, value in (("one", 1), ("two", 2)):
        save_file({file: np.full(3, value, np.float32)}, tmp_path / f"{file}.safetensors")
    places = {"one": "one.safetensors", "two": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    read = convert.read_safetensors(index)
    assert {name: x[0] for name, x in read.items()} == {"one": 1, "two": 2}
    index.write_text(json.dumps({"weight_map": places | {"three": "two.safetensors"}}))
    with pytest.raises(ConvertError, match="its files lack: three"):
        convert.read_safetensors(index)


def test_a_cut_file_is_refused_by_name(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"x": np.zeros(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConvertError, match=r"m\.safetensors is no whole safetensors file"):
        convert.read_safetensors(path)
