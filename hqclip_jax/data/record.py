"""The record: one training pair with its four texts, and the dataset directory that holds them.

Both halves of the repository meet here: `refine` writes what is defined in this file, the training
side reads it. Nothing here needs JAX, torch or TensorFlow.

A dataset directory holds

    NAME-SPLIT.array_record-00000-of-NNNNN   one serialized tf.train.Example per entry, group_size 1
    dataset_info.json, features.json         TFDS metadata
    manifest.json                            counts, skips by reason, engine, one hash per shard
    tag_counts.json                          in how many records each tag occurs
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
WRITER_OPTIONS = "group_size:1"


class RecordError(ValueError):
    """An entry that is not a record; the message names the field."""


class DatasetError(ValueError):
    """A dataset directory that can't be trained on; the message names the file and the mend."""


@dataclass(frozen=True)
class Record:
    """One image with its texts.

    Attributes:
        uid: 32 lower-case hex digits, DataComp's identifier.
        image: the encoded file as received (JPEG, PNG, WebP).
        caption: the web alt-text, cleaned; may be empty.
        desc: sentences of the long positive description.
        neg_desc: sentences of the long negative description; its length may differ from `desc`.
        tags: short positive tags.
        neg_tags: short negative tags.
        width: pixels of the stored image.
        height: pixels of the stored image.
        source: the tar or file it came from.
        refiner: engine, model and prompt hash, such as "annotations:vlm-150m:-".
    """

    uid: str
    image: bytes
    caption: str = ""
    desc: tuple[str, ...] = ()
    neg_desc: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    neg_tags: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    source: str = ""
    refiner: str = ""


LISTS = ("desc", "neg_desc", "tags", "neg_tags")
INTEGERS = ("width", "height")
STRINGS = ("uid", "caption", "source", "refiner")


def encode(record: Record) -> bytes:
    """Serializes to a tf.train.Example. An empty list is stored as a present, empty feature:
    TFDS raises on an absent one."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(record.image)
    for name in STRINGS:
        feature[name].bytes_list.value.append(getattr(record, name).encode())
    for name in INTEGERS:
        feature[name].int64_list.value.append(getattr(record, name))
    for name in LISTS:
        feature[name].bytes_list.SetInParent()
        feature[name].bytes_list.value.extend(text.encode() for text in getattr(record, name))
    return example.SerializeToString(deterministic=True)


def decode(entry: bytes) -> Record:
    """The inverse of `encode`.

    Raises:
        RecordError: the bytes are no Example, or a field is missing or of another type.
    """
    example = tf_example_pb2.Example()
    name = "entry"
    try:
        example.ParseFromString(entry)
        feature = example.features.feature
        values = {}
        for name in (f.name for f in fields(Record)):
            if name not in feature:
                raise RecordError(f"record has no field {name!r}")
            if name in INTEGERS:
                values[name] = feature[name].int64_list.value[0]
            elif name in LISTS:
                values[name] = tuple(v.decode() for v in feature[name].bytes_list.value)
            else:
                value = feature[name].bytes_list.value[0]
                values[name] = value if name == "image" else value.decode()
        return Record(**values)
    except RecordError:
        raise
    except (ValueError, IndexError) as e:  # protobuf's DecodeError is a ValueError
        raise RecordError(f"record field {name!r} can't be read: {e}") from e
    except Exception as e:
        # The C++ protobuf runtime raises DecodeError outside ValueError in some versions.
        if type(e).__name__ != "DecodeError":
            raise
        raise RecordError(f"entry is not a tf.train.Example: {e}") from e


def features() -> tfds.features.FeaturesDict:
    """The TFDS description of a record, for `tfds.builder_from_directory`."""
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    spec: dict = {"image": tfds.features.Image(shape=(None, None, 3))}
    spec |= dict.fromkeys(STRINGS, text) | dict.fromkeys(LISTS, texts)
    spec |= dict.fromkeys(INTEGERS, tfds.features.Scalar(np.int64))
    return tfds.features.FeaturesDict(spec)


def shard_name(name: str, split: str, index: int, total: int) -> str:
    return f"{name}-{split}.array_record-{index:05d}-of-{total:05d}"


@dataclass(frozen=True)
class Shard:
    """A finished shard: file name, records, bytes and SHA-256 of the file's content."""

    file: str
    records: int
    bytes: int
    sha256: str


def write_metadata(
    directory: str | Path, name: str, split: str, shards: Sequence[Shard], manifest: dict
) -> None:
    """Writes the TFDS metadata and, last, `manifest.json`: a directory with one is complete."""
    directory = Path(directory)
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[s.records for s in shards],
        num_bytes=sum(s.bytes for s in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(),
        split_infos=[info],
        filename_template=template,
        version="1.0.0",
        check_data=False,  # its self-check wants TensorFlow
    )
    whole = {
        "version": MANIFEST_VERSION,
        "name": name,
        "split": split,
        "records": sum(s.records for s in shards),
        **manifest,
        "shards": [vars(s) for s in shards],
    }
    partial = directory / (MANIFEST_FILE + ".tmp")
    partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False))
    partial.replace(directory / MANIFEST_FILE)


@dataclass(frozen=True)
class ShardFile:
    """What `array_record`'s data source needs to read a shard without opening it to count it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_shards(directory: str | Path) -> list[ShardFile]:
    """Lists a dataset's shards and checks each against what was written.

    With a manifest the check is one `stat` a shard; a TFDS directory of another origin is opened
    shard by shard, because a truncated ArrayRecord file opens without complaint, as an empty one.

    Raises:
        DatasetError: no dataset here, a shard missing, cut short, or of another record count.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DatasetError(
            f"data set {str(directory)!r} is not a directory: set --config.data.path"
        )
    manifest = directory / MANIFEST_FILE
    if manifest.exists():
        try:
            listed = json.loads(manifest.read_text())["shards"]
        except (ValueError, KeyError) as e:
            raise DatasetError(
                f"{manifest} is not a manifest ({e}): write the data set again"
            ) from e
        counts = {s["file"]: s["records"] for s in listed}
        sizes = {s["file"]: s["bytes"] for s in listed}
    else:
        counts, sizes = _tfds_shards(directory), {}
    shards = []
    for file, records in counts.items():
        path = directory / file
        if not path.exists():
            raise DatasetError(f"shard {path} is missing: restore it, or refine its source again")
        size = path.stat().st_size
        if file in sizes and size != sizes[file]:
            raise DatasetError(
                f"shard {path} has {size:,} bytes where the manifest says {sizes[file]:,}: "
                "it is truncated or was changed; copy or refine it again"
            )
        if file not in sizes:
            found = ArrayRecordReader(str(path)).num_records()
            if found != records:
                raise DatasetError(
                    f"shard {path} holds {found:,} records where dataset_info.json says "
                    f"{records:,}: it is truncated; copy it again"
                )
        shards.append(ShardFile(str(path), 0, records, records))
    if not sum(counts.values()):
        raise DatasetError(f"data set {directory} holds no records")
    return shards


def _tfds_shards(directory: Path) -> dict[str, int]:
    try:
        info = tfds.builder_from_directory(directory).info
    except Exception as e:
        raise DatasetError(
            f"{directory} has neither manifest.json nor TFDS metadata: a refinement that was "
            "interrupted leaves none, so run the same `python -m refine run` again"
        ) from e
    split = info.splits["train" if "train" in info.splits else next(iter(info.splits))]
    return {Path(p).name: n for p, n in zip(split.filepaths, split.shard_lengths)}
