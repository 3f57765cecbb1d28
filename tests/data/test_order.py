import tracemalloc
from collections import Counter

import numpy as np
import pytest

from hqclip_jax.data.order import PERIOD, HostBatches, Mixture, Place, Shuffle
from hqclip_jax.data.record import DatasetError

SIZES = {"a": 200, "b": 150, "c": 90}


def shuffles(names: str) -> list[Shuffle]:
    return [Shuffle(name, SIZES[name], seed=3) for name in names]


def fresh(names: str, weights: list[float]) -> Mixture:
    return Mixture.resume(shuffles(names), weights, {})


def read(mixture: Mixture, count: int, start: int | None = None) -> list[Place]:
    start = mixture.start if start is None else start
    return mixture(range(start, start + count))


def records_of(shuffle: Shuffle, start: int, count: int) -> list[int]:
    return shuffle(np.arange(start, start + count))[1].tolist()


@pytest.mark.parametrize("records", [1, 2, 3, 61, 256, 257, 2**16, 2**16 + 1, 2**16 + 2])
def test_every_record_once_an_epoch(records):
    epochs, found = Shuffle("a", records, seed=3)(np.arange(3 * records))
    for epoch in range(3):
        assert sorted(found[epochs == epoch]) == list(range(records))
    assert np.array_equal(epochs, np.repeat(range(3), records))


def test_every_record_comes_as_often_at_every_place_and_behind_every_other():
    places, epochs = 61, 6100
    orders = Shuffle("a", places, seed=3)(np.arange(places * epochs))[1].reshape(epochs, places)
    steps = np.diff(orders) % places
    for drawn, outcomes in ((orders, range(places)), (steps, range(1, places))):
        counts = np.array([(drawn == outcome).sum(axis=0) for outcome in outcomes])
        expected = epochs / len(outcomes)
        # Chi-squared by its degrees of freedom, of which there are thousands: nearly 1.
        assert ((counts - expected) ** 2).mean() / expected == pytest.approx(1, abs=0.1)


def test_places_may_be_asked_for_one_by_one():
    shuffle, mixture = Shuffle("a", 61, seed=3), fresh("abc", [3, 2, 1])
    assert [records_of(shuffle, i, 1)[0] for i in range(150)] == records_of(shuffle, 0, 150)
    assert [mixture(range(i, i + 1))[0] for i in range(700)] == mixture(range(700))


@pytest.mark.parametrize("records", [61, 10**6])
def test_another_order_every_epoch_for_every_seed_and_every_source(records):
    begins = [
        records_of(Shuffle(name, records, seed), records * epoch, 20)
        for name, seed, epoch in (("a", 3, 0), ("a", 3, 1), ("a", 3, 2), ("a", 4, 0), ("b", 3, 0))
    ]
    assert len({tuple(begin) for begin in begins}) == 5


def test_no_memory_at_the_real_size():
    shuffle = Shuffle("a", 1_370_000_000, seed=0)
    records_of(shuffle, 0, 1)
    tracemalloc.start()
    try:
        seen = {*records_of(shuffle, 0, 1000), *records_of(shuffle, 2**40, 1)}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(seen) >= 1000 and 1e9 < max(seen) < 1_370_000_000
    assert peak < 2**20


def test_a_stored_run_finds_the_order_it_was_begun_with():
    # Written down, because other processes and later versions must come to the same.
    shuffle = Shuffle("train", 10, seed=1)
    assert records_of(shuffle, 0, 10) == [9, 3, 7, 6, 8, 4, 2, 0, 5, 1]
    assert records_of(shuffle, 10, 10) == [3, 2, 8, 0, 4, 7, 1, 9, 5, 6]
    assert records_of(Shuffle("train", 10**9, seed=1), 0, 3) == [638678351, 688400122, 151144649]
    assert [shuffle.stand_in(0, 4, attempt) for attempt in range(1, 6)] == [0, 5, 3, 2, 4]
    assert shuffle.rng(1, 4).integers(1000, size=4).tolist() == [983, 892, 718, 365]


def test_crops_and_texts_are_drawn_by_seed_source_epoch_and_record():
    draw = lambda name, seed, epoch, record: tuple(
        Shuffle(name, 61, seed).rng(epoch, record).integers(2**32, size=3)
    )
    cases = [("a", 3, 0, 5), ("b", 3, 0, 5), ("a", 4, 0, 5), ("a", 3, 1, 5), ("a", 3, 0, 6)]
    drawn = [draw(*case) for case in cases]
    assert len(set(drawn)) == len(cases)
    assert [draw(*case) for case in reversed(cases)] == drawn[::-1]


def test_what_stands_in_is_drawn_by_seed_source_epoch_index_and_attempt():
    draw = lambda name, seed, *rest: Shuffle(name, 10**9, seed).stand_in(*rest)
    cases = [
        ("a", 3, 0, 5, 1), ("b", 3, 0, 5, 1), ("a", 4, 0, 5, 1), ("a", 3, 1, 5, 1),
        ("a", 3, 0, 6, 1), ("a", 3, 0, 5, 2), ("a", 3, 0, 5, 3), ("a", 3, 0, 5, 99),
    ]  # fmt: skip
    drawn = [draw(*case) for case in cases]
    assert len(set(drawn)) == len(cases) and min(drawn) >= 0 and max(drawn) < 10**9
    assert [draw(*case) for case in reversed(cases)] == drawn[::-1]
    assert {Shuffle("a", 3, 0).stand_in(0, 0, n) for n in range(1, 50)} == {0, 1, 2}


