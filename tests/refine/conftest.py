"""Rendered tars: tiny images and texts in the layouts of img2dataset and VLM-150M."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine.__main__ import main
from tests.real_data import real_data  # noqa: F401 (tests with vLLM run without tests/conftest.py)


def uid_of(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


class Make:
    """Makes what tests refine; everything is a function of small numbers."""

    uid = staticmethod(uid_of)

    @staticmethod
    def image(number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind)
        return out.getvalue()

    @staticmethod
    def tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", **options) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    @classmethod
    def pair(cls, number: int, key: str | None = None, **meta) -> list[tuple[str, bytes]]:
        """The members of a pair; keywords change its JSON."""
        key = key or f"{number:09d}"
        meta = {"uid": uid_of(number), "caption": f"json caption {number}"} | meta
        return [
            (f"{key}.jpg", cls.image(number)),
            (f"{key}.txt", f"A red apple no {number}".encode()),
            (f"{key}.json", json.dumps(meta).encode()),
        ]

    @classmethod
    def pairs(cls, path: Path, numbers, **options) -> Path:
        return cls.tar(path, [m for n in numbers for m in cls.pair(n)], **options)

    @staticmethod
    def texts(number: int) -> dict[str, list[str]]:
        return {
            "tags": [f"tag {number % 3}", "Fruit", "fruit"],
            "neg_tags": ["stone"],
            "desc": [f"an apple of number {number}.", "it is &amp;amp; red."],
            "neg_desc": [f"a pear of number {number}.", " "],
        }

    @classmethod
    def annotations(cls, path: Path, numbers, **options) -> Path:
        members = [
            (f"{n // 4:06d}/{uid_of(n)}.json", json.dumps(cls.texts(n)).encode()) for n in numbers
        ]
        return cls.tar(path, members, **options)

    @staticmethod
    def subset(path: Path, numbers, plain: bool = False) -> Path:
        """A sorted list of uids as DataComp publishes it, or a plain array."""
        uids = sorted(uid_of(n) for n in numbers)
        rows = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
        dtype = np.uint64 if plain else [("f0", "<u8"), ("f1", "<u8")]
        np.save(path, np.array(rows, dtype))
        return path


@pytest.fixture
def make() -> type[Make]:
    return Make


@pytest.fixture
def refine():
    """Runs `python -m refine run` in this process and returns the exit status."""

    def run(*arguments, workers: int = 1) -> int:
        return main(["run", *map(str, arguments), "--workers", str(workers)])

    return run


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory by its relative name."""
    files = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


@pytest.fixture
def read_tree():
    return contents


@pytest.fixture
def records():
    """Reads the records of a data set, in order."""
    from hqclip_jax.data.record import decode
    from hqclip_jax.data.shards import open_source

    def read(directory: Path) -> list:
        return [decode(entry) for entry in open_source(directory)]

    return read


@pytest.fixture
def skipped():
    """Reads `skipped.jsonl` of a data set."""

    def read(directory: Path) -> list[dict]:
        return [json.loads(line) for line in (directory / "skipped.jsonl").open()]

    return read


@pytest.fixture
def counts():
    """Reads the counts of a data set that are not 0."""

    def read(directory: Path) -> dict[str, int]:
        stored = json.loads((directory / "manifest.json").read_text())["counts"]
        return {key: count for key, count in stored.items() if count}

    return read
