"""Sets of labelled images, whatever their layout: `open_labelled` finds out which one it is."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from hqclip_jax.evals.datasets import (
    EvalDataError,
    Example,
    Labelled,
    image_of,
    read_tar,
    read_text,
    tar_files,
)
from hqclip_jax.evals.folders import ImageFolder
from hqclip_jax.evals.names import CLASSNAMES, TEMPLATES, read_names, read_templates
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.tfds import TfdsFolder, is_tfds

KINDS = ("classification", "multilabel")


@dataclass(frozen=True)
class MultiLabelled(Example):
    """`present`: bool [classes]."""

    present: np.ndarray


class LabelledSet(Protocol):
    """What each layout's reader offers."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def examples(self, skips: Skips) -> Iterator[Labelled]: ...


def open_labelled(
    path: Path,
    classnames: Path | None = None,
    templates: Path | None = None,
    split: str = "test",
    label: str = "label",
) -> LabelledSet:
    """A set in CLIP_benchmark's layout, a TFDS folder, or a folder of a folder per class.

    Args:
        classnames, templates: files instead of the set's own; see `names.read_names`.
        split: of TFDS; the folder of the tars; or that between `path` and the classes', if any.
        label: the feature, of TFDS.

    Raises:
        EvalDataError: nothing there, or none of these layouts.
    """
    if not path.is_dir():
        raise EvalDataError(f"{path} is missing")
    if is_tfds(path):
        return TfdsFolder.open(path, split, label, classnames, templates)
    tars = (path / split / "nshards.txt", *path.glob("*.tar"), *path.glob("*/*.tar"))
    if any(t.exists() for t in tars) or not any(child.is_dir() for child in path.iterdir()):
        return ClassificationFolder.open(path, split, "classification", classnames, templates)
    return ImageFolder.open(path, split, classnames, templates)


@dataclass(frozen=True)
class ClassificationFolder:
    """CLIP_benchmark's layout, which DataComp's sets have: `classnames.txt`,
    `zeroshot_classification_templates.txt`, `test/nshards.txt`, `test/0.tar`, ... with `KEY.webp`
    (or .jpg, .png), the class's number in `KEY.cls`, and `KEY.npy`: of a multi-label set 0 or 1
    per class, of WILDS' and the fairness sets whole numbers that place the image in groups."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    tars: tuple[Path, ...]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str = "test",
        kind: str = "classification",
        classnames: Path | None = None,
        templates: Path | None = None,
    ) -> "ClassificationFolder":
        """Reads names and templates, and checks that all tars are there.

        Args:
            kind: what `dataset_type.txt` must say, if it is there.

        Raises:
            EvalDataError: a file missing, a template without `{c}`, another kind of set.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise EvalDataError(f"{folder} is missing")
        file = folder / "dataset_type.txt"
        if file.exists() and (found := read_text(file).strip()) != kind:
            raise EvalDataError(
                f"{file} says {found!r}, this task reads {kind!r}: "
                "the tasks are zeroshot, multilabel and retrieval"
            )
        names = read_names(classnames or folder / CLASSNAMES)
        prompts = read_templates(templates or folder / TEMPLATES)
        return cls(names, prompts, tuple(tar_files(folder, split)))

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        """`metadata` is empty where `.npy` is missing or of another form: few sets need it."""
        for source, sample in self._samples(skips):
            text = sample.get("cls", b"").decode(errors="replace").strip()
            if not text.isdecimal() or int(text) >= len(self.classnames):
                reason = f"label is no class from 0 to {len(self.classnames) - 1}"
                skips.add(reason, f"{source}.cls: {text[:40]!r}")
            elif (image := image_of(source, sample, skips)) is not None:
                yield Labelled(source, image, int(text), _numbers(sample))

    def multi_labelled(self, skips: Skips) -> Iterator[MultiLabelled]:
        for source, sample in self._samples(skips):
            numbers = _numbers(sample)
            if len(numbers) != len(self.classnames) or not {0, 1}.issuperset(numbers):
                reason = f".npy holds no {len(self.classnames)} labels, each 0 or 1"
                skips.add(reason, f"{source}.npy: {len(numbers)} whole numbers")
            elif (image := image_of(source, sample, skips)) is not None:
                yield MultiLabelled(source, image, np.array(numbers, bool))

    def annotated(self, skips: Skips) -> Iterator[Labelled]:
        """Images with `metadata` and no class of their own: `label` is 0."""
        for source, sample in self._samples(skips):
            if (image := image_of(source, sample, skips)) is not None:
                yield Labelled(source, image, 0, _numbers(sample))

    def _samples(self, skips: Skips) -> Iterator[tuple[str, dict[str, bytes]]]:
        for tar in self.tars:
            yield from read_tar(tar, skips)


def _numbers(sample: dict[str, bytes]) -> tuple[int, ...]:
    """`.npy`, if it is one row of whole numbers."""
    try:
        array = np.load(io.BytesIO(sample.get("npy", b"")), allow_pickle=False)
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        return tuple(whole.tolist()) if array.ndim == 1 and (array == whole).all() else ()
    except (ValueError, TypeError, EOFError, OSError):
        return ()


def with_metadata(
    examples: Iterable[Labelled], fields: Sequence[str], skips: Skips
) -> Iterator[Labelled]:
    """The examples that have a number for each of the fields, and no more; counts the others."""
    for example in examples:
        if len(example.metadata) >= len(fields):
            yield replace(example, metadata=example.metadata[: len(fields)])
        else:
            reason = f".npy holds no {len(fields)} whole numbers ({', '.join(fields)})"
            skips.add(reason, f"{example.source}.npy: {len(example.metadata)}")
