from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from hqclip_jax.config import Config, MeshConfig, ModelConfig
from hqclip_jax.index.folder import Walk
from hqclip_jax.index.model import SearchModel, digest
from hqclip_jax.index.store import SearchError
from hqclip_jax.sharding import make_mesh
from tests.evals.colours import ColourModel, ColourTokenizer
from tests.index.encoder import png


@pytest.fixture(scope="module")
def model() -> SearchModel:
    graphdef, state = nnx.split(ColourModel(), nnx.Param)
    restored = SimpleNamespace(
        model=graphdef,
        params=nnx.to_pure_dict(state),
        tokenizer=ColourTokenizer(),
        config=Config(model=ModelConfig("ViT-Pico/8", 16)),
        mesh=make_mesh(MeshConfig(), len(jax.devices())),
        step=3,
    )
    return SearchModel(restored, "runs/colours", "params", 8)


def test_pictures_come_in_order_without_those_that_fail(model, tmp_path):
    for i in range(20):
        content = b"no picture" if i in (3, 11) else png(255, 12 * i, 0)
        (tmp_path / f"{i:02}.png").write_bytes(content)
    pictures = list(Walk(tmp_path))
    (tmp_path / "05.png").unlink()
    found, z, skipped = [], [], []
    for batch, z_nxD, left_out in model.pictures(tmp_path, pictures):
        found += [picture.name for picture in batch]
        z.append(z_nxD)
        skipped += left_out
    expected = [i for i in range(20) if i not in (3, 5, 11)]
    assert found == [f"{i:02}.png" for i in expected]
    rgb = np.array([(255, 12 * i, 0) for i in expected], np.float32)
    rgb /= np.linalg.norm(rgb, axis=1, keepdims=True)
    np.testing.assert_allclose(np.concatenate(z), rgb, atol=1e-5)
    assert [(s.name, s.reason) for s in skipped] == [
        ("03.png", "picture does not decode"),
        ("05.png", "unreadable file"),
        ("11.png", "picture does not decode"),
    ]


def test_texts_first_then_images_and_half_of_what_is_not_wanted_off(model, tmp_path):
    (tmp_path / "green.png").write_bytes(png(0, 255, 0))
    z = model.queries(["red", "a blue cup"], [tmp_path / "green.png"])
    np.testing.assert_allclose(z, [[1, 0, 0], [0, 0, 1], [0, 1, 0]], atol=1e-5)
    (z,) = model.queries(["red blue"], [], ["blue"])
    expected = np.array([2**-0.5, 0, 2**-0.5 - 0.5])
    np.testing.assert_allclose(z, expected / np.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("text", ["", "  \n", "...", "?!", "«»", "\u200b"])
def test_a_text_of_stops_alone_is_refused(model, text):
    for texts, against in ([text], []), (["red"], [text]):
        with pytest.raises(SearchError, match="no letter, number or symbol"):
            model.queries(texts, [], against)


def test_letters_of_any_script_numbers_and_emoji_are_texts(model):
    assert model.queries(["猫 red", "7 red", "🍎 red"], []).shape == (3, 3)


def test_an_image_that_is_none_says_which(model, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    for path, message in (
        (tmp_path / "x.png", "x.png: picture does not decode"),
        (tmp_path / "nowhere.png", "nowhere.png: No such file"),
        (tmp_path, "is no file"),
    ):
        with pytest.raises(SearchError, match=message):
            model.queries([], [Path(path)])


def test_the_digest_is_of_architecture_names_and_every_bit():
    params = {"a": {"w": np.ones((2, 3), np.float32)}, "scale": np.float32(1)}
    same = {"scale": jax.numpy.float32(1), "a": {"w": jax.numpy.ones((2, 3))}}
    assert digest({"arch": "x"}, params) == digest({"arch": "x"}, same)
    flipped = {"a": {"w": np.nextafter(params["a"]["w"], 2)}, "scale": np.float32(1)}
    turned = {"a": {"w": np.ones((3, 2), np.float32)}, "scale": np.float32(1)}
    others = [digest({"arch": "x"}, p) for p in (flipped, turned)] + [digest({"arch": "y"}, params)]
    assert len({digest({"arch": "x"}, params), *others}) == 4
