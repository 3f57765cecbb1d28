"""Sets that TFDS prepared as ArrayRecord, read without TensorFlow."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqclip_jax.evals.datasets import EvalDataError, Labelled
from hqclip_jax.evals.names import class_names, templates_for
from hqclip_jax.evals.outcome import Skips

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"


def is_tfds(path: Path) -> bool:
    """Whether TFDS wrote this folder, or versions of it into it."""
    return (path / _INFO).exists() or bool(_versions(path))


def _versions(path: Path) -> list[Path]:
    found = [f for f in path.iterdir() if _VERSION.fullmatch(f.name) and (f / _INFO).exists()]
    return sorted(found, key=lambda f: [int(n) for n in f.name.split(".")])


@dataclass(frozen=True)
class TfdsFolder:
    """`DATA_DIR/NAME/VERSION`, or `DATA_DIR/NAME` for its newest version."""

    source: Any
    path: str
    image: str
    label: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    @classmethod
    def open(
        cls, path: Path, split: str, label: str, classnames: Path | None, templates: Path | None
    ) -> "TfdsFolder":
        """
        Args:
            label: the feature that holds the class; the only one there is need not be named.

        Raises:
            EvalDataError: no such split or feature, or files that only TensorFlow reads.
        """
        import tensorflow_datasets as tfds

        path = path if (path / _INFO).exists() else _versions(path)[-1]
        builder = tfds.builder_from_directory(path)
        features, splits = builder.info.features, builder.info.splits
        if split.partition("[")[0] not in splits:
            raise EvalDataError(
                f"{path} has no split {split!r}: name one of {', '.join(splits)} as `split`"
            )
        image = _only(features, tfds.features.Image, "image", path)
        label = _only(features, tfds.features.ClassLabel, label, path)
        raw = features[label].names
        names, prompts = class_names(raw, path, classnames), templates_for(raw, path, templates)
        pictures = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        encoded = dict.fromkeys(pictures, tfds.decode.SkipDecoding())
        try:
            source = builder.as_data_source(split, decoders=encoded)
        except NotImplementedError as e:
            raise EvalDataError(
                f"{path} is not ArrayRecord, all that is read without TensorFlow: prepare it with "
                '`download_and_prepare(file_format="array_record")`, or convert it with '
                "`python -m tensorflow_datasets.scripts.convert_format`"
            ) from e
        return cls(source, f"{path}:{split}", image, label, names, prompts)

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        for i in range(len(self.source)):
            record = self.source[i]
            label = int(record[self.label])
            if 0 <= label < len(self.classnames):
                yield Labelled(f"{self.path}[{i}]", record[self.image], label)
            else:  # TFDS writes -1 where a test split's labels are secret
                reason = f"label is no class from 0 to {len(self.classnames) - 1}"
                skips.add(reason, f"{self.path}[{i}]: {label}")


def _only(features: Any, kind: type, name: str, path: Path) -> str:
    found = sorted(key for key, feature in features.items() if isinstance(feature, kind))
    if name in found:
        return name
    if len(found) != 1:
        raise EvalDataError(
            f"{path} has no {kind.__name__} feature {name!r} but {', '.join(found) or 'none'}: "
            "name one as the set's `label`"
        )
    return found[0]
