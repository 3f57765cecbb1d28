import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hqclip_jax.config import LossConfig
from hqclip_jax.data.order import Shuffle
from hqclip_jax.data.pipeline import NumpyBatch, Pipeline, to_device
from hqclip_jax.data.record import Record
from hqclip_jax.data.tags import TagVocabulary
from hqclip_jax.data.tokenizer import ClipTokenizer
from tests.conftest import make_record, write_dataset
from tests.data.batches import join, on_hosts, pipeline, same, take, uids


def test_batch_shapes_and_types(dataset):
    (batch,) = take(pipeline(dataset), 1)
    assert {k: (v.dtype.str, v.shape) for k, v in batch.items()} == {
        "uid": ("|S32", (8,)),
        "image": ("|u1", (8, 16, 16, 3)),
        "replaced": ("<i4", (8,)),
        "text": ("<i4", (8, 12)),
        "neg_text": ("<i4", (8, 12)),
        "neg_mask": ("<f4", (8,)),
        "text_cut": ("<f4", (8,)),
        "tag_ids": ("<i4", (8, 32)),
    }
    assert not batch["replaced"].any()


def test_an_epoch_holds_every_record_once(dataset):
    found = uids(take(pipeline(dataset, batch=12), 5))
    assert sorted(found) == sorted(make_record(i).uid for i in range(60))


