"""transformers loads our folders by itself, and gives our cosines; its own files are read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.data.text import clean
from hqclip_jax.export import export_checkpoint
from hqclip_jax.formats import transformers as form
from hqclip_jax.formats.described import MEAN, STD, FormatError, Resize
from hqclip_jax.models.convert import ConvertError
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.restore import find
from tests.formats import models
from tests.models import torch_peers
from tests.models.torch_peers import transformers


def exported(tmp_path: Path, config=None, to: str = "transformers", **options) -> Path:
    models.write_checkpoint(tmp_path / "run", config or models.make_config())
    export_checkpoint(find(tmp_path / "run"), to, tmp_path / "out", **options)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of QuickGELU; the run it is of lies beside."""
    return exported(tmp_path_factory.mktemp("quick"))


def inputs(folder: Path, pictures: list[bytes], **options) -> dict:
    """By their processor, of texts that were cleaned, which it leaves to its user."""
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil")
    texts = [clean(t) for t in models.TEXTS]
    return processor(
        text=texts, images=[open_rgb(x) for x in pictures], return_tensors="pt", truncation=True,
        padding=True, **options,
    )  # fmt: skip


def assert_same_cosines(folder: Path, pictures: list[bytes]) -> None:
    model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        out = model.eval()(**inputs(folder, pictures))
    got = models.cosines(out.image_embeds.numpy(), out.text_embeds.numpy())
    want = models.cosines(*models.our_embeddings(folder.parent / "run", pictures, models.TEXTS))
    assert np.ptp(want) > 0.02, "all pairs look alike, so that nothing is compared"
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_it_loads_by_itself_and_gives_our_cosines(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_cosines(folder, models.pictures())
    assert_same_cosines(exported(tmp_path, models.make_config(act="gelu")), models.pictures())


def their_cut_is_ours(picture: bytes) -> bool:
    """Ours, and OpenCLIP's, rounds the corner of the cut half to even; theirs cuts it down."""
    width, height = open_rgb(picture).size
    return (int(models.SIZE * max(width, height) / min(width, height)) - models.SIZE) % 4 != 3


def test_real_pictures_give_our_cosines(folder, real_data):
    every = models.real_pictures(real_data)
    same = [x for x in every if their_cut_is_ours(x)]
    assert_same_cosines(folder, same)
    for picture in (x for x in every if not their_cut_is_ours(x)):
        pixels = inputs(folder, [picture])["pixel_values"][0].numpy().transpose(1, 2, 0)
        theirs = np.rint((pixels * np.float32(STD) + np.float32(MEAN)) * 255)
        ours = eval_transform(open_rgb(picture), models.SIZE)
        axis = int(open_rgb(picture).size[0] < open_rgb(picture).size[1])
        ours, theirs = (np.moveaxis(x, 1 - axis, 0) for x in (ours, theirs))
        np.testing.assert_array_equal(theirs[1:], ours[:-1])  # a pixel beside
    assert 5 < len(same) < len(every)


def test_the_pixels_are_ours_to_the_last_grey_level(folder):
    pixels = inputs(folder, models.pictures())["pixel_values"].numpy().transpose(0, 2, 3, 1)
    theirs = np.rint((pixels * np.float32(STD) + np.float32(MEAN)) * 255)
    ours = [eval_transform(open_rgb(x), models.SIZE) for x in models.pictures()]
    np.testing.assert_array_equal(theirs, ours)


def test_padding_changes_nothing(folder):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        short = model(**inputs(folder, models.pictures())).text_embeds
        ids = inputs(folder, models.pictures())
        ids["input_ids"] = torch.where(ids["attention_mask"] == 0, 0, ids["input_ids"])
        del ids["attention_mask"]
        zeros = model(**ids).text_embeds
    np.testing.assert_allclose(short, zeros, atol=1e-6)


def test_a_vision_tower_gives_the_hidden_states_of_the_whole(folder, tmp_path):
    export_checkpoint(find(folder.parent / "run"), "vision_tower", tmp_path / "eye")
    tower, info = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "eye", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "eye")
    assert processor.crop_size["height"] == models.SIZE
    assert transformers.CLIPVisionConfig.from_pretrained(tmp_path / "eye").hidden_size == 128

    whole = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = inputs(folder, models.pictures())["pixel_values"]
    with torch.no_grad():
        want = whole.vision_model(pixels, output_hidden_states=True)
        got = tower.eval()(pixels, output_hidden_states=True)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert np.ptp(got.hidden_states[-2].numpy()) > 1


