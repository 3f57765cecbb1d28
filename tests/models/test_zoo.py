"""The named architectures against OpenCLIP's model configurations."""

from dataclasses import replace

import pytest

from hqclip_jax.models.zoo import ARCHITECTURES, name_of
from tests.models.torch_peers import open_clip

OURS = ("ViT-Pico/8", "ViT-Pico/8-CLIPA", "ViT-Nano/8")
PUBLISHED = [name for name in ARCHITECTURES if name not in OURS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_open_clips(name):
    arch, config = ARCHITECTURES[name], open_clip.get_model_config(name.replace("/", "-"))
    vision = open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    text = open_clip.model.CLIPTextCfg(**config["text_cfg"])
    assert arch.embed_dim == config["embed_dim"]
    assert (arch.patch, arch.image_size) == (vision.patch_size, vision.image_size)
    assert arch.context_length == text.context_length
    assert (arch.vision.width, arch.vision.layers) == (vision.width, vision.layers)
    assert arch.vision.heads == vision.width // vision.head_width
    assert arch.vision.mlp == int(vision.width * vision.mlp_ratio)
    assert (arch.text.width, arch.text.layers) == (text.width, text.layers)
    assert arch.text.heads == text.heads
    assert arch.text.mlp == int(text.width * text.mlp_ratio)
    averaged = (vision.no_ln_pre, vision.pool_type == "avg", vision.final_ln_after_pool)
    last = (text.no_causal_mask, text.pool_type == "last")
    assert {arch.clipa} == {*averaged, *last}
    assert not config.get("quick_gelu", False) and not config.get("custom_text", False)


def test_a_shape_has_a_name_whatever_its_picture_and_text():
    for name, arch in ARCHITECTURES.items():
        assert name_of(arch) == name
        assert name_of(replace(arch, context_length=5)) == name
    assert name_of(replace(ARCHITECTURES["ViT-L/14"], image_size=280)) == "ViT-L/14"


def test_a_shape_without_a_name_is_refused_with_the_closest():
    odd = replace(ARCHITECTURES["ViT-H/14"], patch=16, embed_dim=512)
    with pytest.raises(ValueError, match=r"closest is ViT-H/14: patch 16, not 14, embed_dim 512"):
        name_of(odd)
