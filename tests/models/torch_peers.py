"""OpenCLIP's and transformers' models of an architecture of ours, with random weights."""

from typing import NamedTuple

import numpy as np
import torch

from hqclip_jax.models.vision import CLIP_MEAN, CLIP_STD
from hqclip_jax.models.zoo import Architecture, Tower

# A torchvision that misses its CUDA libraries lacks these operators and then can't be imported,
# and neither can what imports it. Nothing here calls them. The registration lasts as long as this.
_torchvision = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(2)


class Sizes(NamedTuple):
    """What a model has that its architecture leaves open."""

    image_size: int
    context_length: int
    vocab_size: int
    act: str = "gelu"


def open_clip_model(
    arch: Architecture,
    sizes: Sizes,
    logit_bias: bool = False,
    custom_text: bool = False,
    seed: int = 0,
) -> torch.nn.Module:
    """OpenCLIP's CLIP, or its CustomTextCLIP, which names the text tower's weights otherwise."""
    vision = {
        "image_size": sizes.image_size,
        "patch_size": arch.patch,
        "width": arch.vision.width,
        "layers": arch.vision.layers,
        "head_width": arch.vision.width // arch.vision.heads,
        "mlp_ratio": arch.vision.mlp / arch.vision.width,
    }
    text = {
        "context_length": sizes.context_length,
        "vocab_size": sizes.vocab_size,
        "width": arch.text.width,
        "layers": arch.text.layers,
        "heads": arch.text.heads,
        "mlp_ratio": arch.text.mlp / arch.text.width,
    }
    if arch.clipa:
        vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        text |= {"no_causal_mask": True, "pool_type": "last"}
    build = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    model = build(
        arch.embed_dim,
        open_clip.model.CLIPVisionCfg(**vision),
        open_clip.model.CLIPTextCfg(**text),
        quick_gelu=sizes.act == "quick_gelu",
        init_logit_bias=-10.0 if logit_bias else None,
    )
    return _with_random_weights(model, seed)


def transformers_model(arch: Architecture, sizes: Sizes, seed: int = 0) -> torch.nn.Module:
    """transformers' CLIPModel, which has no form for CLIPA."""

    def tower(shape: Tower) -> dict:
        return {
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "hidden_act": sizes.act,
        }

    vision = {"image_size": sizes.image_size, "patch_size": arch.patch}
    end = sizes.vocab_size - 1
    text = {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.context_length}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        vision_config=tower(arch.vision) | vision,
        text_config=tower(arch.text) | text,
        projection_dim=arch.embed_dim,
    )
    return _with_random_weights(transformers.CLIPModel(config), seed)


def _with_random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Drawn for biases and norms too: at 0 and 1 mistakes in them would not show."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: torch.Size) -> np.ndarray:
        x = rng.standard_normal(tuple(shape), np.float32)
        if name == "logit_scale":
            return 3 + 0.1 * x
        if name == "logit_bias":
            return x - 10
        if len(shape) == 1:
            return 0.1 * x + np.float32(name.endswith("weight"))
        return x * np.float32(np.prod(shape[1:]) ** -0.5)

    drawn = {k: torch.from_numpy(np.asarray(draw(k, v.shape))) for k, v in _floats(model)}
    model.load_state_dict(drawn, strict=False)
    return model.eval()


def _floats(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(k, v) for k, v in model.state_dict().items() if v.is_floating_point()]


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict, buffers included, as arrays."""
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def random_images(count: int, image_size: int, seed: int = 1) -> np.ndarray:
    """uint8 [count, image_size, image_size, 3]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, image_size, image_size, 3), np.uint8)


def random_texts(count: int, sizes: Sizes, seed: int = 2) -> np.ndarray:
    """int32 [count, context_length]: random ids, the highest id, zeros."""
    rng = np.random.default_rng(seed)
    text = rng.integers(1, sizes.vocab_size - 2, (count, sizes.context_length), np.int32)
    ends = rng.integers(2, sizes.context_length, count)
    for row, end in zip(text, ends, strict=True):
        row[end], row[end + 1 :] = sizes.vocab_size - 1, 0
    return text


def embed(
    model: torch.nn.Module, image: np.ndarray, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings f32 [B, D] of unit length, of uint8 images and token ids."""
    pixels = (image.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    ids = torch.from_numpy(text.astype(np.int64))
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            out = model(input_ids=ids, pixel_values=pixels)
            return out.image_embeds.numpy(), out.text_embeds.numpy()
        zimg = model.encode_image(pixels, normalize=True)
        return zimg.numpy(), model.encode_text(ids, normalize=True).numpy()
