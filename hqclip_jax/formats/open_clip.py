"""OpenCLIP's folder, as its `local-dir:` and `hf-hub:` read it: `open_clip_config.json` and
`open_clip_model.safetensors`. Fields are those of open_clip_torch 3.3."""

import json
import math
from pathlib import Path
from typing import Any

from hqclip_jax.formats.described import (
    MEAN,
    STD,
    Described,
    FormatError,
    Resize,
    check_inert,
    field,
    section,
)
from hqclip_jax.formats.model import Model
from hqclip_jax.formats.tokenizer_files import write_wordpiece
from hqclip_jax.models.clip import SIGMOID_LOGIT_BIAS, SIGMOID_LOGIT_SCALE
from hqclip_jax.models.convert import to_open_clip
from hqclip_jax.models.zoo import Architecture, Tower

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"

# Fields that say how to train or what else to return, or that switch nothing at this value.
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
          "init_logit_bias", "nonscalar_logit_scale", "output_dict"}  # fmt: skip
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "no_ln_pre",
           "pool_type", "final_ln_after_pool", "patch_dropout", "output_tokens"}  # fmt: skip
_VISION_INERT = {"attn_pooler_queries": 256, "attn_pooler_heads": 8, "pos_embed_type": "learnable",
                 "timm_pool": "avg", "timm_proj": "linear", "block_type": "default"}  # fmt: skip
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type",
         "no_causal_mask", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs",
         "output_tokens"}  # fmt: skip
_TEXT_INERT = {"eos_id": 2, "proj_type": "linear", "proj": "linear", "block_type": "default",
               "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler",
               "hf_model_pretrained": True}  # fmt: skip


