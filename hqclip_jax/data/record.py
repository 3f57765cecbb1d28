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
from tensorflow_datasets.proto import tf_example_pb2

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
WRITER_OPTIONS = "group_size:1"

REPLACED = ("record", "image", "pixels")
"""Why a record is replaced in training: its entry can't be read, its picture can't be decoded, or
has more pixels than `data.max_pixels`. A batch holds the number in this list, counted from 1."""


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
NAMES = tuple(f.name for f in fields(Record))


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


def decode(entry: bytes, names: Sequence[str] = NAMES) -> Record:
    """The inverse of `encode`.

    Args:
        entry: of a shard.
        names: fields to read; the others stay empty.

    Raises:
        RecordError: the bytes are no Example, or a field is missing or of another type.
    """
    name = "entry"
    try:
        example = tf_example_pb2.Example.FromString(entry)
        feature = example.features.feature  # reading a name that is not there would add it
        values = {}
        for name in names:
            if name not in feature:
                raise RecordError(f"record has no field {name!r}")
            if name in INTEGERS:
                values[name] = feature[name].int64_list.value[0]
            elif name in LISTS:
                values[name] = tuple([v.decode() for v in feature[name].bytes_list.value])
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
