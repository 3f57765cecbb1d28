import numpy as np

from hqclip_jax.index import duplicates as module
from hqclip_jax.index.duplicates import duplicates
from tests.index.test_store import make


def at(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def test_groups_hang_together_by_neighbours_and_the_largest_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 4)
    # 0, 2 and 4 degrees: the ends are too far apart, and hang together by the middle.
    index = make(tmp_path / "index", at(90, 0, 4, 200, 91, 2, 300))
    compared = []
    groups = duplicates(index, np.cos(np.radians(2.5)), compared.append)
    assert [[row for row, _ in group] for group in groups] == [[1, 2, 5], [0, 4]]
    np.testing.assert_allclose(groups[0][0][1], np.cos(np.radians(2)), atol=1e-3)
    assert compared == [4, 3]
    assert duplicates(index, 1.01) == []


def test_more_copies_than_neighbours_are_one_group(tmp_path):
    z = np.repeat(at(10, 120), [30, 3], axis=0)
    groups = duplicates(make(tmp_path / "index", z), 0.99)
    assert [len(group) for group in groups] == [30, 3]
