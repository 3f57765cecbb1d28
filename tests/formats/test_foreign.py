"""Folders and files of other libraries, read: what fits, what is carried, what is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.formats import open_clip as open_clip_form
from hqclip_jax.formats.described import FormatError
from hqclip_jax.formats.foreign import read_foreign
from hqclip_jax.formats.model import Model
from hqclip_jax.formats.tokenizer_files import write_wordpiece
from hqclip_jax.models.clip import CLIP
from hqclip_jax.models.convert import ConvertError, flatten
from hqclip_jax.models.zoo import ARCHITECTURES
from tests.formats import models
from tests.models import torch_peers
from tests.models.torch_peers import open_clip, transformers

SIZES = torch_peers.Sizes(models.SIZE, models.LENGTH, 49408, "quick_gelu")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    model = torch_peers.transformers_model(ARCHITECTURES[models.ARCH], SIZES)
    model.save_pretrained(folder)
    size = {"shortest_edge": models.SIZE}
    transformers.CLIPImageProcessor(size=size, crop_size=models.SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clips(tmp_path_factory) -> Path:
    """A folder as OpenCLIP pushes it to the Hub."""
    folder = tmp_path_factory.mktemp("oc") / "model"
    folder.mkdir()
    model = torch_peers.open_clip_model(ARCHITECTURES[models.ARCH], SIZES)
    config = open_clip_form._model_config(
        Model(models.make_config(), ClipTokenizer(models.LENGTH), {})
    )
    stored = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}
    (folder / open_clip_form.CONFIG).write_text(json.dumps(stored))
    save_file(torch_peers.weights_of(model), folder / open_clip_form.WEIGHTS)
    return folder


@pytest.fixture(params=["hugging_face", "open_clips"])
def folder(request, tmp_path) -> Path:
    """Of either library, to damage."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model")


def edit(path: Path, **changes) -> None:
    stored = json.loads(path.read_text())
    for dotted, value in changes.items():
        node = stored
        *parents, leaf = dotted.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path.write_text(json.dumps(stored))


def test_a_folder_of_either_library_is_read(folder, request):
    found = read_foreign(folder)
    own = found.config.model
    assert (own.arch, own.image_size, own.context_length, own.act) == (
        models.ARCH, models.SIZE, models.LENGTH, "quick_gelu",
    )  # fmt: skip
    assert found.tokenizer == ClipTokenizer(models.LENGTH) and found.notes == ()
    assert (found.config.loss.tag, found.config.loss.hni) == (0, 0)


def test_the_two_librarys_files_side_by_side_are_open_clips(open_clips, hugging_face, tmp_path):
    both = shutil.copytree(open_clips, tmp_path / "both")
    for file in hugging_face.iterdir():
        shutil.copy(file, both)
    assert read_foreign(both).library == "OpenCLIP"
    (both / open_clip_form.WEIGHTS).rename(both / "open_clip_pytorch_model.bin")
    assert read_foreign(both).library == "transformers"
    edit(both / "config.json", model_type=None)  # timm's, which names itself otherwise
    (both / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"open_clip_pytorch_model\.bin is a pickle"):
        read_foreign(both)


def test_a_weight_file_alone_needs_to_be_told(open_clips, hugging_face):
    for folder, name in ((open_clips, open_clip_form.WEIGHTS), (hugging_face, "model.safetensors")):
        with pytest.raises(FormatError, match="weights alone: add --arch, one of ViT-Pico/8"):
            read_foreign(folder / name, arch=models.ARCH)
        found = read_foreign(folder / name, arch=models.ARCH, act="quick_gelu")
        whole = read_foreign(folder)
        assert (found.library, found.config) == (whole.library, whole.config)
        jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
        assert "taken to be CLIP's" in found.notes[0]
    with pytest.raises(FormatError, match="says them itself"):
        read_foreign(open_clips, arch=models.ARCH)


def test_weights_in_parts_are_read_by_their_index(folder):
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    names = sorted(weights)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({n: weights[n] for n in part}, folder / file)
    places = {n: file for file, part in parts.items() for n in part}
    (folder / f"{path.name}.index.json").write_text(json.dumps({"weight_map": places}))
    want = read_foreign(folder)
    path.unlink()
    jax.tree.map(np.testing.assert_array_equal, read_foreign(folder).params, want.params)


