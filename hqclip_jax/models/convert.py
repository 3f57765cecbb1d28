"""Weights to and from OpenCLIP (whose names are OpenAI's) and Hugging Face transformers.

What has no row in the tables of `weight_names` is not converted but refused, by name.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hqclip_jax.config import Config, LossConfig, ModelConfig
from hqclip_jax.models.clip import CLIP
from hqclip_jax.models.weight_names import BUFFERS, OPEN_CLIP, TRANSFORMERS, Layout, Row
from hqclip_jax.models.zoo import ARCHITECTURES

Weights = Mapping[str, np.ndarray]

# Each fits in f32 without loss.
FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}


class ConvertError(ValueError):
    """Weights that don't fit; the message names them and what they should have been."""


TRAINING_ONLY = ("tag_head/", "hni_logit_scale")
OPTIONAL = ("visual/ln_pre/", "logit_bias")
_NO_CLIPA = (
    "transformers' CLIPModel always norms before its image transformer, pools the class token and "
    "masks its text causally, so that CLIPA's form can't be written as one or read from one; "
    "OpenCLIP's format holds it"
)


def _shapes(arch_name: str, sizes: dict[str, int], vocab_size: int, logit_bias: bool) -> dict:
    """Shape of each parameter of `CLIP` that has a place in a file, by path; nothing is built."""
    config = Config(
        model=ModelConfig(arch=arch_name, **sizes),
        loss=LossConfig(contrastive_form="sigmoid" if logit_bias else "softmax"),
    )
    model = nnx.eval_shape(lambda: CLIP(config, vocab_size, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf.shape for path, leaf in leaves}


def _places(
    table: Iterable[Row], params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, Layout]]:
    """Each of their weights: its name, the part of our parameter that it is, and the layout."""
    for name, row in ((row.theirs, row) for row in table if row.ours in params):
        part = (...,) if row.part is None else (..., row.part, slice(None))
        x = params[row.ours][part]
        if "{}" not in name:
            yield name, x, row.layout
            continue
        for layer in range(len(x)):
            yield name.format(layer), x[layer, ...], row.layout


def _import(weights: Weights, arch_name: str, table: tuple[Row, ...], whose: str) -> dict[str, Any]:
    arch = ARCHITECTURES.get(arch_name)
    if arch is None:
        raise ConvertError(f"no architecture {arch_name!r}; there are {', '.join(ARCHITECTURES)}")
    names = {row.ours: row.theirs for row in table}

    def rows(ours: str) -> int:
        return len(np.atleast_1d(weights.get(names[ours], ())))

    grid = isqrt(max(rows("visual/positional_embedding") - 1, 0))  # one row is the class token's
    sizes = {
        "image_size": grid * arch.patch,
        "context_length": rows("text/positional_embedding"),
    }
    has_bias = names.get("logit_bias") in weights
    shapes = _shapes(arch_name, sizes, rows("text/token_embedding"), has_bias)
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    missing, wrong, expected = [], [], set(BUFFERS)
    for name, ours, layout in _places(table, params):
        expected.add(name)
        theirs, shape = weights.get(name), layout.to_theirs(ours).shape
        if theirs is None:
            missing.append(name)
        elif theirs.dtype not in FLOATS:
            wrong.append(f"{name} is {theirs.dtype}, not of a type that f32 holds")
        elif theirs.shape not in (shape, shape or (1,)):  # OpenCLIP's scalars may have an axis
            wrong.append(f"{name} is {list(theirs.shape)}, expected {list(shape)}")
        else:
            ours[...] = layout.to_ours(theirs, ours.shape)
    faults = [f"missing: {_some(missing)}"] if missing else []
    unexpected = sorted(set(weights) - expected)
    faults += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    faults += [f"wrong: {_some(wrong)}"] if wrong else []
    if faults:
        raise ConvertError(f"these are not {whose} weights of {arch_name}: " + "; ".join(faults))
    return _nest(params)


