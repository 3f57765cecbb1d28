"""Which pairs a sample takes, against a slow and obvious way to say the same."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from refine.teaching.sampling import KINDS, ROW, Pool, Survey, first, kind_of, priority, shares
from refine.uids import to_hex


def rows_of(draws, n, sources=7, kinds=5):
    """Random rows, sources and kinds of very different sizes."""
    rows = np.empty(n, ROW)
    rows["uid"] = np.frombuffer(draws.bytes(16 * n), "S16")
    rows["priority"] = draws.integers(0, 2**63, n)
    rows["source"] = np.minimum(draws.geometric(0.4, n), sources)
    rows["kind"] = np.minimum(draws.geometric(0.5, n), kinds) * 3
    return rows


def slowly(rows, keep):
    """The uids that come first, each kind's in order, by taking turns one after another."""
    chosen = {}
    for kind in set(rows["kind"].tolist()):
        heaps = defaultdict(list)
        for row in rows[rows["kind"] == kind].tolist():
            heaps[row[2]].append((row[1], row[0]))
        queues = [sorted(heap) for heap in heaps.values()]
        order = []
        while queues:
            order += sorted(queue.pop(0) for queue in queues)
            queues = [queue for queue in queues if queue]
        chosen[kind] = [uid for _, uid in order[:keep]]
    return chosen


def grouped(rows):
    found = defaultdict(list)
    for row in rows:
        found[int(row["kind"])].append(bytes(row["uid"]))
    return dict(found)


@pytest.mark.parametrize("keep", [1, 5, 40, 10_000])
def test_inputs_take_turns_and_give_by_priority(keep):
    rows = rows_of(np.random.default_rng(keep), 1500)
    assert grouped(first(rows, keep)) == slowly(rows, keep)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_dropped_on_the_way_would_not_have_been_drawn(seed):
    """Whatever order the rows come in, in pieces of whatever size."""
    draws = np.random.default_rng(seed)
    rows = rows_of(draws, 4000)
    keep = int(draws.integers(1, 60))
    pool, largest = Pool(keep), 0
    order = draws.permutation(len(rows)) if seed % 2 else np.argsort(rows["source"], kind="stable")
    for piece in np.split(rows[order], np.sort(draws.integers(0, len(rows), 60))):
        pool.add(first(piece, keep))
        largest = max(largest, len(pool._rows) + pool._waiting)
    assert grouped(pool.rows()) == slowly(rows, keep)
    assert largest < 4 * keep * 5 + 400


def test_memory_does_not_grow_with_what_is_looked_at():
    draws, pool = np.random.default_rng(0), Pool(20)
    for _ in range(300):
        pool.add(rows_of(draws, 1000))
        assert len(pool._rows) <= 20 * 5
        assert pool._waiting <= 1000


def test_shares_go_by_the_square_root():
    counts = np.array([10_000, 100, 1_000_000, 0])
    assert shares(counts, counts, 111).tolist() == [10, 1, 100, 0]


def test_what_a_small_kind_lacks_goes_to_the_others():
    counts = np.array([4, 10_000, 1_000_000, 9, 0])
    drawn = shares(counts, counts, 10_000)
    assert drawn.tolist()[::3] == [4, 9]
    assert drawn[2] / drawn[1] == pytest.approx(10, rel=0.01)
    assert drawn.sum() == 10_000
    fewer = np.array([1, 10_000, 20, 9, 0])  # of the third kind 20 can be drawn
    assert shares(counts, fewer, 1000).tolist() == [1, 970, 20, 9, 0]


@pytest.mark.parametrize("seed", range(40))
def test_shares_add_up_and_never_exceed_what_there_is(seed):
    draws = np.random.default_rng(seed)
    counts = (10 ** draws.uniform(0, 6, 54)).astype(np.int64) * (draws.random(54) < 0.7)
    available = np.minimum(counts, draws.integers(0, 2000, 54))
    for samples in (1, 7, 100, 10_000, 10**9):
        drawn = shares(counts, available, samples)
        assert drawn.sum() == min(samples, available.sum())
        assert np.all(drawn >= 0) and np.all(drawn <= available)
        partly = (drawn < available) & (counts > 0)
        least = (drawn[partly] - 1) / np.sqrt(counts[partly])
        most = (drawn[partly] + 1) / np.sqrt(counts[partly])
        assert not partly.any() or least.max() <= most.min()  # one factor fits all


def test_a_sample_has_every_uid_once_in_an_order_that_says_nothing():
    draws = np.random.default_rng(5)
    rows = rows_of(draws, 3000)
    rows = np.concatenate([rows, rows[:500]])
    rows["source"][3000:] = 6  # the same pairs in another input
    counts = np.bincount(rows["kind"], minlength=len(KINDS))
    chosen = Survey(rows, counts, Counter()).choose(2000)
    assert len(chosen) == 2000
    assert len(set(chosen["uid"].tolist())) == 2000
    half = [np.bincount(part["kind"], minlength=20) for part in (chosen[:1000], chosen[1000:])]
    assert np.abs(half[0] - half[1]).max() < 60


def test_the_next_of_its_kind_stands_in_for_a_pair_that_is_not_usable():
    rows = rows_of(np.random.default_rng(6), 2000)
    survey = Survey(rows, np.bincount(rows["kind"], minlength=len(KINDS)), Counter())
    chosen = survey.choose(300)
    bad = [to_hex(uid) for uid in chosen["uid"][::10]]
    again = survey.choose(300, without=bad)
    assert len(again) == 300
    kept = set(map(to_hex, again["uid"]))
    assert not kept & set(bad)
    assert set(map(to_hex, chosen["uid"])) - set(bad) <= kept
    assert np.array_equal(
        np.bincount(again["kind"], minlength=20), np.bincount(chosen["kind"], minlength=20)
    )
    assert len(survey.choose(10**6, without=bad)) == 2000 - len(bad)
    assert len(survey.choose(10, without=map(to_hex, rows["uid"]))) == 0
    assert len(Survey(rows[:0], 0 * survey.counts, Counter()).choose(10)) == 0


def test_kinds():
    words, shapes, sizes = zip(
        *(KINDS[kind_of("a " * n, 300, 300)] for n in (0, 1, 3, 4, 7, 8, 99))
    )
    assert words == ("0", "1-3", "1-3", "4-7", "4-7", "8-15", "32+")
    assert (set(shapes), set(sizes)) == ({"about square"}, {"200-399"})
    assert KINDS[kind_of("", 100, 200)][1:] == ("tall", "under 200")
    assert KINDS[kind_of("", 800, 600)][1:] == ("wide", "400+")
    assert KINDS[kind_of("", 600, 800)][1:] == ("about square", "400+")
    assert KINDS[kind_of("", 10_000, 1)][1:] == ("wide", "under 200")
    assert len(set(KINDS)) == len(KINDS) < 256


def test_priorities_are_spread_and_depend_on_the_seed():
    uids = [f"{n:032x}" for n in range(2000)]
    values = np.array([priority(0, uid) for uid in uids], np.float64) / 2**64
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 200).max() < 60
    other = np.array([priority(1, uid) for uid in uids], np.float64) / 2**64
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.1
    assert priority(0, uids[0]) == priority(0, uids[0])
