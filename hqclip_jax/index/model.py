"""A checkpoint's towers for searching: pictures from a disk and queries to vectors."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from hqclip_jax.data.image import ImageError, TooManyPixels, eval_transform, open_rgb
from hqclip_jax.data.text import clean
from hqclip_jax.evals.embed import Embedder
from hqclip_jax.index.folder import MAX_BYTES, Picture, PictureError, Skip
from hqclip_jax.index.store import Model, SearchError
from hqclip_jax.models.zoo import ARCHITECTURES
from hqclip_jax.restore import RestoredModel, restore_model

AGAINST = 0.5  # of a negative's vector that is taken off a query's


@dataclass
class _Item:
    """A picture on its way: read when a thread decodes it, so that files don't queue in memory."""

    picture: Picture
    skip: Skip | None = None

    @property
    def source(self) -> str:
        return self.picture.name


class _FromDisk(Embedder):
    """Reads where it decodes, and puts a blank in the place of what fails, with the reason."""

    root = Path()

    def _decode(self, item: _Item) -> np.ndarray:
        try:
            return decode(item.picture.read(self.root), self.image_size)
        except PictureError as e:
            item.skip = Skip(item.picture.name, e.reason, e.detail)
            return np.zeros((self.image_size, self.image_size, 3), np.uint8)


def decode(encoded: bytes, size: int) -> np.ndarray:
    """The evaluation's transform: uint8 [size, size, 3].

    Raises:
        PictureError: not a picture, or one too large to decode.
    """
    try:
        return eval_transform(open_rgb(encoded), size)
    except TooManyPixels as e:
        raise PictureError("too many pixels", str(e)) from e
    except ImageError as e:
        raise PictureError("picture does not decode", str(e)) from e


class SearchModel:
    """Both towers of a checkpoint, over all devices of this process.

    Args:
        restored: the checkpoint.
        checkpoint: the run's folder, for people.
        weights: which of its weights these are.
        batch: pictures or texts a step.

    Attributes:
        about: what an index says of it.
    """

    def __init__(self, restored: RestoredModel, checkpoint: str, weights: str, batch: int) -> None:
        self.tokenizer = restored.tokenizer
        self._embedder = _FromDisk(
            restored.model,
            restored.params,
            restored.tokenizer,
            restored.config.model.image_size,
            restored.mesh,
            batch,
        )
        model = asdict(restored.config.model)
        self.about = Model(
            checkpoint, int(restored.step), weights, restored.config.model.arch,
            ARCHITECTURES[restored.config.model.arch].embed_dim,
            digest(model | {"tokenizer": restored.tokenizer.name}, restored.params),
        )  # fmt: skip

    @classmethod
    def restore(cls, checkpoint: str, step: int | None, weights: str, batch: int) -> "SearchModel":
        """Raises:
        CheckpointError, ConfigError: see `restore_model`.
        """
        return cls(restore_model(checkpoint, step, weights), checkpoint, weights, batch)

    def pictures(
        self, root: Path, pictures: Iterable[Picture]
    ) -> Iterator[tuple[list[Picture], np.ndarray, list[Skip]]]:
        """Yields, batch by batch, pictures, their vectors f32 [n, D], and what was left out.

        Raises:
            EmbeddingError: the checkpoint has diverged.
        """
        self._embedder.root = root
        for items, z_nxD in self._embedder.images(map(_Item, pictures)):
            good = [i for i, item in enumerate(items) if item.skip is None]
            skipped = [item.skip for item in items if item.skip]
            yield [items[i].picture for i in good], z_nxD[good], skipped

    def queries(
        self, texts: Sequence[str], images: Sequence[Path], against: Sequence[str] = ()
    ) -> np.ndarray:
        """Unit vectors f32 [texts + images, D].

        Args:
            against: what the pictures should not show: half the mean of these texts' vectors is
                taken off each query. A rule of thumb of ours, not a published one.

        Raises:
            SearchError: a text without a letter, number or symbol, or a file that is no picture.
        """
        for text in (*texts, *against):
            check_text(text)
        z = [self._texts(texts)] if texts else []
        z += [self._image(path) for path in images]
        z_qxD = np.concatenate(z)
        if against:
            z_qxD = z_qxD - AGAINST * self._texts(against).mean(axis=0)
        return z_qxD / np.linalg.norm(z_qxD, axis=1, keepdims=True)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """Those of which the model sees only the beginning."""
        cleaned = [clean(text) for text in texts]
        ids = self.tokenizer(cleaned)
        return [text for text, c, row in zip(texts, cleaned, ids) if self.tokenizer.cuts(c, row)]

    def _texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedder.texts(texts)

    def _image(self, path: Path) -> np.ndarray:
        try:
            found = path.stat()
        except OSError as e:
            raise SearchError(f"--image={path}: {e.strerror}") from e
        if not path.is_file():
            raise SearchError(f"--image={path} is no file")
        size = min(found.st_size, MAX_BYTES + 1)
        picture = Picture(path.name, found.st_size, found.st_mtime_ns, "", 0, size)
        ((_, z_nxD, skipped),) = self.pictures(path.parent, [picture])
        for skip in skipped:
            raise SearchError(f"--image={path}: {skip.reason} ({skip.detail})")
        return z_nxD


def check_text(text: str) -> None:
    """Raises:
    SearchError: nothing in it to search for.
    """
    if not any(unicodedata.category(character)[0] in "LNS" for character in clean(text)):
        raise SearchError(
            f"the text {text!r} has no letter, number or symbol in it: nothing to search for"
        )


def digest(model: dict, params: dict) -> str:
    """12 hex digits of an architecture and its parameters, to the bit; the path plays no part."""
    whole = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()[:12]