def _export(params: Mapping[str, Any], table: tuple[Row, ...], whose: str) -> dict[str, np.ndarray]:
    flat = {k: v for k, v in flatten(params).items() if not k.startswith(TRAINING_ONLY)}
    paths = {row.ours for row in table}
    missing = sorted(p for p in paths - set(flat) if not p.startswith(OPTIONAL))
    unexpected = sorted(set(flat) - paths)
    if missing or unexpected:
        raise ConvertError(
            f"no {whose} model: missing parameters {_some(missing)}; "
            f"with no place there: {_some(unexpected)}"
        )
    return {name: layout.to_theirs(x) for name, x, layout in _places(table, flat)}


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested parameters by path, as "text/ln_final/scale"."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}/") if nested else {prefix + key: np.asarray(value)}
    return flat


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def from_open_clip(weights: Weights, arch_name: str) -> dict[str, Any]:
    """Parameters of `CLIP` (f32, without tag head) from OpenCLIP's or OpenAI's weights.

    Vocabulary, image grid and text length are those of the weights. OpenCLIP's models with a text
    tower of their own prefix its weights with "text."; both layouts are read.

    Raises:
        ConvertError: the weights are not those of `ARCHITECTURES[arch_name]`.
    """
    plain = {name.removeprefix("text."): weight for name, weight in weights.items()}
    return _import(plain, arch_name, OPEN_CLIP, "OpenCLIP")


def to_open_clip(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """OpenCLIP's weights from the parameters of `CLIP`; what only training uses is left out.

    Raises:
        ConvertError: a parameter is missing or has no place there.
    """
    return _export(params, OPEN_CLIP, "OpenCLIP")


def from_transformers(weights: Weights, arch_name: str) -> dict[str, Any]:
    """Parameters of `CLIP` (f32, without tag head) from the weights of transformers' CLIPModel.

    Raises:
        ConvertError: the weights are not those of `ARCHITECTURES[arch_name]`, or it has CLIPA's
            form, which a CLIPModel has not.
    """
    if arch_name in ARCHITECTURES and ARCHITECTURES[arch_name].clipa:
        raise ConvertError(f"{arch_name}: {_NO_CLIPA}")
    return _import(weights, arch_name, TRANSFORMERS, "transformers")


def to_transformers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of transformers' CLIPModel from the parameters of `CLIP`.

    Raises:
        ConvertError: the model has CLIPA's form or a logit_bias, which a CLIPModel has not, or a
            parameter is missing.
    """
    if "ln_pre" not in params["visual"]:
        raise ConvertError(_NO_CLIPA)
    if "logit_bias" in params:
        raise ConvertError(
            "transformers' CLIPModel has no logit_bias, so a model trained with the sigmoid loss "
            "can't be written as one; OpenCLIP's format holds it"
        )
    return _export(params, TRANSFORMERS, "transformers")


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Weights of one file, or of all files that an index (.json) names; 16-bit floats become f32.

    Raises:
        ConvertError: a file is damaged, or lacks a weight that the index places there.
    """
    path = Path(path)
    if path.suffix != ".json":
        return _read_file(path)
    places: dict[str, str] = json.loads(path.read_text())["weight_map"]
    weights: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        weights |= _read_file(path.parent / file)
    if absent := sorted(set(places) - set(weights)):
        raise ConvertError(f"{path} names weights that its files lack: {_some(absent)}")
    return weights


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ConvertError(f"{path} is no whole safetensors file: {error}") from error
    return {
        k: x.astype(np.float32, copy=False) if x.dtype in FLOATS else x for k, x in weights.items()
    }


def write_safetensors(path: str | Path, weights: Weights) -> None:
    """Writes one file, as transformers and OpenCLIP read it."""
    # ascontiguousarray would give scalars an axis.
    contiguous = {name: np.asarray(x, order="C") for name, x in weights.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
