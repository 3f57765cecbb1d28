"""Positional embeddings for another image size or text length than a checkpoint's."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import jax
import numpy as np

from hqclip_jax.models.convert import ConvertError
from hqclip_jax.models.zoo import ARCHITECTURES


def resample_positions(
    params: Mapping[str, Any], arch_name: str, image_size: int, context_length: int
) -> Mapping[str, Any]:
    """Parameters whose positional embeddings fit `image_size` pixels and `context_length` tokens.

    As OpenCLIP when it loads a checkpoint: the image's grid bicubically, antialiased, with the
    class token's row as it is; the text's positions linearly, not antialiased, over their whole
    length, so that the first and last stay near the ends (cutting the table instead would keep the
    meaning of each position). The same object comes back where nothing changes.

    Raises:
        ConvertError: the checkpoint's patches are no square, or `image_size` is no multiple of the
            patch.
    """
    patch = ARCHITECTURES[arch_name].patch
    if image_size % patch:
        raise ConvertError(f"image_size {image_size} is not a multiple of the patch {patch}")
    changed: dict[str, Any] = {}
    image_TxD = np.asarray(params["visual"]["positional_embedding"])
    if len(image_TxD) != (image_size // patch) ** 2 + 1:
        changed["visual"] = _resample_grid(image_TxD, image_size // patch)
    text_LxD = np.asarray(params["text"]["positional_embedding"])
    if len(text_LxD) != context_length:
        shape = (context_length, text_LxD.shape[1])
        changed["text"] = np.asarray(jax.image.resize(text_LxD, shape, "linear", antialias=False))
    if not changed:
        return params
    towers = {tower: params[tower] | {"positional_embedding": x} for tower, x in changed.items()}
    return {**params, **towers}


def _resample_grid(x_TxD: np.ndarray, side: int) -> np.ndarray:
    """f32 [side² + 1, D] of [patches + 1, D]; the first row is the class token's."""
    patches, width = len(x_TxD) - 1, x_TxD.shape[1]
    old = isqrt(patches)
    if old**2 != patches:
        raise ConvertError(f"{patches} patches are no square grid, so they can't be resampled")
    grid = x_TxD[1:].reshape(old, old, width)
    grid = jax.image.resize(grid, (side, side, width), "bicubic", antialias=True)
    return np.concatenate([x_TxD[:1], np.asarray(grid).reshape(-1, width)])