def test_a_sigmoid_model_has_an_eye_and_is_no_clip_model(tmp_path):
    exported(tmp_path, models.make_config(sigmoid=True), "vision_tower")
    with pytest.raises(ConvertError, match="no logit_bias"):
        export_checkpoint(find(tmp_path / "run"), "transformers", tmp_path / "whole")


def test_it_loads_in_the_type_it_was_written_in(tmp_path):
    folder = exported(tmp_path, dtype="bfloat16")
    assert transformers.CLIPModel.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["transformers", "vision_tower"])
def test_clipas_form_is_refused_with_the_reason(tmp_path, to):
    config = models.make_config(models.CLIPA, context_length=8)
    with pytest.raises(ConvertError, match="pools the class token and masks its text causally"):
        exported(tmp_path, config, to)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def their_config(**changes) -> dict:
    """What transformers writes of a model, with fields replaced."""
    sizes = torch_peers.Sizes(224, 77, 49408, "quick_gelu")
    stored = torch_peers.transformers_model(ARCHITECTURES["ViT-Pico/8"], sizes).config.to_dict()
    for part in ("vision_config", "text_config"):
        stored[part] |= changes.pop(part, {})
    return stored | changes


def test_their_own_configuration_is_read():
    found = form.describe(their_config(), None)
    assert found.shape == ARCHITECTURES["ViT-Pico/8"]
    assert (found.act, found.vocab_size, found.resize) == ("quick_gelu", 49408, Resize())


def test_openais_files_say_the_truth_in_a_second_place():
    # As in openai/clip-vit-large-patch14: defaults first, what holds in *_config_dict.
    stored = json.loads(json.dumps({
        "model_type": "clip", "projection_dim": 768,
        "text_config": {"eos_token_id": 2, "hidden_size": 512},
        "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072,
                             "num_attention_heads": 12, "num_hidden_layers": 12},
        "vision_config": {},
        "vision_config_dict": {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
                               "num_attention_heads": 16, "num_hidden_layers": 24},
    }))  # fmt: skip
    image = {"crop_size": 224, "size": 224, "resample": 3, "do_center_crop": True,
             "image_mean": list(MEAN), "image_std": list(STD)}  # fmt: skip
    found = form.describe(stored, image)
    assert found.shape == ARCHITECTURES["ViT-L/14"]
    assert (found.act, found.resize) == ("quick_gelu", Resize())


@pytest.mark.parametrize(("changes", "says"), [
    ({"model_type": "siglip"}, "model_type='siglip' is no CLIPModel"),
    ({"text_config": {"hidden_act": "gelu"}}, "the two towers share one"),
    ({"vision_config": {"layer_norm_eps": 1e-6}}, r"vision_config\.layer_norm_eps=1e-06"),
    ({"text_config": {"eos_token_id": 7}}, r"eos_token_id=7 is where it pools"),
    ({"vision_config": {"num_channels": 1}}, r"num_channels=1, not 3"),
    ({"text_config": None}, "text_config=None is no dict"),
])  # fmt: skip
def test_what_the_towers_would_not_follow_is_refused_by_name(changes, says):
    if changes.get("text_config", 0) is None:
        stored = their_config() | changes
    else:
        stored = their_config(**changes)
    with pytest.raises(FormatError, match=says):
        form.describe(stored, None)


@pytest.mark.parametrize(("image", "mode", "interpolation"), [
    ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, "squash", "bicubic"),
    ({"size": {"shortest_edge": 256}, "resample": 2}, "shortest to 256, cut to 224", "bilinear"),
    ({"image_processor": {"size": {"shortest_edge": 224}}}, "shortest", "bicubic"),
])  # fmt: skip
def test_another_rule_for_pictures_is_seen(image, mode, interpolation):
    assert form.describe(their_config(), image).resize == Resize(mode, interpolation)


def test_pictures_that_are_not_normalised_are_refused():
    with pytest.raises(FormatError, match="do_normalize is off"):
        form.describe(their_config(), {"do_normalize": False})


def test_all_of_a_model_comes_back_from_the_files(folder):
    stored = json.loads((folder / form.CONFIG).read_text())
    image = json.loads((folder / form.PREPROCESSOR).read_text())
    found = form.describe(stored, image)
    own = replace(ARCHITECTURES[models.ARCH], image_size=models.SIZE, context_length=models.LENGTH)
    assert (found.shape, found.act, found.resize) == (own, "quick_gelu", Resize())
    assert found.mean == MEAN and found.std == STD
