"""An index on a disk: vectors, the pictures they are of, and which model made them.

    INDEX/index.json      what it is; it names the snapshot, and replacing it is what commits one
    INDEX/000002/         a snapshot: vectors.npy, pictures.jsonl, ends.npy, perhaps nearest.faiss
    INDEX/skipped.jsonl   what is not in it, and why
    INDEX/parts/          batches of a build that has not finished

As a library, with vectors of the model that the index was made by:

    index = Index.open("runs/search/photos")
    similarity_qxk, row_qxk = index.nearest(z_qxD, k=10)
    print(index.picture(row_qxk[0, 0]).name)

No JAX here.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hqclip_jax.index import approximate
from hqclip_jax.index.folder import Picture

ABOUT, SKIPPED, PARTS = "index.json", "skipped.jsonl", "parts"
VECTORS, PICTURES, ENDS = "vectors.npy", "pictures.jsonl", "ends.npy"
FORMAT = 1
CHUNK = 2**15  # vectors that are compared at a time


class SearchError(ValueError):
    """A search that can't be done; the message says what is missing and the mend."""


@dataclass(frozen=True)
class Model:
    """Which model an index's vectors are of.

    Attributes:
        checkpoint: the run's folder.
        step: of the checkpoint.
        weights: `params` or `ema`.
        arch: its name.
        dim: D, of the vectors.
        digest: of architecture and parameters; equal where the model is the same, wherever it lies.
    """

    checkpoint: str
    step: int
    weights: str
    arch: str
    dim: int
    digest: str

    def __str__(self) -> str:
        average = ", average of the weights" if self.weights == "ema" else ""
        return f"{self.checkpoint}, step {self.step:,} ({self.arch}{average}, {self.digest})"


