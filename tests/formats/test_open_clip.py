"""OpenCLIP loads our folders by itself, and gives our cosines; its own configurations are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hqclip_jax.data.image import open_rgb
from hqclip_jax.export import export_checkpoint
from hqclip_jax.formats import open_clip as form
from hqclip_jax.formats.described import FormatError, Resize
from hqclip_jax.models.zoo import ARCHITECTURES, name_of
from hqclip_jax.restore import find
from tests.formats import models
from tests.models.torch_peers import open_clip

PUBLISHED = Path(open_clip.__file__).parent / "model_configs"


def exported(tmp_path: Path, config, tokenizer=None) -> Path:
    models.write_checkpoint(tmp_path / "run", config, tokenizer)
    export_checkpoint(find(tmp_path / "run"), "open_clip", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of QuickGELU; the run it is of lies beside."""
    return exported(tmp_path_factory.mktemp("quick"), models.make_config())


def their_embeddings(folder: Path, pictures: list[bytes], texts: list[str]):
    """By OpenCLIP's own loading functions, preprocessing and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = torch.stack([preprocess(open_rgb(x)) for x in pictures])
        zimg = model.eval().encode_image(images, normalize=True)
        return zimg.numpy(), model.encode_text(tokenizer(texts), normalize=True).numpy()


def assert_same_cosines(folder: Path, pictures: list[bytes]) -> None:
    got = models.cosines(*their_embeddings(folder, pictures, models.TEXTS))
    want = models.cosines(*models.our_embeddings(folder.parent / "run", pictures, models.TEXTS))
    assert np.ptp(want) > 0.02, "all pairs look alike, so that nothing is compared"
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_it_loads_by_itself_and_gives_our_cosines(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_cosines(folder, models.pictures())
    assert_same_cosines(exported(tmp_path, models.make_config(act="gelu")), models.pictures())


def test_real_pictures_give_our_cosines(folder, real_data):
    assert_same_cosines(folder, models.real_pictures(real_data))


def test_a_sigmoid_model_keeps_its_bias(tmp_path):
    folder = exported(tmp_path, models.make_config(sigmoid=True))
    model = open_clip.create_model(f"local-dir:{folder}")
    assert model.logit_bias.item() == -9 and model.logit_scale.item() == 3


@pytest.mark.parametrize("wordpiece", [True, False])
def test_clipa_brings_its_vocabulary(tmp_path, monkeypatch, wordpiece):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = models.WORDPIECE if wordpiece else None
    config = models.make_config(models.CLIPA, context_length=8)
    folder = exported(tmp_path, config, tokenizer)
    assert (folder / "vocab.txt").is_file() == wordpiece
    assert_same_cosines(folder, models.pictures())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_halve_the_file_and_still_load(folder, tmp_path, dtype):
    export_checkpoint(find(folder.parent / "run"), "open_clip", tmp_path / "out", dtype=dtype)
    small, whole = (
        models.cosines(*their_embeddings(f, models.pictures(), models.TEXTS))
        for f in (tmp_path / "out", folder)
    )
    assert 1e-6 < np.abs(small - whole).max() < 0.02
    sizes = [(f / form.WEIGHTS).stat().st_size for f in (tmp_path / "out", folder)]
    assert 0.5 < sizes[0] / sizes[1] < 0.51


FILES = {
    "ViT-B/32": "ViT-B-32", "ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14",
    "ViT-L/14-336": "ViT-L-14-336", "ViT-H/14": "ViT-H-14", "ViT-g/14": "ViT-g-14",
    "ViT-bigG/14": "ViT-bigG-14", "ViT-L/14-CLIPA": "ViT-L-14-CLIPA",
    "ViT-H/14-CLIPA": "ViT-H-14-CLIPA", "ViT-bigG/14-CLIPA": "ViT-bigG-14-CLIPA",
}  # fmt: skip


@pytest.mark.parametrize("arch", FILES)
@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
def test_published_configurations_are_read_as_our_architectures(arch, suffix):
    path = PUBLISHED / f"{FILES[arch]}{suffix}.json"
    if not path.is_file():
        return
    found = form.describe({"model_cfg": json.loads(path.read_text())})
    assert name_of(found.shape) == arch
    assert found.shape == ARCHITECTURES[arch]
    assert found.act == ("quick_gelu" if suffix else "gelu")
    assert (found.vocab_size, found.wordpiece) == (
        (32000, True) if "CLIPA" in arch else (49408, False)
    )


def config(**changes) -> dict:
    """A sound file with fields replaced, as `config(vision={"pool_type": "avg"})`."""
    model = json.loads((PUBLISHED / "ViT-B-32.json").read_text())
    for part in ("vision", "text"):
        model[f"{part}_cfg"] |= changes.pop(part, {})
    images = changes.pop("preprocess_cfg", {})
    return {"model_cfg": model | changes, "preprocess_cfg": images}


@pytest.mark.parametrize(("changes", "says"), [
    ({"vision": {"timm_model_name": "vit"}}, r"do not compute vision_cfg\.timm_model_name='vit'"),
    ({"vision": {"ls_init_value": 0.1}}, r"vision_cfg\.ls_init_value=0\.1"),
    ({"vision": {"norm_kwargs": {"eps": 1e-6}}}, r"vision_cfg\.norm_kwargs=\{'eps': 1e-06\}"),
    ({"text": {"embed_cls": True}}, r"text_cfg\.embed_cls=True"),
    ({"text": {"pad_id": 1}}, r"pad_id=1: texts are padded with 0"),
    ({"vision": {"pool_type": "avg"}}, r"pooling 'avg' of images and 'argmax' of texts"),
    ({"text": {"no_causal_mask": True}}, r"text_cfg\.no_causal_mask is neither OpenAI's form"),
    ({"vision": {"layers": [3, 4, 6, 3]}}, r"residual networks are not built here"),
    ({"text": {"hf_tokenizer_name": "x"}}, r"hf_tokenizer_name='x': only models of CLIPA's form"),
    ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, r"tokenizer_kwargs=\{'clean'"),
    ({"multimodal_cfg": {"width": 5}}, r"model_cfg\.multimodal_cfg"),
    ({"embed_dim": None}, r"model_cfg\.embed_dim=None is no int"),
])  # fmt: skip
def test_what_the_towers_would_not_follow_is_refused_by_name(changes, says):
    form.describe(config())
    with pytest.raises(FormatError, match=says):
        form.describe(config(**changes))


def test_what_changes_nothing_passes():
    found = form.describe(config(
        vision={"patch_dropout": 0.5, "timm_pool": "avg", "attentional_pool": False},
        text={"proj_type": "linear", "eos_id": 2},
        preprocess_cfg={"mean": [0.5] * 3, "resize_mode": "squash"},
    ))  # fmt: skip
    assert found.mean == (0.5, 0.5, 0.5) and found.resize == Resize("squash", "bicubic")


def test_a_file_without_its_sections_is_refused():
    with pytest.raises(FormatError, match=r"open_clip_config\.json\.model_cfg=None is no dict"):
        form.describe({})
