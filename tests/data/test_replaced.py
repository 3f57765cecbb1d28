"""Records that can't be read: what stands in for them, and what is said of them."""

import dataclasses
import io
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hqclip_jax.data import pipeline as pipeline_lib
from hqclip_jax.data import record
from hqclip_jax.data.order import Shuffle
from hqclip_jax.data.pipeline import NumpyBatch, Pipeline
from hqclip_jax.data.record import DatasetError, Record
from tests.conftest import make_record, write_dataset
from tests.data.batches import join, on_hosts, pipeline, same, take

LOG = "replaced.jsonl"
MAX_PIXELS = 50_000


def half_a_jpeg(r: Record) -> Record:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    whole = buffer.getvalue()
    return dataclasses.replace(r, image=whole[: len(whole) // 2])


def bomb(r: Record) -> Record:
    """A small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "PNG")
    return dataclasses.replace(r, image=buffer.getvalue())


class Spoiled(SimpleNamespace):
    """A data set with holes.

    Attributes:
        directory: where it lies.
        records: as they were before.
        bad: why a record can't be read, by its number.
    """

    def tried(self, position: int) -> list[int]:
        """Numbers of the records that are tried at a position, the last of which is read."""
        shuffle = Shuffle("train", len(self.records), seed=0)
        (epoch,), (number,) = (found.tolist() for found in shuffle(np.array([position])))
        numbers = [number]
        while numbers[-1] in self.bad:
            numbers.append(shuffle.stand_in(epoch, position, len(numbers)))
        return numbers


def spoil(directory: Path, total: int, bad: dict[int, str]) -> Spoiled:
    records = [make_record(i) for i in range(total)]
    stored = list(records)
    for number, reason in bad.items():
        if reason != "record":
            stored[number] = {"image": half_a_jpeg, "pixels": bomb}[reason](records[number])
    cut = {records[number].uid for number, reason in bad.items() if reason == "record"}
    encode = record.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "encode", lambda r: encode(r)[: -100 if r.uid in cut else None])
        write_dataset(directory, [stored[: total // 2], stored[total // 2 :]])
    return Spoiled(directory=directory, records=records, bad=bad)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Spoiled:
    """Two of every three can't be read, so that what stands in often can't either."""
    reasons = itertools.cycle(record.REPLACED)
    bad = {number: next(reasons) for number in range(40) if number % 3}
    return spoil(tmp_path_factory.mktemp("spoiled") / "data", 40, bad)


def of(spoiled: Spoiled, batch: int = 8, **options) -> Pipeline:
    return pipeline(spoiled.directory, batch, max_pixels=MAX_PIXELS, **options)


@pytest.fixture(scope="module")
def whole(spoiled) -> NumpyBatch:
    """Two epochs, unbroken."""
    return join(take(of(spoiled), 10))


def test_what_cannot_be_read_is_replaced_and_counted_by_its_reason(spoiled, whole):
    for position in range(80):
        numbers = spoiled.tried(position)
        assert whole["uid"][position].decode() == spoiled.records[numbers[-1]].uid
        first = spoiled.bad.get(numbers[0])
        code = 1 + record.REPLACED.index(first) if first else 0
        assert whole["replaced"][position] == code
    assert set(whole["replaced"]) == {0, 1, 2, 3}


def test_what_stands_in_is_what_the_record_itself_is_in_that_epoch(spoiled, whole):
    for epoch in range(2):
        rows = {k: v[40 * epoch : 40 * epoch + 40] for k, v in whole.items() if k != "replaced"}
        replaced = whole["replaced"][40 * epoch : 40 * epoch + 40] > 0
        own = {uid: i for i, uid in enumerate(rows["uid"]) if not replaced[i]}
        assert replaced.sum() == 26
        for i in np.flatnonzero(replaced):
            assert all(np.array_equal(v[i], v[own[rows["uid"][i]]]) for v in rows.values())


@pytest.mark.parametrize("start", [3, 37, 40])
def test_replacements_are_the_same_wherever_a_run_begins(spoiled, whole, start):
    rest = join(take(of(spoiled, position={"train": start}), 5))
    assert same(rest, {k: v[start : start + 40] for k, v in whole.items()})


@pytest.mark.parametrize(("batch", "hosts", "threads"), [(1, 1, 1), (8, 4, 2), (80, 2, 5)])
def test_replacements_are_the_same_on_any_hosts(spoiled, whole, batch, hosts, threads):
    found = on_hosts(of(spoiled, batch, threads=threads), 80 // batch, hosts)
    assert same(join(found), whole)


def test_replacements_are_the_same_in_a_mixture(spoiled, whole, dataset):
    path = f"other:1={dataset},train:2={spoiled.directory}"
    p = pipeline(path, 60, max_pixels=MAX_PIXELS)
    rows = join(take(p, 2))
    ours = np.array([place.source == 1 for place in p.mixture(range(120))])
    assert ours.sum() == 80 and not rows["replaced"][~ours].any()
    rows.pop("tag_ids"), (alone := dict(whole)).pop("tag_ids")  # another vocabulary
    assert same({k: v[ours] for k, v in rows.items()}, alone)


def lines(log: Path) -> Iterator[dict]:
    return map(json.loads, log.read_text().splitlines())


def test_every_replaced_record_is_named(spoiled, tmp_path):
    take(of(spoiled, log=tmp_path / LOG), 10)
    found = [line for line in lines(tmp_path / LOG) if line["position"] < 80]  # others: read ahead
    expected = []
    first, second = (str(p) for p in sorted(spoiled.directory.glob("*array_record*")))
    for position in range(80):
        for number in spoiled.tried(position)[:-1]:
            shard = [first, number] if number < 20 else [second, number - 20]
            named = {"source": "train", "epoch": position // 40, "record": number}
            named |= {"position": position, "shard": shard, "reason": spoiled.bad[number]}
            expected.append(named)
    details = [line.pop("detail") for line in found]
    order = lambda line: (line["position"], line["record"])
    assert sorted(found, key=order) == sorted(expected, key=order) and len(found) > 80
    for line, detail in zip(found, details):
        says = {"record": "Example", "image": "decode", "pixels": "300x200 pixels"}
        assert says[line["reason"]] in detail


def test_the_list_of_replaced_records_is_bounded(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_lib, "MOST_NAMED", 5)
    take(of(spoiled, log=tmp_path / LOG, threads=1), 5)
    *named, last = lines(tmp_path / LOG)
    assert len(named) == 4 and all(line["reason"] in record.REPLACED for line in named)
    assert last == {"reason": "after 5 lines of this process no more are named"}


@pytest.mark.parametrize("reason", record.REPLACED)
def test_data_of_which_nothing_can_be_read_ends_the_run(tmp_path, reason):
    nothing = spoil(tmp_path / "data", 4, dict.fromkeys(range(4), reason))
    first = Shuffle("train", 4, seed=0)(0)[1]
    told = f"100 records in a row.* first of them record {first} of source 'train'.*data.check"
    with pytest.raises(DatasetError, match=told):
        take(of(nothing, 4), 1)


def test_processes_make_the_same_batches(spoiled, whole, tmp_path):
    found = take(of(spoiled, log=tmp_path / LOG, processes=2), 10)
    assert same(join(found), whole)
    named = {(line["position"], line["record"]) for line in lines(tmp_path / LOG)}
    assert named >= {(p, n) for p in range(80) for n in spoiled.tried(p)[:-1]}
    assert not multiprocessing.active_children()


def test_an_error_in_a_process_is_the_same_here(tmp_path):
    nothing = spoil(tmp_path / "data", 4, dict.fromkeys(range(4), "image"))
    with pytest.raises(DatasetError, match="100 records in a row"):
        take(of(nothing, 4, processes=1), 1)