@pytest.mark.parametrize("weights", [[1, 1], [2, 1], [0.7, 0.2, 0.1], [61, 20, 7], [1, 2000]])
def test_any_stretch_holds_its_shares(weights):
    names = "abc"[: len(weights)]
    mixture = fresh(names, weights)
    positions = np.arange(0, 2 * PERIOD, 7)
    consumed = [mixture.consumed_at(int(position)) for position in positions]
    for name, share in zip(names, np.array(weights) / sum(weights)):
        ahead = np.array([counts[name] for counts in consumed]) - positions * share
        # The difference of any two is how far the stretch between them is off.
        assert ahead.max() - ahead.min() < 3


def test_a_source_too_small_to_be_drawn_is_refused():
    with pytest.raises(DatasetError, match=r"'b' has 7\.3e-06 of the samples.*greater weight"):
        fresh("ab", [1_370_000_000, 10_000])
    assert fresh("ab", [PERIOD - 1, 1]).consumed_at(PERIOD) == {"a": PERIOD - 1, "b": 1}


@pytest.mark.parametrize("weights", [[3, 2, 1], [0.98, 0.01, 0.01]])
def test_a_mixture_goes_on_from_any_position(weights):
    whole = fresh("abc", weights)
    for start in (0, 1, 100, 1001, PERIOD - 10, PERIOD, 5 * PERIOD + 77):
        resumed = Mixture.resume(shuffles("abc"), weights, whole.consumed_at(start))
        assert resumed.start == start
        assert read(resumed, 100) == read(whole, 100, start)
        assert resumed.consumed_at(start + 90) == whole.consumed_at(start + 90)


def test_a_mixture_goes_on_through_many_restarts():
    whole = fresh("abc", [3, 2, 1])
    position: dict[str, int] = {}
    for count in (1, 40, 7, 300, 12, PERIOD, 5):
        mixture = Mixture.resume(shuffles("abc"), [3, 2, 1], position)
        end = mixture.start + count
        first = min(count, 60)
        assert read(mixture, first) == read(whole, first, mixture.start)
        assert read(mixture, first, end - first) == read(whole, first, end - first)
        position = mixture.consumed_at(end)
    assert sum(position.values()) == PERIOD + 365


@pytest.mark.parametrize("start", [0, 17, PERIOD - 3])
def test_consumed_is_what_counting_says(start):
    weights = [5, 3, 2]
    mixture = Mixture.resume(shuffles("abc"), weights, fresh("abc", weights).consumed_at(start))
    counts = Counter(mixture.consumed_at(start))
    for position in range(start, start + 200):
        assert mixture.consumed_at(position) == counts
        counts["abc"[read(mixture, 1, position)[0].source]] += 1


def test_each_source_keeps_its_position_when_the_mixture_changes():
    """Other weights, a source more, one less, and that one again."""
    history = [
        ("ab", [2, 1]),
        ("ab", [1, 5]),
        ("abc", [1, 1, 1]),
        ("bc", [4, 1]),
        ("cab", [1, 2, 3]),
    ]
    position: dict[str, int] = {}
    found: dict[str, list[Place]] = {name: [] for name in "abc"}
    for names, weights in history:
        mixture = Mixture.resume(shuffles(names), weights, position)
        assert mixture.start == sum(position.values())
        for place in read(mixture, 240):
            found[names[place.source]].append(place)
        position |= mixture.consumed_at(mixture.start + 240)
    assert position == {name: len(places) for name, places in found.items()}
    for shuffle in shuffles("abc"):
        places = found[shuffle.name]
        assert [p.index for p in places] == list(range(len(places)))
        expected = shuffle(np.arange(len(places)))
        assert [p[2:] for p in places] == list(zip(*(a.tolist() for a in expected)))
        assert len(places) > shuffle.records  # the next epoch is under way


def test_hosts_cut_every_batch_into_consecutive_parts():
    hosts = [HostBatches(start=100, batch=6, host=host, hosts=3) for host in range(3)]
    assert [[list(h[i]) for i in range(2)] for h in hosts] == [
        [[100, 101], [106, 107]], [[102, 103], [108, 109]], [[104, 105], [110, 111]],
    ]  # fmt: skip


@pytest.mark.parametrize(("batch", "hosts"), [(64, 1), (60, 4), (37, 1), (8, 8)])
def test_hosts_leave_nothing_out(batch, hosts):
    shares = [HostBatches(7, batch, host, hosts) for host in range(hosts)]
    assert {len(share[5]) for share in shares} == {batch // hosts}
    found = [position for step in range(3) for share in shares for position in share[step]]
    assert found == list(range(7, 7 + 3 * batch))


def test_hosts_never_run_out():
    assert len(HostBatches(0, 4)) == 2**62
    last = HostBatches(5, 90_112, host=63, hosts=64)[2**40]
    assert last == range(5 + 2**40 * 90_112 + 63 * 1408, 5 + (2**40 + 1) * 90_112)
