import dataclasses
import io
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from hqclip_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig
from hqclip_jax.data import record
from hqclip_jax.data.pipeline import HostPositions, Order, Pipeline, Place, Replacements
from hqclip_jax.data.record import DatasetError
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import ClipTokenizer
from tests.conftest import make_record


def pipeline(directory, batch: int = 8, **data) -> Pipeline:
    config = Config(
        model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=12),
        data=DataConfig(path=str(directory), threads=2, prefetch=8, **data),
        optim=OptimConfig(batch=batch),
    )
    tags = TagVocabulary.from_dataset(directory, 100)
    return Pipeline(config, ClipTokenizer(12), tags)


def take(p: Pipeline, start: int, n: int, host: int = 0, hosts: int = 1) -> list[dict]:
    return list(islice(p.batches(start, host, hosts), n))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


def test_order_is_a_new_permutation_every_epoch():
    order = Order(61, seed=3)
    epochs = [[order(e * 61 + i).record for i in range(61)] for e in range(3)]
    assert all(sorted(e) == list(range(61)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(61 + 5) == Place(66, 1, epochs[1][5])
    assert [Order(61, seed=4)(i).record for i in range(61)] != epochs[0]


def test_order_needs_no_memory_at_the_real_size():
    order = Order(1_370_000_000, seed=0)
    seen = {order(i).record for i in range(1000)}
    assert len(seen) == 1000 and max(seen) > 1e9


def test_host_positions_cut_every_batch_into_consecutive_parts():
    hosts = [HostPositions(start=100, batch=6, host=h, hosts=3) for h in range(3)]
    assert [[h[i] for i in range(4)] for h in hosts] == [
        [100, 101, 106, 107], [102, 103, 108, 109], [104, 105, 110, 111],
    ]  # fmt: skip


def test_batch_shapes_and_types(dataset):
    (batch,) = take(pipeline(dataset), 0, 1)
    assert {k: (v.dtype.str, v.shape) for k, v in batch.items()} == {
        "uid": ("|S32", (8,)),
        "image": ("|u1", (8, 16, 16, 3)),
        "text": ("<i4", (8, 12)),
        "neg_text": ("<i4", (8, 12)),
        "neg_mask": ("<f4", (8,)),
        "tag_ids": ("<i4", (8, 32)),
    }


def test_an_epoch_holds_every_record_once(dataset):
    uids = np.concatenate([b["uid"] for b in take(pipeline(dataset, batch=12), 0, 5)])
    assert len(uids) == len(set(uids)) == 60


def test_any_position_continues_with_the_same_bytes(dataset):
    whole = take(pipeline(dataset), 0, 12)
    assert same(take(pipeline(dataset), 5 * 8, 7), whole[5:])


def test_hosts_together_read_what_one_reads(dataset):
    one = take(pipeline(dataset), 16, 4)
    parts = [take(pipeline(dataset), 16, 4, host, 4) for host in range(4)]
    joined = [
        {k: np.concatenate([p[i][k] for p in parts]) for k in one[0]} for i in range(len(one))
    ]
    assert same(joined, one)


def test_crops_and_texts_change_with_the_epoch(dataset):
    batches = take(pipeline(dataset, batch=60), 0, 2)
    rows = [np.argsort(b["uid"]) for b in batches]
    first, second = ([b[k][r] for k in ("image", "text")] for b, r in zip(batches, rows))
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_texts_tags_and_masks_belong_to_the_record(dataset):
    tokenizer = ClipTokenizer(12)
    p = pipeline(dataset, batch=60, p_desc=0, p_neg_desc=1)
    (batch,) = take(p, 0, 1)
    tags = TagVocabulary.from_dataset(dataset, 100)
    by_uid = {make_record(i).uid: make_record(i) for i in range(60)}
    for i, uid in enumerate(batch["uid"]):
        r = by_uid[uid.decode()]
        assert np.array_equal(batch["text"][i], tokenizer([r.caption])[0])
        assert np.array_equal(batch["neg_text"][i], tokenizer([", ".join(r.neg_desc)])[0])
        assert batch["neg_mask"][i] == bool(r.neg_desc)
        assert np.array_equal(batch["tag_ids"][i], tags.ids(r.tags, 32))
    assert batch["neg_mask"].sum() == 48  # every fifth of 60 has none


def test_negative_that_reads_like_the_positive_after_the_cut_is_masked(dataset_of):
    long = "one two three four five six seven eight nine ten eleven twelve"
    r = dataclasses.replace(make_record(1), caption=f"{long} red", neg_desc=(f"{long} blue",))
    (batch,) = take(pipeline(dataset_of([r]), batch=1, p_desc=0, p_neg_desc=1), 0, 1)
    assert np.array_equal(batch["text"], batch["neg_text"])
    assert batch["neg_mask"].tolist() == [0]


def test_losses_that_are_off_cost_nothing(dataset):
    config = pipeline(dataset).config
    config = dataclasses.replace(config, loss=LossConfig(hni=0, tag=0))
    (batch,) = take(Pipeline(config, ClipTokenizer(12), None), 0, 1)
    assert set(batch) == {"uid", "image", "text"}


def half_a_jpeg(index: int) -> record.Record:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    whole = buffer.getvalue()
    return dataclasses.replace(make_record(index), image=whole[: len(whole) // 2])


def test_corrupt_images_are_replaced_counted_and_the_same_again(dataset_of):
    records = [half_a_jpeg(i) if i == 7 else make_record(i) for i in range(30)]
    directory = dataset_of(records)
    p = pipeline(directory, batch=10, max_replaced=0.1)
    batches = take(p, 0, 6)
    uids = np.concatenate([b["uid"] for b in batches])
    assert records[7].uid.encode() not in uids and len(uids) == 60
    assert p.replacements.reasons["ImageError"] >= 2  # once an epoch, and what was read ahead
    assert same(take(pipeline(directory, batch=10, max_replaced=0.1), 30, 3), batches[3:])


def test_too_many_corrupt_images_stop_the_run_with_the_list(dataset_of):
    directory = dataset_of([half_a_jpeg(i) if i % 2 else make_record(i) for i in range(40)])
    with pytest.raises(DatasetError, match=r"data\.max_replaced=0\.01.*record \d+: ImageError"):
        take(pipeline(directory, batch=40), 0, 3)


def test_ten_replacements_are_always_allowed():
    replacements = Replacements(limit=0.0)
    for i in range(10):
        replacements.count_replaced(Place(i, 0, i), "ImageError: x")
    with pytest.raises(DatasetError, match="11 of 0 records"):
        replacements.count_replaced(Place(10, 0, 10), "ImageError: x")


def test_truncation_is_the_share_of_texts_longer_than_the_context(dataset):
    # With start and end: 6 tokens or 7 in the caption, 7 in a negative, 11 in the description.
    p = pipeline(dataset)
    assert p.truncation() == {"caption": 0, "desc": 0, "neg_desc": 0}
    config = dataclasses.replace(
        p.config, model=dataclasses.replace(p.config.model, context_length=10)
    )
    p = Pipeline(config, ClipTokenizer(10), TagVocabulary.from_dataset(dataset, 100))
    assert p.truncation() == {"caption": 0, "desc": 1, "neg_desc": 0}
