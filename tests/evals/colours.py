"""A model whose embeddings can be worked out by hand: colours, in pictures and in words."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
}


class ColourModel(nnx.Module):
    """An image is its mean colour, a text the mean of the colours it names; both of unit length."""

    def __init__(self) -> None:
        self.table = nnx.Param(jnp.array([(0, 0, 0), *COLOURS.values()], jnp.float32) / 255)

    def encode_image(self, image: jax.Array) -> jax.Array:
        return self._unit(image.astype(jnp.float32).mean(axis=(1, 2)) / 255)

    def encode_text(self, text: jax.Array) -> jax.Array:
        return self._unit(self.table[...][text].sum(axis=1))

    @staticmethod
    def _unit(z: jax.Array) -> jax.Array:
        return z * jax.lax.rsqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-12)


class ColourTokenizer:
    """The first two colours of a text; what comes after is cut."""

    name = "colours"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        words = [[*COLOURS].index(w) + 1 for t in texts for w in t.split() if w in COLOURS]
        counts = [sum(w in COLOURS for w in t.split()) for t in texts]
        out = np.zeros((len(texts), 2), np.int32)
        for row, ids in zip(out, np.split(np.array(words, int), np.cumsum(counts)[:-1])):
            row[: min(2, len(ids))] = ids[:2]
        return out


def picture(*colours: str, format: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    """Equal horizontal bars of these colours."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for bar, colour in zip(np.array_split(pixels, len(colours)), colours):
        bar[:] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_classification(folder: Path, labels: Mapping[str, int]) -> Path:
    """A set over the five colours: one picture per entry of `labels`, named by its colour."""
    members = {}
    for i, (colour, label) in enumerate(labels.items()):
        members[f"s{i}.png"] = picture(colour)
        members[f"s{i}.cls"] = str(label)
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\nsome {c}\n")
    return folder


def write_suite(folder: Path) -> Path:
    """A suite file beside a classification set, a retrieval set, and one that is not there."""
    write_classification(folder / "zs", {c: i for i, c in enumerate(COLOURS)})
    members: dict[str, bytes | str] = {}
    for colour in COLOURS:
        members |= {f"{colour}.png": picture(colour), f"{colour}.txt": f"a {colour} wall"}
    write_tar(folder / "pairs.tar", members)
    sets = [
        {"task": "zeroshot", "name": "colours", "path": "zs"},
        {"task": "retrieval", "name": "walls", "path": "pairs.tar"},
        {"task": "zeroshot", "name": "gone", "path": "gone"},
    ]
    (folder / "suite.json").write_text(json.dumps({"sets": sets}))
    return folder / "suite.json"
