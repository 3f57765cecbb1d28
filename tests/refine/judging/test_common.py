"""The same pairs in several outputs."""

import numpy as np
import pytest

from refine.judging import common
from refine.judging.common import choose
from refine.judging.outputs import Output
from tests.refine.outputs import make_record, write_output


def opened(tmp_path, name, shards) -> Output:
    records = [[make_record(number) for number in shard] for shard in shards]
    return Output.open(write_output(tmp_path / name, records))


def uids(output, numbers) -> list[str]:
    return [output.record(int(number)).uid for number in numbers]


@pytest.fixture
def three(tmp_path):
    return [
        opened(tmp_path, "a", [range(9), range(9, 24)]),
        opened(tmp_path, "b", [range(30, 3, -1)]),
        opened(tmp_path, "c", [[n] for n in (*range(0, 20, 2), *range(1, 20, 2))]),
    ]


def test_the_kth_is_the_same_pair_in_all(three):
    numbers = choose(three, 10, seed=0)
    first, *others = [uids(output, column) for output, column in zip(three, numbers)]
    assert all(other == first for other in others)
    assert len(set(first)) == 10
    shared = {make_record(n).uid for n in range(4, 20)}
    assert set(first) < shared
    assert set(uids(three[0], choose(three, 100, seed=0)[0])) == shared


def test_the_choice_is_the_seeds_and_not_the_orders(three):
    one = uids(three[0], choose(three, 10, seed=0)[0])
    again = choose([three[2], three[0], three[1]], 10, seed=0, workers=2)
    assert uids(three[2], again[0]) == one
    assert uids(three[0], choose(three, 10, seed=1)[0]) != one
    assert uids(three[0], choose(three, 4, seed=0)[0]) == one[:4]


def test_every_pair_has_the_same_chance(three):
    drawn = [uid for seed in range(400) for uid in uids(three[0], choose(three, 4, seed)[0])]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 16 and counts.min() > 60 and counts.max() < 140  # 100 expected


def test_in_pieces_it_is_the_whole(three, monkeypatch):
    whole = uids(three[0], choose(three, 100, seed=3)[0])
    monkeypatch.setattr(common, "ROWS", 5)
    pieces = []
    real = common._within
    monkeypatch.setattr(common, "_within", lambda *a: pieces.append(a) or real(*a))
    numbers = choose(three, 100, seed=3)
    assert len(pieces) == 5
    assert uids(three[0], numbers[0]) == uids(three[1], numbers[1]) == whole
    pieces.clear()
    assert uids(three[0], choose(three, 2, seed=3)[0]) == whole[:2] and len(pieces) < 5


def test_uids_are_read_once(three, monkeypatch):
    numbers = choose(three, 10, seed=0)
    monkeypatch.setattr(common, "_read", lambda *_: pytest.fail("read again"))
    for one, other in zip(numbers, choose(three, 10, seed=0)):
        np.testing.assert_array_equal(one, other)


def test_of_one_output_any_record(three):
    (numbers,) = choose(three[:1], 7, seed=0)
    assert len(set(numbers.tolist())) == 7 and sorted(numbers) == numbers.tolist()
    assert not (three[0].directory / "scores").exists()
    assert len(choose(three[:1], 99, seed=0)[0]) == 24


def test_nothing_in_common(tmp_path):
    outputs = [opened(tmp_path, "a", [range(3)]), opened(tmp_path, "b", [range(3, 6)])]
    assert [len(column) for column in choose(outputs, 5, seed=0)] == [0, 0]