@pytest.mark.parametrize("start", [1, 40, 64, 5 * 60 + 59])
def test_any_position_goes_on_with_the_same_bytes(dataset, start):
    whole = join(take(pipeline(dataset), start // 8 + 4))
    rest = join(take(pipeline(dataset, position={"train": start}), 3))
    assert same(rest, {k: v[start : start + 24] for k, v in whole.items()})


def test_position_counts_what_was_consumed(dataset):
    p = pipeline(dataset, position={"train": 13, "gone": 5})
    assert [p.position(steps) for steps in (0, 3)] == [
        {"train": 13, "gone": 5}, {"train": 37, "gone": 5},
    ]  # fmt: skip


def test_hosts_together_read_what_one_reads(dataset):
    p = pipeline(dataset, position={"train": 16})
    one = take(p, 4)
    assert all(same(a, b) for a, b in zip(on_hosts(p, 4, 4), one, strict=True))
    assert not same(take(p, 1, 0, 4)[0], take(p, 1, 1, 4)[0])


def test_four_hosts_then_two_then_one_lose_and_repeat_nothing(dataset):
    """Two epochs in one history: the last row of the first stands in the middle of a batch."""
    history, position = [], {}
    for hosts, steps in ((4, 2), (2, 5), (1, 8)):
        p = pipeline(dataset, 8, position)
        history += on_hosts(p, steps, hosts)
        position = p.position(steps)
    assert position == {"train": 120}
    every = sorted(make_record(i).uid for i in range(60))
    found = uids(history)
    assert sorted(found[:60]) == sorted(found[60:]) == every
    assert same(join(history), join(take(pipeline(dataset), 15)))


@pytest.mark.parametrize("batch", [1, 20, 120])
def test_the_size_of_batches_changes_no_row(dataset, batch):
    rows = join(take(pipeline(dataset, batch), 120 // batch))
    assert same(rows, join(take(pipeline(dataset), 15)))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (1, 5), (7, 1), (7, 5)])
def test_the_number_of_threads_changes_nothing(dataset, threads, prefetch):
    # A thread makes 16 rows at a time: these batches are shared by three.
    found = take(pipeline(dataset, 40, threads=threads, prefetch=prefetch), 3)
    assert same(join(found), join(take(pipeline(dataset), 15)))


def test_crops_and_texts_change_with_the_epoch(dataset):
    batches = take(pipeline(dataset, batch=60), 2)
    rows = [np.argsort(b["uid"]) for b in batches]
    for name in ("image", "text", "neg_text"):
        first, second = (b[name][r] for b, r in zip(batches, rows))
        assert not np.array_equal(first, second)


def test_seed_changes_order_crops_and_texts(dataset):
    p = pipeline(dataset, batch=60)
    other = Pipeline(dataclasses.replace(p.config, seed=1), ClipTokenizer(12), p.load.tags)
    a, b = (take(each, 1)[0] for each in (p, other))
    assert not np.array_equal(a["uid"], b["uid"])
    rows = [np.argsort(batch["uid"]) for batch in (a, b)]
    assert not np.array_equal(a["image"][rows[0]], b["image"][rows[1]])
    assert not np.array_equal(a["text"][rows[0]], b["text"][rows[1]])


def test_texts_tags_and_masks_belong_to_the_record(dataset):
    tokenizer = ClipTokenizer(12)
    (batch,) = take(pipeline(dataset, batch=60, p_desc=0, p_neg_desc=1), 1)
    tags = TagVocabulary.from_datasets([dataset], 100)
    by_uid = {make_record(i).uid: make_record(i) for i in range(60)}
    colours = {"red": 0, "green": 1, "blue": 2}
    for i, uid in enumerate(batch["uid"]):
        r = by_uid[uid.decode()]
        assert np.array_equal(batch["text"][i], tokenizer([r.caption])[0])
        assert np.array_equal(batch["neg_text"][i], tokenizer([", ".join(r.neg_desc)])[0])
        assert batch["neg_mask"][i] == bool(r.neg_desc)
        assert np.array_equal(batch["tag_ids"][i], tags.ids(r.tags, 32))
        assert batch["image"][i].mean((0, 1)).argmax() == colours[r.tags[0]]
    assert batch["neg_mask"].sum() == 48  # every fifth of 60 has none


def test_negative_that_reads_like_the_positive_after_the_cut_is_masked(dataset_of):
    long = "one two three four five six seven eight nine ten eleven twelve"
    r = dataclasses.replace(make_record(1), caption=f"{long} red", neg_desc=(f"{long} blue",))
    (batch,) = take(pipeline(dataset_of([r]), 1, p_desc=0, p_neg_desc=1), 1)
    assert np.array_equal(batch["text"], batch["neg_text"])
    assert batch["neg_mask"].tolist() == [0]


def test_a_text_is_cut_where_it_has_more_tokens_than_the_context(dataset_of):
    # Ten words fill a context of 12 to its end, and lose nothing.
    records = [
        dataclasses.replace(make_record(i), caption=" ".join(["word"] * n))
        for i, n in enumerate((9, 10, 11))
    ]
    (batch,) = take(pipeline(dataset_of(records), 3, p_desc=0), 1)
    cut = dict(zip(batch["uid"].tolist(), batch["text_cut"].tolist()))
    assert [cut[r.uid.encode()] for r in records] == [0, 0, 1]


def test_losses_that_are_off_cost_nothing(dataset):
    config = pipeline(dataset).config
    config = dataclasses.replace(config, loss=LossConfig(hni=0, tag=0))
    (batch,) = take(Pipeline(config, ClipTokenizer(12), None), 1)
    assert set(batch) == {"uid", "image", "text", "text_cut", "replaced"}


def test_truncation_is_the_share_of_texts_longer_than_the_context(dataset):
    # With start and end: 6 tokens or 7 in the caption, 7 in a negative, 11 in the description.
    assert pipeline(dataset).truncation() == {"caption": 0, "desc": 0, "neg_desc": 0}
    assert pipeline(dataset, context=10).truncation() == {"caption": 0, "desc": 1, "neg_desc": 0}


def test_global_arrays_hold_the_rows_and_uids_stay_behind(dataset):
    (batch,) = take(pipeline(dataset), 1)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    arrays = to_device(batch, sharding, 8)
    assert arrays.keys() == batch.keys() - {"uid"}
    for name, array in arrays.items():
        assert array.sharding == sharding and array.addressable_shards[3].data.shape[0] == 1
        assert np.array_equal(array, batch[name])


@pytest.fixture(scope="module")
def mixed(dataset, tmp_path_factory) -> dict[str, tuple[Path, list[Record]]]:
    """Two data sets and their records: 60 and 30."""
    others = [make_record(i) for i in range(100, 130)]
    directory = write_dataset(tmp_path_factory.mktemp("mixed") / "b", [others])
    return {"a": (dataset, [make_record(i) for i in range(60)]), "b": (directory, others)}


def path_of(mixed: dict, **weights: float | None) -> str:
    parts = {name: "" if w is None else f":{w}" for name, w in weights.items()}
    return ",".join(f"{name}{w}={mixed[name][0]}" for name, w in parts.items())


def by_source(mixed: dict, batches: list[NumpyBatch]) -> dict[str, list[str]]:
    """The uids that each source gave, in order."""
    found = uids(batches)
    members = {name: {r.uid for r in records} for name, (_, records) in mixed.items()}
    return {name: [uid for uid in found if uid in uids] for name, uids in members.items()}


def stream(mixed: dict, name: str, count: int) -> list[str]:
    """What a source gives when it is read from its first record on and without a break."""
    records = mixed[name][1]
    shuffle = Shuffle(name, len(records), seed=0)
    return [records[shuffle(i)[1]].uid for i in range(count)]


def test_a_mixture_holds_its_shares(mixed):
    p = pipeline(path_of(mixed, a=2, b=1), batch=9)
    assert p.records == {"a": 60, "b": 30}
    assert p.shares() == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    found = by_source(mixed, batches := take(p, 10))
    assert {name: len(uids) for name, uids in found.items()} == p.position(10)
    for steps in range(10):
        part = by_source(mixed, batches[steps : steps + 1])
        assert abs(len(part["a"]) - 6) <= 1 and abs(len(part["b"]) - 3) <= 1


def test_without_weights_sources_count_by_their_size(mixed):
    p = pipeline(path_of(mixed, a=None, b=None), batch=90)
    assert p.shares() == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert p.position(1) == pytest.approx({"a": 60, "b": 30}, abs=1)


def test_a_mixture_goes_on_with_the_same_bytes(mixed):
    path = path_of(mixed, a=2, b=1)
    p = pipeline(path, batch=8)
    whole = take(p, 12)
    resumed = pipeline(path, batch=8, position=p.position(5))
    assert same(join(take(resumed, 7)), join(whole[5:]))


def test_each_source_keeps_its_place_when_the_mixture_changes(mixed):
    """Other weights, then without `b`, then with it again, on 1, 3 and 1 hosts."""
    history, position = [], {}
    for weights, steps, hosts in (
        ({"a": 2, "b": 1}, 4, 1), ({"b": 2, "a": 1}, 6, 3), ({"a": 1}, 2, 1),
        ({"a": 1, "b": 1}, 3, 1),
    ):  # fmt: skip
        p = pipeline(path_of(mixed, **weights), 9, position)
        history += on_hosts(p, steps, hosts)
        position = p.position(steps)
    found = by_source(mixed, history)
    assert position == {name: len(uids) for name, uids in found.items()}
    assert position["a"] > 60 and position["b"] > 30  # both begin their next epoch on the way
    for name in "ab":
        assert found[name] == stream(mixed, name, position[name])
