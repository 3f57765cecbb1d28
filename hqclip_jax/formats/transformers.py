"""transformers' folders: `CLIPModel`, and `CLIPVisionModel` as LLaVA's kin load their eyes.

Fields are those of transformers 4.31 to 5: `eos_token_id` is the end-of-text token's, which pools
its first position; files with the 2 of before, which pools the highest id, are read too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hqclip_jax.data.tokenizer import ClipTokenizer
from hqclip_jax.formats.described import MEAN, STD, Described, FormatError, Resize, section
from hqclip_jax.formats.model import Model
from hqclip_jax.formats.tokenizer_files import write_clip
from hqclip_jax.models.convert import to_transformers
from hqclip_jax.models.transformer import LN_EPSILON
from hqclip_jax.models.zoo import Architecture, Tower

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"

BICUBIC, BILINEAR = 3, 2  # PIL's numbers

# What transformers takes where a file says nothing.
_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": LN_EPSILON, "num_hidden_layers": 12}
_VISION = _TOWER | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                    "image_size": 224, "patch_size": 32, "num_channels": 3}  # fmt: skip
_TEXT = _TOWER | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                  "max_position_embeddings": 77, "vocab_size": 49408,
                  "eos_token_id": ClipTokenizer.end_id}  # fmt: skip
_HIGHEST_ID = 2  # an end-of-text id by which transformers knows files that pool the highest id


def write(folder: Path, model: Model) -> list[str]:
    """A CLIPModel and its processor; returns the code that loads them.

    Raises:
        ConvertError: CLIPA's form, or a logit_bias.
    """
    model.save(folder / WEIGHTS, to_transformers(model.params))
    text = {
        "vocab_size": model.tokenizer.vocab_size,
        "max_position_embeddings": model.config.model.context_length,
        "bos_token_id": ClipTokenizer.start_id,
        "eos_token_id": ClipTokenizer.end_id,
        "pad_token_id": ClipTokenizer.end_id,  # its tokenizer's; behind a causal mask any would do
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.arch.embed_dim,
        "text_config": _tower(model, model.arch.text, "clip_text_model") | text,
        "vision_config": _vision(model),
        "torch_dtype": model.dtype,
    }
    _write_json(folder / CONFIG, config)
    _write_json(folder / PREPROCESSOR, _preprocessor(model, "CLIPProcessor"))
    write_clip(folder, model.config.model.context_length)
    return [
        "from transformers import CLIPModel, CLIPProcessor",
        'model = CLIPModel.from_pretrained("{here}")',
        'processor = CLIPProcessor.from_pretrained("{here}", backend="pil")',
    ]


def write_vision_tower(folder: Path, model: Model) -> list[str]:
    """A CLIPVisionModel: the image tower up to the pooled feature, without projection.

    Raises:
        ConvertError: CLIPA's form.
    """
    model.save(folder / WEIGHTS, vision_weights(model.params))
    config = {"architectures": ["CLIPVisionModel"], **_vision(model), "torch_dtype": model.dtype}
    _write_json(folder / CONFIG, config)
    _write_json(folder / PREPROCESSOR, _preprocessor(model))
    return [
        "from transformers import CLIPImageProcessor, CLIPVisionModel",
        'tower = CLIPVisionModel.from_pretrained("{here}")',
        'processor = CLIPImageProcessor.from_pretrained("{here}")',
    ]


def vision_weights(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Those of a CLIPVisionModel, from all parameters.

    Raises:
        ConvertError: CLIPA's form.
    """
    kept = {k: x for k, x in params.items() if k != "logit_bias"}  # of no use to images
    return {k: x for k, x in to_transformers(kept).items() if k.startswith("vision_model.")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tower(model: Model, tower: Tower, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": model.config.model.act,
        "layer_norm_eps": LN_EPSILON,
        "projection_dim": model.arch.embed_dim,
    }


def _vision(model: Model) -> dict[str, Any]:
    sizes = {"image_size": model.config.model.image_size, "patch_size": model.arch.patch}
    return _tower(model, model.arch.vision, "clip_vision_model") | sizes


def _preprocessor(model: Model, processor: str | None = None) -> dict[str, Any]:
    size = model.config.model.image_size
    return ({"processor_class": processor} if processor else {}) | {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def describe(stored: dict[str, Any], preprocessor: dict[str, Any] | None) -> Described:
    """Args:
        stored: the content of `config.json`.
        preprocessor: that of `preprocessor_config.json`; None takes CLIP's.

    Raises:
        FormatError: it is no CLIPModel, or says what this code would not follow.
    """
    if stored.get("model_type") != "clip":
        raise FormatError(
            f"{CONFIG}: model_type={stored.get('model_type')!r} is no CLIPModel of transformers "
            "('clip'), which has both towers"
        )
    vision, text = (_section(stored, n, d) for n, d in (("vision", _VISION), ("text", _TEXT)))
    if vision["hidden_act"] != text["hidden_act"]:
        raise FormatError(
            f"hidden_act is {vision['hidden_act']!r} in vision_config and {text['hidden_act']!r} "
            "in text_config; the two towers share one here"
        )
    for name, tower in (("vision_config", vision), ("text_config", text)):
        if tower["hidden_act"] not in ("gelu", "quick_gelu"):
            raise FormatError(f"{name}.hidden_act={tower['hidden_act']!r}: gelu or quick_gelu")
        if tower["layer_norm_eps"] != LN_EPSILON:
            raise FormatError(
                f"{name}.layer_norm_eps={tower['layer_norm_eps']}; norms here have {LN_EPSILON}"
            )
    if text["eos_token_id"] not in (ClipTokenizer.end_id, _HIGHEST_ID):
        raise FormatError(
            f"text_config.eos_token_id={text['eos_token_id']} is where it pools its texts; here "
            f"they are pooled at {ClipTokenizer.end_id}, the highest id"
        )
    if vision["num_channels"] != 3:
        raise FormatError(f"vision_config.num_channels={vision['num_channels']}, not 3")
    shape = Architecture(
        _read_tower(vision), vision["patch_size"], _read_tower(text),
        stored.get("projection_dim") or 512, vision["image_size"], text["max_position_embeddings"],
    )  # fmt: skip
    image = _read_preprocessor(preprocessor, vision["image_size"]) if preprocessor else {}
    return Described(shape, vision["hidden_act"], text["vocab_size"], **image)


def _section(stored: dict[str, Any], tower: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Older files say the truth in `*_config_dict`, and transformers takes that one."""
    given = dict(section(stored, f"{tower}_config", CONFIG))
    given |= stored.get(f"{tower}_config_dict") or {}
    return defaults | {k: x for k, x in given.items() if x is not None}


def _read_tower(given: dict[str, Any]) -> Tower:
    return Tower(
        given["hidden_size"], given["num_hidden_layers"], given["num_attention_heads"],
        given["intermediate_size"],
    )  # fmt: skip


def _read_preprocessor(given: dict[str, Any], image_size: int) -> dict[str, Any]:
    given = given.get("image_processor", given)  # of a processor_config.json
    off = [k for k in ("do_resize", "do_rescale", "do_normalize") if given.get(k) is False]
    if off:
        raise FormatError(f"{PREPROCESSOR}: {', '.join(off)} is off, and on here")
    size, crop = given.get("size", 224), given.get("crop_size", 224)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if short is None or not given.get("do_center_crop", True):
        mode = "squash"
    else:
        mode = "shortest" if short == crop == image_size else f"shortest to {short}, cut to {crop}"
    filters = {BICUBIC: "bicubic", BILINEAR: "bilinear"}
    resample = given.get("resample", BICUBIC)
    return {
        "resize": Resize(mode, filters.get(resample, f"filter {resample}")),
        "mean": tuple(given.get("image_mean") or MEAN),
        "std": tuple(given.get("image_std") or STD),
    }
