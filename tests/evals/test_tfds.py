import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from hqclip_jax.evals.datasets import EvalDataError
from hqclip_jax.evals.outcome import Skips
from hqclip_jax.evals.tfds import TfdsFolder
from hqclip_jax.evals.zeroshot import ZeroShot

from .colours import picture

LABEL = tfds.features.ClassLabel


def frame(record: bytes) -> bytes:
    return len(record).to_bytes(8, "little") + b"head" + record + b"tail"


def write_tfds(folder, rows, suffix="array_record", **labels):
    """`DATA_DIR/NAME/VERSION` with a split `test` of (colour, label) rows."""
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), **labels})
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="colours", split="test", filetype_suffix=suffix
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    records = [
        serializer.serialize_example({"image": picture(colour), **dict.fromkeys(labels, label)})
        for colour, label in rows
    ]
    file = folder / f"colours-test.{suffix}-00000-of-00001"
    if suffix == "tfrecord":
        file.write_bytes(b"".join(frame(record) for record in records))
    else:
        writer = ArrayRecordWriter(str(file))
        for record in records:
            writer.write(record)
        writer.close()
    split = tfds.core.SplitInfo(
        name="test", shard_lengths=[len(rows)], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], filename_template=template,
        version=folder.name, check_data=False,
    )  # fmt: skip
    return folder


def test_encoded_images_and_names_without_tensorflow(tmp_path, embedder):
    names = LABEL(names=["red", "bright_green", "blue"])
    rows = [("red", 0), ("green", 1), ("red", 1)]
    folder = write_tfds(tmp_path / "colours" / "1.0.0", rows, label=names)
    data = TfdsFolder.open(folder, "test", "label", None, None)
    assert data.classnames == ("red", "bright green", "blue")
    examples = list(data.examples(Skips()))
    assert [(e.image, e.label) for e in examples] == [(picture(c), n) for c, n in rows]
    assert examples[2].source == f"{folder}:test[2]"
    (folder / "zeroshot_classification_templates.txt").write_text("some {c}")
    found = ZeroShot("colours", folder.parent).run(embedder)
    assert found.scores["top1"] == pytest.approx(2 / 3)
    assert "tensorflow" not in sys.modules


def test_newest_version_and_part_of_a_split(tmp_path):
    for version, rows in (("9.0.0", [("red", 0)]), ("10.0.0", [("red", 0), ("green", 1)])):
        write_tfds(tmp_path / version, rows, label=LABEL(names=["red", "green"]))
    data = TfdsFolder.open(tmp_path, "test[1:]", "label", None, None)
    (example,) = data.examples(Skips())
    assert example.label == 1
    with pytest.raises(EvalDataError, match="has no split 'val': name one of test as `split`"):
        TfdsFolder.open(tmp_path, "val", "label", None, None)


def test_secret_labels_are_counted(tmp_path):
    folder = write_tfds(tmp_path / "1.0.0", [("red", 0), ("red", -1)], label=LABEL(num_classes=1))
    skips = Skips()
    assert len(list(TfdsFolder.open(folder, "test", "label", None, None).examples(skips))) == 1
    assert skips.names == {"label is no class from 0 to 0": [f"{folder}:test[1]: -1"]}


def test_the_feature_that_holds_the_class(tmp_path):
    fine, coarse = LABEL(names=["red", "green"]), LABEL(names=["warm", "cold"])
    one = write_tfds(tmp_path / "1.0.0", [("red", 1)], fine=fine)
    assert TfdsFolder.open(one, "test", "label", None, None).classnames == ("red", "green")
    two = write_tfds(tmp_path / "2.0.0", [("red", 1)], fine=fine, coarse=coarse)
    assert TfdsFolder.open(two, "test", "coarse", None, None).classnames == ("warm", "cold")
    with pytest.raises(EvalDataError, match="no ClassLabel feature 'label' but coarse, fine: name"):
        TfdsFolder.open(two, "test", "label", None, None)


def test_tfrecord_without_tensorflow(tmp_path):
    """Records 1 to 3 of 4; then the file is cut within the last."""
    names, rows = LABEL(names=["red", "green"]), [("red", 0), ("green", 1), ("cyan", 0), ("red", 1)]
    folder = write_tfds(tmp_path / "1.0.0", rows, suffix="tfrecord", label=names)
    data, skips = TfdsFolder.open(folder, "test[1:3]", "label", None, None), Skips()
    expected = [(picture("green"), 1), (picture("cyan"), 0)]
    assert [(e.image, e.label) for e in data.examples(skips)] == expected
    assert not skips.total
    data = TfdsFolder.open(folder, "test", "label", None, None)
    (file,) = folder.glob("*.tfrecord-*")
    file.write_bytes(file.read_bytes()[:-6])
    assert len(list(data.examples(skips))) == 3
    assert skips.names == {"TFRecord is cut short or broken": [f"{file} at record 3 of 4"]}
    file.unlink()
    assert not list(data.examples(skips))
    assert skips.names["file is missing"] == [str(file)]
    assert "tensorflow" not in sys.modules


def test_other_forms_are_refused(tmp_path):
    names = LABEL(names=["red"])
    folder = write_tfds(tmp_path / "1.0.0", [("red", 0)], suffix="riegeli", label=names)
    with pytest.raises(EvalDataError, match=r"RIEGELI: ArrayRecord and TFRecord can be read"):
        ZeroShot("colours", folder).check()
