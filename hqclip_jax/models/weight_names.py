"""What the parameters of `CLIP` are called in other libraries, and how they lie in memory there.

A format is a table of rows, read in both directions: our parameter, their weight, how one lies in
memory as the other. OpenCLIP's names are OpenAI's.
"""

from collections.abc import Callable, Iterable
from math import isqrt
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How one layer's parameter becomes theirs, and theirs ours, given the shape that ours has."""

    to_theirs: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]


def _patches_to_theirs(x: np.ndarray) -> np.ndarray:
    patch = isqrt(len(x) // 3)
    return x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x, shape: x.reshape(shape))
FLAT = Layout(lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape))
# Theirs is [out, in]; ours of queries, keys and values is [in, 3, out].
KERNEL = Layout(lambda x: x.reshape(len(x), -1).T, lambda x, shape: x.T.reshape(shape))
# Theirs is a convolution [out, channel, row, column].
PATCHES = Layout(_patches_to_theirs, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        ours: path of the parameter.
        theirs: name of the weight; "{}" stands for the layer, which is our first axis.
        part: 0, 1 or 2 where `theirs` is the query, key or value alone of our joint parameter.
    """

    ours: str
    theirs: str
    layout: Layout
    part: int | None = None


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}/scale", f"{theirs}.weight", SAME),
        Row(f"{ours}/bias", f"{theirs}.bias", SAME),
    )


def _linear(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", KERNEL),
        Row(f"{ours}/bias", f"{theirs}.bias", FLAT),
    )


def _blocks(ours: str, theirs: str, block: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(
        row._replace(ours=f"{ours}/{row.ours}", theirs=f"{theirs}.{{}}.{row.theirs}")
        for row in block
    )


_OPEN_CLIP_BLOCK = (
    *_norm("ln_1", "ln_1"),
    Row("qkv/kernel", "attn.in_proj_weight", KERNEL),
    Row("qkv/bias", "attn.in_proj_bias", FLAT),
    *_linear("out", "attn.out_proj"),
    *_norm("ln_2", "ln_2"),
    *_linear("mlp_in", "mlp.c_fc"),
    *_linear("mlp_out", "mlp.c_proj"),
)

OPEN_CLIP = (
    Row("visual/patch_embed/kernel", "visual.conv1.weight", PATCHES),
    Row("visual/class_embedding", "visual.class_embedding", SAME),
    Row("visual/positional_embedding", "visual.positional_embedding", SAME),
    *_norm("visual/ln_pre", "visual.ln_pre"),
    *_blocks("visual/transformer/blocks", "visual.transformer.resblocks", _OPEN_CLIP_BLOCK),
    *_norm("visual/ln_post", "visual.ln_post"),
    Row("visual_projection/kernel", "visual.proj", SAME),
    Row("text/token_embedding", "token_embedding.weight", SAME),
    Row("text/positional_embedding", "positional_embedding", SAME),
    *_blocks("text/transformer/blocks", "transformer.resblocks", _OPEN_CLIP_BLOCK),
    *_norm("text/ln_final", "ln_final"),
    Row("text_projection/kernel", "text_projection", SAME),
    Row("logit_scale", "logit_scale", SAME),
    Row("logit_bias", "logit_bias", SAME),
)

_TRANSFORMERS_BLOCK = (
    *_norm("ln_1", "layer_norm1"),
    *(
        row._replace(part=part)
        for part, name in enumerate("qkv")
        for row in _linear("qkv", f"self_attn.{name}_proj")
    ),
    *_linear("out", "self_attn.out_proj"),
    *_norm("ln_2", "layer_norm2"),
    *_linear("mlp_in", "mlp.fc1"),
    *_linear("mlp_out", "mlp.fc2"),
)
_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"

TRANSFORMERS = (
    Row("visual/patch_embed/kernel", f"{_IMAGE}.patch_embedding.weight", PATCHES),
    Row("visual/class_embedding", f"{_IMAGE}.class_embedding", SAME),
    Row("visual/positional_embedding", f"{_IMAGE}.position_embedding.weight", SAME),
    *_norm("visual/ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    *_blocks("visual/transformer/blocks", "vision_model.encoder.layers", _TRANSFORMERS_BLOCK),
    *_norm("visual/ln_post", "vision_model.post_layernorm"),
    Row("visual_projection/kernel", "visual_projection.weight", KERNEL),
    Row("text/token_embedding", f"{_TEXT}.token_embedding.weight", SAME),
    Row("text/positional_embedding", f"{_TEXT}.position_embedding.weight", SAME),
    *_blocks("text/transformer/blocks", "text_model.encoder.layers", _TRANSFORMERS_BLOCK),
    *_norm("text/ln_final", "text_model.final_layer_norm"),
    Row("text_projection/kernel", "text_projection.weight", KERNEL),
    Row("logit_scale", "logit_scale", SAME),
)

# Constants that older files carry beside the weights.
BUFFERS = {
    "attn_mask", "input_resolution", "context_length", "vocab_size",
    f"{_IMAGE}.position_ids", f"{_TEXT}.position_ids",
}  # fmt: skip
