"""Images as files: a folder per class, or one folder and captions in COCO's or Karpathy's JSON."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hqclip_jax.evals.datasets import (
    IMAGE_SUFFIXES,
    Captioned,
    EvalDataError,
    Labelled,
    read_json,
    read_text,
)
from hqclip_jax.evals.names import class_names, templates_for
from hqclip_jax.evals.outcome import Skips

log = logging.getLogger("hqclip_jax.evals")

SPLITS = {"train", "val", "validation", "test"}


def utf8_name(path: Path | str) -> str:
    """The path as text that any log or JSON takes: a file name may hold bytes that are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class ImageFolder:
    """`ROOT/CLASS/*.jpg`, or `ROOT/SPLIT/CLASS/*.jpg`, as torchvision's `ImageFolder` reads them:
    a class's number is its folder's place in the names' order, and images may lie deeper."""

    folders: tuple[Path, ...]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    @classmethod
    def open(
        cls, root: Path, split: str, classnames: Path | None, templates: Path | None
    ) -> "ImageFolder":
        """Raises EvalDataError: no folders, other splits only, or names that do not fit them."""
        root = root / split if (root / split).is_dir() else root
        folders = sorted((f for f in root.iterdir() if f.is_dir()), key=lambda f: f.name)
        folders = tuple(f for f in folders if not f.name.startswith("."))
        if not folders:
            raise EvalDataError(f"{root} holds no folder per class")
        raw = [utf8_name(f.name) for f in folders]
        if SPLITS.issuperset(raw):
            raise EvalDataError(
                f"{root} holds {', '.join(raw)} and no {split}: name one as the set's `split`"
            )
        names, prompts = class_names(raw, root, classnames), templates_for(raw, root, templates)
        return cls(folders, names, prompts)

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        for label, folder in enumerate(self.folders):
            for file in sorted(folder.rglob("*")):
                if not file.is_file() or file.name.startswith("."):
                    continue
                if file.suffix[1:].lower() in IMAGE_SUFFIXES:
                    image = read_image(file, skips)
                    if image is not None:
                        yield Labelled(utf8_name(file), image, label)
                else:
                    skips.add(f"no image (.{', .'.join(IMAGE_SUFFIXES)})", utf8_name(file))


def read_image(file: Path, skips: Skips) -> bytes | None:
    """The file's bytes. What is missing or can't be read is counted."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        skips.add("image is missing", utf8_name(file))
    except OSError as e:
        skips.add("image can't be read", f"{utf8_name(file)}: {e.strerror}")
    return None


@dataclass(frozen=True)
class CaptionFile:
    """Captions in JSON beside a folder of images.

    Attributes:
        path: the JSON.
        captions: by the image's file; an image may have several, or none.
    """

    path: Path
    captions: dict[Path, tuple[str, ...]]

    @classmethod
    def open(cls, path: Path, images: Path, split: str = "test") -> "CaptionFile":
        """Reads COCO's `captions_val2017.json`, or `dataset_coco.json` and `dataset_flickr30k.json`
        of Karpathy and Fei-Fei (2015), of which only the images of `split` are taken.

        Raises:
            EvalDataError: neither form, no image of the split, or `images` is no folder.
        """
        if not images.is_dir():
            raise EvalDataError(f"{images} is no folder, but the images of {path} should be there")
        stored = read_json(read_text(path), str(path))
        if not isinstance(stored, dict) or not isinstance(stored.get("images"), list):
            raise EvalDataError(f"{path} has no list `images`: it is neither COCO's nor Karpathy's")
        try:
            read = _coco if "annotations" in stored else _karpathy
            captions = read(stored, images, split)
        except (KeyError, TypeError, AttributeError) as e:
            raise EvalDataError(f"{path}: an entry lacks or misuses the field {e}") from e
        if not captions:
            raise EvalDataError(f"{path} holds no image of the split {split!r}")
        return cls(path, captions)

    def check(self) -> None:
        """Logs which images are not there. Raises EvalDataError where none is."""
        missing = [utf8_name(file) for file in self.captions if not file.is_file()]
        if len(missing) == len(self.captions):
            raise EvalDataError(f"none of the images of {self.path} is there, such as {missing[0]}")
        if missing:
            some = ", ".join(missing[:8])
            log.warning("%s: %s images are missing: %s", self.path, f"{len(missing):,}", some)

    def examples(self, skips: Skips) -> Iterator[Captioned]:
        for file, captions in self.captions.items():
            if not captions:
                skips.add("image has no caption", utf8_name(file))
            elif (image := read_image(file, skips)) is not None:
                yield Captioned(utf8_name(file), image, captions)


def _coco(stored: dict, images: Path, split: str) -> dict[Path, tuple[str, ...]]:
    texts: dict[int, list[str]] = defaultdict(list)
    for annotation in stored["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    return {images / i["file_name"]: _stripped(texts[i["id"]]) for i in stored["images"]}


def _karpathy(stored: dict, images: Path, split: str) -> dict[Path, tuple[str, ...]]:
    """COCO's images lie in the `filepath` that is stored, `val2014`, or all in one folder."""
    captions = {}
    for image in stored["images"]:
        if image["split"] == split:
            below = images / image.get("filepath", "") / image["filename"]
            file = below if below.exists() else images / image["filename"]
            captions[file] = _stripped(sentence["raw"] for sentence in image["sentences"])
    return captions


def _stripped(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts if text.strip())
