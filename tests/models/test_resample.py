"""Resampled positional embeddings against OpenCLIP's own resampling."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hqclip_jax.models.convert import ConvertError
from hqclip_jax.models.resample import resample_positions
from tests.models.torch_peers import open_clip

WIDTH = 32
PATCH = 8  # of ViT-Pico/8


def params_of(side: int, length: int) -> dict:
    rng = np.random.default_rng(side)
    image = rng.standard_normal((side**2 + 1, WIDTH), np.float32)
    text = rng.standard_normal((length, WIDTH), np.float32)
    return {
        "visual": {"positional_embedding": image, "rest": np.zeros(1)},
        "text": {"positional_embedding": text, "rest": np.ones(1)},
        "logit_scale": np.float32(1),
    }


def resampled_by_open_clip(params: dict, side: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    state = {
        "visual.positional_embedding": torch.from_numpy(params["visual"]["positional_embedding"]),
        "positional_embedding": torch.from_numpy(params["text"]["positional_embedding"]),
    }
    model = SimpleNamespace(
        visual=SimpleNamespace(grid_size=(side, side)),
        positional_embedding=torch.zeros(length, WIDTH),
    )
    open_clip.model.resize_pos_embed(state, model)
    open_clip.model.resize_text_pos_embed(state, model)
    return state["visual.positional_embedding"].numpy(), state["positional_embedding"].numpy()


@pytest.mark.parametrize(
    ("sides", "lengths"),
    [((16, 24), (32, 77)), ((24, 16), (77, 32)), ((7, 14), (8, 32)), ((6, 16), (77, 8)),
     ((14, 6), (9, 10)), ((5, 1), (6, 1))],
)  # fmt: skip
def test_positions_are_resampled_as_open_clip_does(sides, lengths):
    params = params_of(sides[0], lengths[0])
    image, text = resampled_by_open_clip(params, sides[1], lengths[1])
    got = resample_positions(params, "ViT-Pico/8", sides[1] * PATCH, lengths[1])
    np.testing.assert_allclose(got["visual"]["positional_embedding"], image, atol=1e-5)
    np.testing.assert_allclose(got["text"]["positional_embedding"], text, atol=1e-5)
    assert got["visual"]["positional_embedding"].dtype == np.float32


def test_only_what_differs_is_changed_and_nothing_in_place():
    params = params_of(4, 9)
    before = params["visual"]["positional_embedding"].copy()
    assert resample_positions(params, "ViT-Pico/8", 4 * PATCH, 9) is params
    got = resample_positions(params, "ViT-Pico/8", 6 * PATCH, 9)
    assert got["text"] is params["text"]
    assert got["visual"]["rest"] is params["visual"]["rest"]
    np.testing.assert_array_equal(got["visual"]["positional_embedding"][0], before[0])
    np.testing.assert_array_equal(params["visual"]["positional_embedding"], before)


def test_grids_that_are_no_square_are_refused():
    params = params_of(4, 9)
    params["visual"]["positional_embedding"] = np.zeros((13, WIDTH), np.float32)
    with pytest.raises(ConvertError, match="12 patches are no square grid"):
        resample_positions(params, "ViT-Pico/8", 4 * PATCH, 9)
    with pytest.raises(ConvertError, match="image_size 30 is not a multiple of the patch 8"):
        resample_positions(params, "ViT-Pico/8", 30, 9)
