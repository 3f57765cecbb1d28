"""Class names and prompt templates: from files, or ImageNet's from an installed OpenCLIP.

They are no part of this package. CLIP's results depend on them by several points, so where they
came from is logged whenever the set's own folder does not hold them.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from hqclip_jax.evals.datasets import EvalDataError, read_json, read_text

log = logging.getLogger("hqclip_jax.evals")

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ("a photo of a {c}.",)  # the one prompt of CLIP's paper, section 3.1.4
_WORDNET_ID = re.compile(r"n\d{8}")


def read_names(file: Path) -> tuple[str, ...]:
    """A name or template per line; or `FILE.json:KEY`, as CLIP_benchmark keeps those of all sets.

    Raises:
        EvalDataError: no such file or key, a blank line but at the end, or no list of texts.
    """
    stem, colon, key = file.name.rpartition(":")
    if not colon or not stem.endswith(".json"):
        # Only the file's end may be blank: a class's number is its line's.
        lines = tuple(line.strip() for line in read_text(file).rstrip().splitlines())
        if not lines or not all(lines):
            raise EvalDataError(f"{file} is empty or has a blank line among its {len(lines)}")
        return lines
    table = read_json(read_text(file.with_name(stem)), str(file.with_name(stem)))
    if not isinstance(table, dict) or key not in table:
        raise EvalDataError(f"{file.with_name(stem)} has no key {key!r}")
    if not table[key] or not all(isinstance(name, str) and name for name in table[key]):
        raise EvalDataError(f"{file} is no list of texts")
    return tuple(table[key])


def read_templates(file: Path) -> tuple[str, ...]:
    """As `read_names`. Raises EvalDataError where one has no `{c}`."""
    templates = read_names(file)
    for template in templates:
        if "{c}" not in template:
            raise EvalDataError(f"{file}: {template!r} has no {{c}} where the class goes")
    return templates


def class_names(raw: Sequence[str], folder: Path, given: Path | None) -> tuple[str, ...]:
    """What the classes are called in prompts, in the order of `raw`.

    Args:
        raw: a name per class, as the data has them: names of folders or of a TFDS feature.
        folder: its `classnames.txt` comes before `raw`.
        given: a file for `read_names`; comes before all.

    Returns:
        the names in the file, one per class; else ImageNet's, if `raw` are WordNet ids; else `raw`
        with spaces for underscores.
    """
    file = given or folder / CLASSNAMES
    if given or file.exists():
        names = read_names(file)
        if len(names) != len(raw):
            raise EvalDataError(
                f"{file} has {len(names):,} names for the {len(raw):,} classes of {folder} "
                f"({', '.join(raw[:3])}, ...): write one for each, in this order"
            )
        return names
    if are_wordnet_ids(raw):
        return imagenet_names(raw, folder)
    return tuple(name.replace("_", " ") for name in raw)


def templates_for(raw: Sequence[str], folder: Path, given: Path | None) -> tuple[str, ...]:
    """The prompts, from `given`, else from `folder`; else OpenAI's 80 for WordNet ids, else one."""
    file = given or folder / TEMPLATES
    if given or file.exists():
        return read_templates(file)
    if are_wordnet_ids(raw):
        return tuple(prompt("{c}") for prompt in _openclip(folder).OPENAI_IMAGENET_TEMPLATES)
    log.warning("%s has no %s: every prompt is %r", folder, TEMPLATES, DEFAULT_TEMPLATES[0])
    return DEFAULT_TEMPLATES


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether the classes are named as ImageNet's folders are."""
    return all(_WORDNET_ID.fullmatch(name) for name in names)


def imagenet_names(wordnet_ids: Sequence[str], source: Path) -> tuple[str, ...]:
    """OpenAI's names of these of ImageNet's 1,000 classes.

    Raises:
        EvalDataError: a class is none of them, or OpenCLIP is not installed.
    """
    names = dict(zip(_imagenet_ids(), _openclip(source).IMAGENET_CLASSNAMES, strict=True))
    if unknown := [i for i in wordnet_ids if i not in names]:
        raise EvalDataError(
            f"{source}: {len(unknown):,} classes such as {unknown[0]} are none of ImageNet's 1,000:"
            f" write {CLASSNAMES} beside them, a name per line in the order of the ids"
        )
    log.info("%s: class names of ImageNet from open_clip", source)
    return tuple(names[i] for i in wordnet_ids)


def _imagenet_ids() -> list[str]:
    import tensorflow_datasets as tfds

    return (tfds.core.tfds_path() / "datasets/imagenet2012/labels.txt").read_text().split()


@functools.cache
def _read_openclip() -> ModuleType | None:
    """OpenCLIP's file of names, run alone: importing the package would import torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).with_name("zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _openclip(source: Path) -> ModuleType:
    module = _read_openclip()
    if module is None:
        raise EvalDataError(
            f"{source}: its classes are WordNet ids, whose names and prompts open_clip has: "
            f"`pip install --no-deps open_clip_torch`, or write {CLASSNAMES} and {TEMPLATES}, or "
            "name such files as `classnames` and `templates` of the set"
        )
    return module
