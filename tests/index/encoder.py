"""Pictures of one colour, and a stand-in model whose vectors are their mean colours."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hqclip_jax.index.folder import Picture, PictureError, Skip
from hqclip_jax.index.model import decode
from hqclip_jax.index.store import Model

MODEL = Model("runs/x", 3, "params", "Mean colour", 3, "0123456789ab")


def png(*rgb: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, rgb).save(out, "PNG")
    return out.getvalue()


class MeanColour:
    """Remembers what it was asked to embed, and may die before a batch or at the end."""

    def __init__(self, batch: int = 2, dies_at: int | None = None, about: Model = MODEL) -> None:
        self.batch, self.dies_at, self.about = batch, dies_at, about
        self.embedded: list[str] = []

    def pictures(
        self, root: Path, pictures: Iterable[Picture]
    ) -> Iterator[tuple[list[Picture], np.ndarray, list[Skip]]]:
        pictures = list(pictures)
        for number, start in enumerate(range(0, len(pictures), self.batch)):
            if number == self.dies_at:
                raise KeyboardInterrupt
            good, z, skipped = [], [], []
            for picture in pictures[start : start + self.batch]:
                self.embedded.append(picture.name)
                try:
                    mean = decode(picture.read(root), 8).mean(axis=(0, 1)) + 1e-3
                except PictureError as e:
                    skipped.append(Skip(picture.name, e.reason, e.detail))
                    continue
                good.append(picture)
                z.append(mean / np.linalg.norm(mean))
            yield good, np.array(z, np.float32).reshape(-1, 3), skipped
        if self.dies_at is not None:
            raise KeyboardInterrupt
