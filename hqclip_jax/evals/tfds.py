"""Sets that TFDS prepared, as ArrayRecord or TFRecord, read without TensorFlow."""

import re
from collections.abc import Callable, Iterator
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

    read: Callable[[Skips], Iterator[dict]]
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
            EvalDataError: no such split or feature, or files of another form.
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
            read = _record_reader(builder, split, encoded)
        except NotImplementedError as e:
            form = builder.info.file_format
            raise EvalDataError(f"{path} is {form}: ArrayRecord and TFRecord can be read") from e
        return cls(read, f"{path}:{split}", image, label, names, prompts)

    def examples(self, skips: Skips) -> Iterator[Labelled]:
        for i, record in enumerate(self.read(skips)):
            label = int(record[self.label])
            if 0 <= label < len(self.classnames):
                yield Labelled(f"{self.path}[{i}]", record[self.image], label)
            else:  # TFDS writes -1 where a test split's labels are secret
                reason = f"label is no class from 0 to {len(self.classnames) - 1}"
                skips.add(reason, f"{self.path}[{i}]: {label}")


def _record_reader(
    builder: Any, split: str, encoded: dict[str, Any]
) -> Callable[[Skips], Iterator[dict]]:
    """The split's records in order, as numpy values; raises NotImplementedError for their form.

    `as_data_source` reads ArrayRecord only, and TFDS needs TensorFlow for TFRecord, its default
    form: the frames of that are read here.
    """
    if builder.info.file_format is not None and builder.info.file_format.value != "tfrecord":
        source = builder.as_data_source(split, decoders=encoded)
        return lambda skips: (source[i] for i in range(len(source)))
    parts, features = builder.info.splits[split].file_instructions, builder.info.features
    return lambda skips: (
        features.deserialize_example_np(record, decoders=encoded)
        for part in parts
        for record in read_tfrecord(Path(part.filename), part.skip, part.skip + part.take, skips)
    )


def read_tfrecord(path: Path, start: int, stop: int, skips: Skips) -> Iterator[bytes]:
    """The records `start` to `stop` of a file: each is 8 bytes of length, a checksum of 4, the
    record, a checksum of 4. The checksums are not looked at; a file cut short is one skip."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        skips.add("file is missing", str(path))
        return
    with path.open("rb") as file:
        for i in range(stop):
            length = int.from_bytes(file.read(12)[:8], "little")
            if not 0 < length <= size - file.tell() - 4:
                skips.add("TFRecord is cut short or broken", f"{path} at record {i:,} of {stop:,}")
                return
            record = file.read(length)
            file.seek(4, 1)
            if i >= start:
                yield record


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