def test_a_pickle_is_refused_with_the_mend_that_mends_it(folder, monkeypatch):
    (path,) = folder.glob("*.safetensors")
    pickle = path.with_suffix(".bin")
    weights = {k: torch.from_numpy(x) for k, x in load_file(path).items()}
    torch.save({"state_dict": {f"module.{k}": x for k, x in weights.items()}}, pickle)
    want = read_foreign(folder).params
    path.unlink()
    with pytest.raises(FormatError, match="is a pickle, and reading one can run any code") as told:
        read_foreign(folder)
    with pytest.raises(FormatError, match="is a pickle"):
        read_foreign(pickle)
    code = [line.strip() for line in str(told.value).splitlines() if line.startswith("    ")]
    monkeypatch.chdir(folder)
    exec("\n".join(code), {})
    jax.tree.map(np.testing.assert_array_equal, read_foreign(folder).params, want)


def test_another_mean_and_deviation_are_carried(open_clips, tmp_path):
    folder = shutil.copytree(open_clips, tmp_path / "model")
    colours = {"preprocess_cfg__mean": [0.5, 0.4, 0.3], "preprocess_cfg__std": [0.2, 0.3, 0.5]}
    edit(folder / open_clip_form.CONFIG, **colours)
    found = read_foreign(folder)
    assert "mean [0.5, 0.4, 0.3] and deviation [0.2, 0.3, 0.5] are carried" in found.notes[0]

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pictures = [open_rgb(x) for x in models.pictures()]
    with torch.no_grad():
        images = torch.stack([preprocess(x) for x in pictures])
        want = model.eval().encode_image(images, normalize=True).numpy()
    graph = nnx.eval_shape(lambda: CLIP(found.config, 49408, rngs=nnx.Rngs(0)))
    own = nnx.merge(nnx.split(graph, nnx.Param)[0], jax.tree.map(jax.numpy.asarray, found.params))
    with jax.default_matmul_precision("highest"):
        got = own.encode_image(np.stack([eval_transform(x, models.SIZE) for x in pictures]))
    np.testing.assert_allclose(np.asarray(got) @ want.T, want @ want.T, atol=1e-6)
    plain = flatten(read_foreign(open_clips).params)
    changed = {k for k, x in flatten(found.params).items() if not np.array_equal(x, plain[k])}
    assert changed == {"visual/patch_embed/kernel", "visual/positional_embedding"}
    cls = "visual/positional_embedding"
    np.testing.assert_array_equal(flatten(found.params)[cls][0], plain[cls][0])


def test_another_rule_for_pictures_is_refused_until_allowed(open_clips, tmp_path):
    folder = shutil.copytree(open_clips, tmp_path / "model")
    edit(folder / open_clip_form.CONFIG, preprocess_cfg__resize_mode="squash")
    with pytest.raises(FormatError, match=r"mode squash, bicubic.*--our-resize imports it"):
        read_foreign(folder)
    assert "imported all the same" in read_foreign(folder, our_resize=True).notes[0]


OC = "open_clip_config.json"


@pytest.mark.parametrize(("name", "changes", "says"), [
    (OC, {"model_cfg__vision_cfg__layers": 5}, r"closest is ViT-Pico/8: vision\.layers 5, not 4"),
    (OC, {"model_cfg__vision_cfg__image_size": 40}, r"image_size=40.*16 patches"),
    (OC, {"model_cfg__text_cfg__context_length": 9}, r"texts of 9 tokens"),
    (OC, {"model_cfg__text_cfg__vocab_size": 49410}, r"a vocabulary of 49,410"),
    ("config.json", {"vision_config__patch_size": 16}, r"closest is .*patch 16, not 8"),
    ("config.json", {"text_config__num_hidden_layers": 4}, r"closest is .*text\.layers 4, not 3"),
])  # fmt: skip
def test_a_configuration_that_is_not_the_weights_is_refused(
    open_clips, hugging_face, tmp_path, name, changes, says
):
    source = hugging_face if name == "config.json" else open_clips
    folder = shutil.copytree(source, tmp_path / "model")
    edit(folder / name, **changes)
    with pytest.raises(FormatError, match=says):
        read_foreign(folder)


