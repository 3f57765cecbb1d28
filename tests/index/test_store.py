import json
from dataclasses import replace

import numpy as np
import pytest

from hqclip_jax.index import approximate, store
from hqclip_jax.index.folder import Picture
from hqclip_jax.index.store import About, Index, SearchError, write_snapshot
from tests.index.encoder import MODEL


def make(folder, z_nxD: np.ndarray) -> Index:
    """An index of these vectors; picture i is i.png."""
    folder.mkdir()
    z_nxD = (z_nxD / np.linalg.norm(z_nxD, axis=1, keepdims=True)).astype(np.float16)
    pictures = [Picture(f"{i}.png", 1, i, "", 0, 1) for i in range(len(z_nxD))]
    count, dim = z_nxD.shape
    write_snapshot(folder / "000001", zip(pictures, z_nxD), count, dim)
    model = replace(MODEL, dim=dim)
    About("/pictures", model, count, snapshot="000001").write(folder)
    return Index.open(folder)


@pytest.fixture
def index(tmp_path) -> Index:
    return make(tmp_path / "index", np.random.default_rng(0).normal(size=(100, 16)))


@pytest.mark.parametrize("k", [1, 7, 40, 100, 1000])
def test_nearest_in_chunks_equals_a_full_sort(index, monkeypatch, k):
    monkeypatch.setattr(store, "CHUNK", 32)  # the last one is of 4
    z_qxD = np.random.default_rng(1).normal(size=(5, 16))
    similarity, row = index.nearest(z_qxD, k)
    unit = z_qxD / np.linalg.norm(z_qxD, axis=1, keepdims=True)
    cosine = unit @ index.vectors.astype(np.float64).T
    np.testing.assert_array_equal(row, np.argsort(-cosine, axis=1)[:, :k])
    np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :k], atol=1e-6)
    assert similarity.shape == (5, min(k, 100))


def test_one_vector_is_one_query_and_of_equals_the_first_comes_first(tmp_path):
    index = make(tmp_path / "index", np.array([[0, 1.0], [1, 0], [1, 0], [1, 0]]))
    similarity, row = index.nearest(np.array([2.0, 0]), 4)
    assert (row.tolist(), similarity.tolist()) == ([[1, 2, 3, 0]], [[1, 1, 1, 0]])
    assert [index.picture(r).name for r in row[0]] == ["1.png", "2.png", "3.png", "0.png"]
    assert [p.name for p in index.pictures()] == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    "z, message",
    [
        (np.ones(15), "15 numbers, and the index's have 16"),
        (np.zeros(16), "no direction"),
        (np.full(16, np.nan), "no direction"),
    ],
)
def test_vectors_of_no_use_are_refused(index, z, message):
    with pytest.raises(SearchError, match=message):
        index.nearest(z, 3)


def test_damage_is_told_with_the_mend(index):
    lines = index.folder / "000001" / "pictures.jsonl"
    lines.write_bytes(lines.read_bytes()[:-10])
    with pytest.raises(SearchError, match=r"000001 is cut short: remove .*build it again"):
        Index.open(index.folder)
    (index.folder / "000001" / "vectors.npy").unlink()
    with pytest.raises(SearchError, match=r"000001 is damaged .*No such file"):
        Index.open(index.folder)
    about = index.folder / "index.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 9}))
    with pytest.raises(SearchError, match="of format 9, and this version reads 1"):
        Index.open(index.folder)
    about.write_text("{")
    with pytest.raises(SearchError, match=r"index.json is damaged"):
        Index.open(index.folder)
    with pytest.raises(SearchError, match="holds no index: make one"):
        Index.open(index.folder / "000001")


def test_names_of_any_bytes_come_back(tmp_path):
    picture = Picture("\udcff\n\"'<é>\u2028.png", 1, 2, "\udc80.jpg", 3, 4)
    assert store.decode(store.encode(picture)) == picture
    assert store.encode(picture).count(b"\n") == 1


class Candidates:
    """In place of faiss: exact, and of some queries too few."""

    def __init__(self, index: Index, short: bool) -> None:
        self.vectors, self.short = np.asarray(index.vectors, np.float32), short

    def search(self, z_qxD, k):
        row = np.argsort(-(z_qxD @ self.vectors.T), axis=1)[:, :k]
        if self.short:
            row[1, 2:] = -1
        return None, row


@pytest.mark.parametrize("short", [False, True])
def test_candidates_are_ranked_by_the_vectors_themselves(index, monkeypatch, short):
    z_qxD = np.random.default_rng(1).normal(size=(3, 16))
    exact = index.nearest(z_qxD, 5)
    (index.folder / "000001" / approximate.FILE).touch()
    monkeypatch.setattr(approximate, "available", lambda: True)
    monkeypatch.setattr(approximate, "load", lambda path: Candidates(index, short))
    if not short:
        monkeypatch.setattr(Index, "_exact", None)
    similarity, row = Index.open(index.folder).nearest(z_qxD, 5)
    np.testing.assert_array_equal(row, exact[1])
    np.testing.assert_allclose(similarity, exact[0], atol=1e-6)


def test_faiss_finds_what_reading_all_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "FROM", 2000)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 16))
    z_nxD = centres[rng.integers(50, size=3000)] + 0.3 * rng.normal(size=(3000, 16))
    index = make(tmp_path / "index", z_nxD)
    assert (tmp_path / "index" / "000001" / approximate.FILE).exists()
    queries = z_nxD[:50] + 0.1 * rng.normal(size=(50, 16))
    (similarity, row), (exact, truth) = index.nearest(queries, 10), index._exact(
        (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32), 10
    )  # fmt: skip
    assert np.mean([len({*a} & {*b}) for a, b in zip(row, truth)]) > 9.8
    np.testing.assert_allclose(similarity[:, 0], exact[:, 0], atol=1e-6)