@dataclass(frozen=True)
class About:
    """What `index.json` says.

    Attributes:
        images: the folder that was indexed, absolute.
        model: which made the vectors.
        count: vectors.
        skipped: what was left out, by reason.
        others: number of files that are no pictures by their suffix.
        snapshot: folder of the vectors; empty until a build has finished.
        updated: UTC, ISO 8601.
    """

    images: str
    model: Model
    count: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    others: int = 0
    snapshot: str = ""
    updated: str = ""

    @classmethod
    def read(cls, index: Path) -> "About":
        """Raises:
        SearchError: no index there, or one that this version can't read.
        """
        file = index / ABOUT
        try:
            stored = json.loads(file.read_text())
            found = stored.pop("format")
            if found == FORMAT:
                return cls(**stored | {"model": Model(**stored["model"])})
        except (FileNotFoundError, NotADirectoryError) as e:
            raise SearchError(
                f"{index} holds no index: make one with `python -m hqclip_jax.search build`"
            ) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SearchError(f"{file} is damaged ({e}): remove {index} and build it again") from e
        raise SearchError(
            f"{file} is of format {found!r}, and this version reads {FORMAT}: remove {index} and "
            "build it again"
        )

    def write(self, index: Path) -> None:
        replace_text(index / ABOUT, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes ASCII (JSON of names that are any bytes), under another name until it is whole."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)


def encode(picture: Picture) -> bytes:
    """One line of JSON, in ASCII."""
    return json.dumps(astuple(picture)).encode() + b"\n"


def decode(line: bytes) -> Picture:
    return Picture(*json.loads(line))


def write_snapshot(
    folder: Path, rows: Iterable[tuple[Picture, np.ndarray]], count: int, dim: int
) -> None:
    """Writes a snapshot; the folder has its name only when all of it is there.

    Args:
        folder: which must not exist.
        rows: pictures with their f16 [D], `count` of them.
    """
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    vectors = np.lib.format.open_memmap(partial / VECTORS, "w+", np.float16, (count, dim))
    ends, written = np.zeros(count, np.int64), 0
    with (partial / PICTURES).open("wb") as file:
        for picture, z_D in rows:
            vectors[written] = z_D
            file.write(encode(picture))
            ends[written] = file.tell()
            written += 1
    if written != count:
        raise RuntimeError(f"{count:,} pictures were to be written, and {written:,} came")
    np.save(partial / ENDS, ends)
    vectors.flush()
    if approximate.wanted(count):
        approximate.build(vectors, partial / approximate.FILE)
    partial.replace(folder)


@dataclass(frozen=True)
class Index:
    """An index opened to read; what it holds is memory-mapped, and stays while it is open.

    Attributes:
        folder: where it lies.
        about: what it is of.
        vectors: f16 [N, D], of unit length.
        ends: int64 [N], where each picture's line in `pictures.jsonl` ends.
        lines: that file, uint8.
    """

    folder: Path
    about: About
    vectors: np.ndarray
    ends: np.ndarray
    lines: np.ndarray

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Raises:
        SearchError: no index there, one that was never finished, or a damaged one.
        """
        path = Path(path)
        about = About.read(path)
        if not about.snapshot:
            raise SearchError(f"the build of {path} has not finished: start it again, it goes on")
        snapshot = path / about.snapshot
        try:
            vectors, ends = (np.load(snapshot / n, mmap_mode="r") for n in (VECTORS, ENDS))
            lines = np.memmap(snapshot / PICTURES, np.uint8, "r")
        except (OSError, ValueError) as e:
            if About.read(path).snapshot != about.snapshot:  # a build has just ended
                return cls.open(path)
            raise SearchError(f"{snapshot} is damaged ({e}): remove {path}, build it again") from e
        if not len(vectors) == len(ends) == about.count or ends[-1] != len(lines):
            raise SearchError(f"{snapshot} is cut short: remove {path} and build it again")
        return cls(path, about, vectors, ends, lines)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def images(self) -> Path:
        return Path(self.about.images)

    def picture(self, row: int) -> Picture:
        start = self.ends[row - 1] if row else 0
        return decode(self.lines[start : self.ends[row]].tobytes())

    def pictures(self) -> Iterator[Picture]:
        """All, in order."""
        with (self.folder / self.about.snapshot / PICTURES).open("rb") as file:
            yield from map(decode, file)

    def nearest(self, z_qxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest pictures of each query, or all if there are fewer.

        Exact, but for indexes that have a `nearest.faiss`, which may miss one now and then. The
        similarities are computed from the same vectors either way.

        Args:
            z_qxD: [q, D] or [D], of any length but zero.

        Returns:
            cosines f32 [q, k], descending, and rows int64 [q, k].

        Raises:
            SearchError: vectors of another size, zero, or not finite.
        """
        z_qxD = np.atleast_2d(np.asarray(z_qxD, np.float32))
        if z_qxD.shape[1] != self.vectors.shape[1]:
            raise SearchError(
                f"vectors of {z_qxD.shape[1]} numbers, and the index's have {self.vectors.shape[1]}"
            )
        length = np.linalg.norm(z_qxD, axis=1, keepdims=True)
        if not (np.isfinite(length).all() and length.all()):
            raise SearchError("a vector that is zero or not finite has no direction to search in")
        z_qxD, k = z_qxD / length, min(k, len(self))
        if self._approximate is None:
            return self._exact(z_qxD, k)
        row_qxc = approximate.candidates(self._approximate, z_qxD, k)
        found = [self._ranked(z, row[row >= 0], k) for z, row in zip(z_qxD, row_qxc)]
        if min(len(row) for _, row in found) < k:  # the cells nearby are nearly empty
            return self._exact(z_qxD, k)
        return tuple(map(np.stack, zip(*found)))

    @cached_property
    def _approximate(self) -> Any:
        file = self.folder / self.about.snapshot / approximate.FILE
        return approximate.load(file) if file.exists() and approximate.available() else None

    def _ranked(self, z_D: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.sort(rows)
        similarity = self.vectors[rows].astype(np.float32) @ z_D
        best = np.argsort(-similarity, kind="stable")[:k]
        return similarity[best], rows[best]

    def _exact(self, z_qxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        best, rows = np.empty((len(z_qxD), 0), np.float32), np.empty((len(z_qxD), 0), np.int64)
        for start in range(0, len(self), CHUNK):
            similarity = z_qxD @ self.vectors[start : start + CHUNK].astype(np.float32).T
            own, row = _highest(similarity, k)
            both, row = np.hstack([best, own]), np.hstack([rows, start + row])
            best, kept = _highest(both, k)
            rows = np.take_along_axis(row, kept, axis=1)
        order = np.lexsort((rows, -best))  # of equal ones the first
        return np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _highest(x_qxn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of each row, unordered, and their columns; all if there are fewer."""
    columns = np.argpartition(-x_qxn, min(k, x_qxn.shape[1]) - 1, axis=1)[:, :k]
    return np.take_along_axis(x_qxn, columns, axis=1), columns
