"""Checkpoints of ours with random weights, and what they make of pictures and texts."""

import io
import tarfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

from hqclip_jax.checkpoint import Checkpoints, RunInfo
from hqclip_jax.config import Config, DataConfig, LossConfig, ModelConfig, validate
from hqclip_jax.data.image import eval_transform, open_rgb
from hqclip_jax.data.text import clean
from hqclip_jax.data.tokenizer import SPECIAL_PIECES, ClipTokenizer, Tokenizer, WordPieceTokenizer
from hqclip_jax.models.clip import CLIP
from hqclip_jax.restore import restore_model

ARCH, CLIPA = "ViT-Pico/8", "ViT-Pico/8-CLIPA"
SIZE, LENGTH = 32, 12

WORDS = "a an photo of red green blue cup ##s ##per fruit juice ca ##fe ! ' < > - 1 2 & ; | / t e"
WORDPIECE = WordPieceTokenizer((*SPECIAL_PIECES, *WORDS.split()), 8, 64)

TEXTS = [
    "a photo of a cup",
    "Two red  cups &amp; a café's juice!",
    "",
    "a very long text about green fruit juice that is cut where the context ends, and more",
    "don't <b>shout</b> 12 | 1/2",
]


def make_config(arch: str = ARCH, sigmoid: bool = False, **model) -> Config:
    sizes = {"image_size": SIZE, "context_length": LENGTH, "act": "quick_gelu"} | model
    return validate(
        Config(
            model=ModelConfig(arch=arch, dtype="float32", **sizes),
            loss=LossConfig(contrastive_form="sigmoid" if sigmoid else "softmax"),
            data=DataConfig(path="data/dfn"),
        )
    )


def random_params(config: Config, vocab_size: int, num_tags: int = 0, seed: int = 0) -> dict:
    """Drawn for biases and norms too: at 0 and 1 mistakes in them would not show."""
    model = nnx.eval_shape(lambda: CLIP(config, vocab_size, num_tags, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = rng.standard_normal(leaf.shape, np.float32)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("logit"):
            return np.float32(3) if name == "logit_scale" else np.float32(-9)
        if name.endswith("scale"):
            return 1 + 0.1 * x
        if name.endswith("bias"):
            return 0.1 * x
        if name.endswith("kernel"):
            fan = leaf.shape[-3] if "qkv" in name else leaf.shape[-2]
            return x * np.float32(fan**-0.5)
        return x * np.float32(leaf.shape[-1] ** -0.5)

    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return jax.tree_util.tree_map_with_path(draw, params)


def write_checkpoint(
    workdir: Path, config: Config, tokenizer: Tokenizer | None = None, seed: int = 0
) -> dict:
    """One checkpoint at step 5; returns its parameters."""
    tokenizer = tokenizer or ClipTokenizer(config.model.context_length)
    params = random_params(config, tokenizer.vocab_size, seed=seed)
    checkpoints = Checkpoints(workdir)
    info = RunInfo(config, {"train": 640}, None, tokenizer.to_json())
    checkpoints.save_params(5, jax.tree.map(jax.numpy.asarray, params), info)
    checkpoints.close()
    return params


def our_embeddings(
    workdir: Path, pictures: list[bytes], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """zimg [n, D] and ztxt [m, D], as evaluation computes them, with exact products."""
    restored = restore_model(workdir)
    size = restored.config.model.image_size
    images = np.stack([eval_transform(open_rgb(x), size) for x in pictures])
    ids = restored.tokenizer([clean(t) for t in texts])
    params = jax.device_put(restored.params, jax.devices()[0])
    model = nnx.merge(restored.model, params)
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.encode_image(images)), np.asarray(model.encode_text(ids))


def cosines(zimg: np.ndarray, ztxt: np.ndarray) -> np.ndarray:
    return np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T


def pictures() -> list[bytes]:
    """Noise in three forms; of the long one the cut is OpenCLIP's in transformers too."""
    rng = np.random.default_rng(3)
    return [_encoded(rng, size) for size in ((70, 50), (40, 40), (33, 88))]


def _encoded(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def real_pictures(data: Path, most: int = 20) -> list[bytes]:
    with tarfile.open(data / "coco_ccby" / "00000.tar") as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
        return [tar.extractfile(m).read() for m in members[:most]]