@pytest.mark.parametrize(("name", "changes"), [
    (OC, {"model_cfg__vision_cfg__width": "wide"}),
    (OC, {"model_cfg__vision_cfg__head_width": 0}),
    (OC, {"model_cfg__text_cfg__layers": None}),
    (OC, {"preprocess_cfg__mean": 5}),
    (OC, {"preprocess_cfg__mean": [0.5]}),
    (OC, {"preprocess_cfg__std": [0, 0, 0]}),
    ("config.json", {"vision_config__image_size": [32, 32]}),
    ("config.json", {"vision_config__patch_size": "8"}),
    ("preprocessor_config.json", {"size": "large"}),
])  # fmt: skip
def test_a_field_of_another_type_is_refused(open_clips, hugging_face, tmp_path, name, changes):
    source = open_clips if name == OC else hugging_face
    folder = shutil.copytree(source, tmp_path / "model")
    edit(folder / name, **changes)
    with pytest.raises(FormatError):
        read_foreign(folder)


def test_an_index_that_is_none_is_refused(open_clips, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FormatError, match="is no index of weight files"):
        read_foreign(tmp_path / "x.json", models.ARCH, "gelu")


def test_other_merges_are_refused(hugging_face, tmp_path):
    folder = shutil.copytree(hugging_face, tmp_path / "model")
    (folder / "merges.txt").write_text("#version: 0.2\ni n\nt h\n")
    with pytest.raises(FormatError, match=r"merges\.txt has other merges than CLIP's"):
        read_foreign(folder)


def test_a_folder_that_is_none_is_refused(tmp_path, open_clips):
    with pytest.raises(FormatError, match="no such file or folder"):
        read_foreign(tmp_path / "none")
    with pytest.raises(FormatError, match=r"neither open_clip_config\.json .* nor config\.json"):
        read_foreign(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json can't be read as JSON"):
        read_foreign(tmp_path)
    (tmp_path / "w.npz").write_text("x")
    with pytest.raises(FormatError, match=r"w\.npz: weights are \.safetensors"):
        read_foreign(tmp_path / "w.npz", models.ARCH, "gelu")
    folder = shutil.copytree(open_clips, tmp_path / "model")
    (folder / open_clip_form.WEIGHTS).unlink()
    with pytest.raises(FormatError, match=r"has no open_clip_model\.safetensors"):
        read_foreign(folder)


@pytest.fixture
def clipa(tmp_path) -> Path:
    """CLIPA's form as its authors publish it: ImageNet's colours, squashed pictures, WordPiece."""
    folder = tmp_path / "clipa"
    folder.mkdir()
    arch, sizes = ARCHITECTURES[models.CLIPA], SIZES._replace(context_length=8, vocab_size=64)
    weights = torch_peers.weights_of(torch_peers.open_clip_model(arch, sizes))
    save_file(weights, folder / open_clip_form.WEIGHTS)
    config = models.make_config(models.CLIPA, context_length=8, act="gelu")
    stored = {
        "model_cfg": open_clip_form._model_config(Model(config, models.WORDPIECE, {})),
        "preprocess_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                           "interpolation": "bilinear", "resize_mode": "squash"},
    }  # fmt: skip
    (folder / open_clip_form.CONFIG).write_text(json.dumps(stored))
    write_wordpiece(folder, models.WORDPIECE)
    return folder


def test_clipas_published_form_is_read(clipa):
    found = read_foreign(clipa, our_resize=True)
    assert found.config.model.arch == models.CLIPA and found.tokenizer == models.WORDPIECE
    assert len(found.notes) == 2


def test_a_wordpiece_is_found_in_tokenizer_json_or_named(clipa, tmp_path):
    vocab = (clipa / "vocab.txt").rename(tmp_path / "elsewhere.txt")
    with pytest.raises(FormatError, match=r"neither vocab\.txt nor tokenizer\.json"):
        read_foreign(clipa, our_resize=True)
    found = read_foreign(clipa, vocab=str(vocab), our_resize=True)
    assert found.tokenizer == models.WORDPIECE
    file = clipa / open_clip_form.WEIGHTS
    with pytest.raises(FormatError, match=r"64 rows .* name its vocab\.txt by --vocab"):
        read_foreign(file, models.CLIPA, "gelu")
    found = read_foreign(file, models.CLIPA, "gelu", str(vocab))
    assert found.tokenizer == models.WORDPIECE
    ids = {piece: i for i, piece in enumerate(models.WORDPIECE.vocabulary)}
    (clipa / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    assert read_foreign(clipa, our_resize=True).tokenizer == models.WORDPIECE
    edit(clipa / "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(FormatError, match="texts are lower-cased"):
        read_foreign(clipa, our_resize=True)


def test_weights_of_another_form_are_refused(clipa):
    with pytest.raises(ConvertError, match=r"missing: visual\.ln_pre\.weight"):
        read_foreign(clipa / open_clip_form.WEIGHTS, models.ARCH, "gelu")
