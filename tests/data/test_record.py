import dataclasses
import json
import subprocess
import sys

import pytest

from hqclip_jax.data import record
from hqclip_jax.data.record import Record, RecordError

FULL = Record(
    uid="0" * 32,
    image=b"\xff\xd8\x00bytes",
    caption="Café — 2 × 3",
    desc=("a cup.", "it is white."),
    neg_desc=("a bowl.",),
    tags=("cup", "white"),
    neg_tags=(),
    width=640,
    height=480,
    source="00000.tar",
    refiner="rules:v1:-",
)


def test_round_trip_keeps_every_field_and_empty_lists():
    assert record.decode(record.encode(FULL)) == FULL
    empty = Record(uid="1" * 32, image=b"x")
    assert record.decode(record.encode(empty)) == empty


def test_equal_records_have_equal_bytes():
    assert record.encode(FULL) == record.encode(dataclasses.replace(FULL))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Record)])
def test_missing_field_is_named(field):
    example = record.tf_example_pb2.Example.FromString(record.encode(FULL))
    del example.features.feature[field]
    with pytest.raises(RecordError, match=repr(field)):
        record.decode(example.SerializeToString())


def test_field_of_another_type_is_named():
    example = record.tf_example_pb2.Example.FromString(record.encode(FULL))
    example.features.feature["width"].bytes_list.value.append(b"640")
    with pytest.raises(RecordError, match="width"):
        record.decode(example.SerializeToString())


def test_text_that_is_no_utf8_is_named():
    example = record.tf_example_pb2.Example.FromString(record.encode(FULL))
    example.features.feature["caption"].bytes_list.value[0] = b"\xff\xfe"
    with pytest.raises(RecordError, match="caption"):
        record.decode(example.SerializeToString())


def test_bytes_that_are_no_example():
    with pytest.raises(RecordError):
        record.decode(b"\xff" * 50)
    with pytest.raises(RecordError):
        record.decode(record.encode(FULL)[:-20])


def test_tfds_reads_the_directory_without_tensorflow(dataset):
    program = f"""
import sys
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(dataset)!r})
source = builder.as_data_source("train", decoders={{"image": tfds.decode.SkipDecoding()}})
first = source[0]
print(len(source), first["uid"].decode(), [t.decode() for t in first["tags"]], first["neg_tags"])
assert "tensorflow" not in sys.modules
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.split()[0] == "60"
    assert "['red', 'picture'] []" in out.stdout


def test_manifest_holds_hashes_and_what_the_engine_said(dataset):
    manifest = json.loads((dataset / record.MANIFEST_FILE).read_text())
    assert manifest["records"] == 60 and manifest["engine"] == "test"
    assert [s["records"] for s in manifest["shards"]] == [25, 35]
    assert all(len(s["sha256"]) == 64 for s in manifest["shards"])