def write(folder: Path, model: Model) -> list[str]:
    """Writes all of the folder but its card; returns the code that loads it.

    CLIP's byte pairs need no file: they come with OpenCLIP. A WordPiece vocabulary lies beside.
    """
    model.save(folder / WEIGHTS, to_open_clip(model.params))
    config = {
        "model_cfg": _model_config(model),
        "preprocess_cfg": _preprocess(),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if model.wordpiece:
        write_wordpiece(folder, model.tokenizer)
    return [
        "import open_clip",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{here}")',
        'tokenizer = open_clip.get_tokenizer("local-dir:{here}")',
    ]


def _preprocess() -> dict[str, Any]:
    return {
        "mean": MEAN,
        "std": STD,
        "interpolation": Resize().interpolation,
        "resize_mode": Resize().mode,
    }


def _model_config(model: Model) -> dict[str, Any]:
    arch, sizes = model.arch, model.config.model
    vision = {
        "image_size": sizes.image_size,
        "layers": arch.vision.layers,
        "width": arch.vision.width,
        "head_width": arch.vision.width // arch.vision.heads,
        "mlp_ratio": _ratio(arch.vision),
        "patch_size": arch.patch,
    }
    text = {
        "context_length": sizes.context_length,
        "vocab_size": model.tokenizer.vocab_size,
        "width": arch.text.width,
        "heads": arch.text.heads,
        "layers": arch.text.layers,
        "mlp_ratio": _ratio(arch.text),
    }
    if arch.clipa:
        vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        text |= {"pool_type": "last", "no_causal_mask": True}
    if model.wordpiece:
        # The name only says which kind: from a local folder it is read there.
        text |= {
            "hf_tokenizer_name": "bert-base-uncased",
            "tokenizer_kwargs": {"strip_sep_token": True},
        }
    config = {"embed_dim": arch.embed_dim, "quick_gelu": sizes.act == "quick_gelu"}
    if "logit_bias" in model.params:
        # Without them OpenCLIP builds no bias, and then refuses the weight.
        config |= {"init_logit_scale": SIGMOID_LOGIT_SCALE, "init_logit_bias": SIGMOID_LOGIT_BIAS}
    return config | {"vision_cfg": vision, "text_cfg": text}


def _ratio(tower: Tower) -> float:
    """Four digits, as OpenCLIP's own files have them, that give `tower.mlp` when cut down."""
    return math.ceil(tower.mlp / tower.width * 1e4) / 1e4


def describe(stored: dict[str, Any]) -> Described:
    """Args:
        stored: the content of `open_clip_config.json`.

    Raises:
        FormatError: fields that are missing, or that this code would not follow.
    """
    model = section(stored, "model_cfg", CONFIG)
    vision, text = (
        section(model, "vision_cfg", "model_cfg"),
        section(model, "text_cfg", "model_cfg"),
    )
    check_inert(model, _MODEL, {}, "model_cfg")
    check_inert(vision, _VISION, _VISION_INERT, "vision_cfg")
    check_inert(text, _TEXT, _TEXT_INERT, "text_cfg")
    if text.get("pad_id"):
        raise FormatError(f"text_cfg.pad_id={text['pad_id']}: texts are padded with 0 here")
    clipa = _is_clipa(vision, text)
    tokenizer = text.get("hf_tokenizer_name")
    if tokenizer and not clipa:
        raise FormatError(
            f"text_cfg.hf_tokenizer_name={tokenizer!r}: only models of CLIPA's form have another "
            "tokenizer than CLIP's byte pairs here"
        )
    options = text.get("tokenizer_kwargs") or {}
    if options != ({"strip_sep_token": True} if tokenizer else {}):
        raise FormatError(
            f"text_cfg.tokenizer_kwargs={options}: a WordPiece is read with its separator stripped "
            "here, CLIP's byte pairs as they are"
        )
    vision_width, head = vision.get("width", 768), vision.get("head_width", 64)
    text_width = text.get("width", 512)
    shape = Architecture(
        _tower(vision_width, vision.get("layers", 12), vision_width // head, vision),
        vision.get("patch_size", 16),
        _tower(text_width, text.get("layers", 12), text.get("heads", 8), text),
        field(model, "embed_dim", "model_cfg"),
        vision.get("image_size", 224),
        text.get("context_length", 77),
        clipa,
    )
    image = stored.get("preprocess_cfg") or {}
    known = {k: tuple(image[k]) for k in ("mean", "std") if image.get(k)}
    resize = Resize(image.get("resize_mode") or "shortest", image.get("interpolation") or "bicubic")
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return Described(
        shape, act, text.get("vocab_size", 49408), bool(tokenizer), resize=resize, **known
    )


def _is_clipa(vision: dict[str, Any], text: dict[str, Any]) -> bool:
    """CLIPA's form is all five switches together; OpenAI's is none of them."""
    switches = {
        "vision_cfg.no_ln_pre": bool(vision.get("no_ln_pre")),
        "vision_cfg.pool_type": vision.get("pool_type", "tok") != "tok",
        "vision_cfg.final_ln_after_pool": bool(vision.get("final_ln_after_pool")),
        "text_cfg.pool_type": text.get("pool_type", "argmax") != "argmax",
        "text_cfg.no_causal_mask": bool(text.get("no_causal_mask")),
    }
    pools = vision.get("pool_type", "tok"), text.get("pool_type", "argmax")
    if len(set(switches.values())) > 1 or pools not in (("tok", "argmax"), ("avg", "last")):
        raise FormatError(
            f"pooling {pools[0]!r} of images and {pools[1]!r} of texts with "
            f"{', '.join(name for name, on in switches.items() if on)} is neither OpenAI's form "
            "(class token and end of text, causal) nor CLIPA's (averaged patches and last token, "
            "no ln_pre, final norm after pooling, no causal mask)"
        )
    return switches["vision_cfg.no_ln_pre"]


def _tower(width: Any, layers: Any, heads: int, given: dict[str, Any]) -> Tower:
    if not isinstance(layers, int):
        raise FormatError(f"layers={layers}: residual networks are not built here")
    return Tower(width, layers, heads, int(width * given.get("mlp_ratio", 4.0)))
