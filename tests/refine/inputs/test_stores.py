import os

import pytest

from refine.errors import RefineError
from refine.inputs import stores
from refine.inputs.stores import Found, ask, children, look, matching, whole
from tests.refine.buckets import bucket, server  # noqa: F401 (fixtures)

KEYS = [
    "data/a/1.tar",
    "data/a/2.tar",
    "data/b/c/3.tar",
    "data/x.txt",
    "data/y[1].tar",
    "top.tar",
    "data/d.v1/4.tar",
]
NOTHING = ["none/*", "data/*.parquet"]
PATTERNS = [
    "*.tar",
    "*",
    "data/*",
    "data/*/",
    "data/[ab]",
    "data/*.t?t",
    "data/*/*.tar",
    "data/?/c/*.tar",
    "data/**/*.tar",
    "data/*.v1/*.tar",
    "data/*.v1/",
    "data/**",
    "**/3.tar",
    *NOTHING,
]


@pytest.fixture
def tree(bucket):
    for number, key in enumerate(KEYS):
        bucket.put(key, bytes(number))
    return bucket


def test_what_lies_at_an_address(tree):
    file = look(f"{tree.url}/data/a/2.tar")
    seconds = int(os.stat(tree.root / "data/a/2.tar").st_mtime)
    assert file == Found(f"{tree.url}/data/a/2.tar", 1, str(seconds))
    assert look(f"{tree.url}/data/a") == Found(f"{tree.url}/data/a", folder=True)
    assert look(tree.url) == Found(tree.url, folder=True)
    assert look(f"{tree.url}/data/1.tar") is None
    assert look(f"{tree.url}/dat") is None
    assert look(f"{tree.url}-other/data") is None


def test_the_same_locally(tree):
    path = tree.root / "data/a/2.tar"
    assert look(str(path)) == Found(str(path), 1, str(path.stat().st_mtime_ns))
    assert look(str(tree.root)) == Found(str(tree.root), folder=True)
    assert look(str(path / "below")) is None
    with pytest.raises(RefineError, match="can't be read"):
        look("a\0b")


def test_a_folder_holds_its_files_and_not_those_below(tree):
    assert children(f"{tree.url}/data/") == children(f"{tree.url}/data")
    for place in (tree.url, str(tree.root)):
        found = children(f"{place}/data")
        assert [f.address for f in found] == [f"{place}/data/x.txt", f"{place}/data/y[1].tar"]
        assert found == [look(f.address) for f in found]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_does_locally(tree, pattern):
    there = [(f.address, f.size, f.folder) for f in matching(f"{tree.url}/{pattern}")]
    here = [(f.address, f.size, f.folder) for f in matching(f"{tree.root}/{pattern}")]
    here = sorted((a.replace(str(tree.root), tree.url).rstrip("/"), *rest) for a, *rest in here)
    if pattern == "data/**":  # the folder itself, locally
        here.remove((f"{tree.url}/data", 0, True))
    assert there == here
    assert bool(there) != (pattern in NOTHING)


def test_without_magic_there_is_no_pattern(tree):
    assert matching(f"{tree.url}/data/a/1.tar") == []


def test_a_pattern_of_files_does_not_list_the_folders_below(tree, monkeypatch):
    asked = []
    listed = stores._listed
    monkeypatch.setattr(
        stores,
        "_listed",
        lambda base, recursive: asked.append(recursive) or listed(base, recursive),
    )
    matching(f"{tree.url}/data/*.tar")
    matching(f"{tree.url}/data/*")
    assert asked == [False, True]


def test_a_refusal_is_told_at_once(tree):
    tree.breaks("top.tar", 403, 403)
    with pytest.raises(RefineError, match=r"top\.tar can't be read.*credentials"):
        look(f"{tree.url}/top.tar", pauses=(600,))
    assert tree.asked("top.tar") == 1


def test_a_store_that_is_busy_is_asked_again(tree):
    tree.breaks("top.tar", 503)
    assert look(f"{tree.url}/top.tar").size == 5
    assert tree.asked("top.tar") == 2


@pytest.mark.parametrize("address", ["gs://", "s3:///key", "gs://b*/key"])
def test_an_address_without_a_bucket_is_told(address):
    with pytest.raises(RefineError, match="names no bucket"):
        look(address) or matching(address)


def test_ask_waits_between_attempts_and_gives_up(monkeypatch):
    slept, answers = [], iter([OSError("busy"), OSError("busy"), 7])
    monkeypatch.setattr(stores.time, "sleep", slept.append)

    def question():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert ask("gs://b/k", question, (1, 2, 4)) == 7
    assert slept == [1, 2]
    answers = iter([OSError("busy")] * 2)
    with pytest.raises(RefineError, match="gs://b/k can't be read: busy"):
        ask("gs://b/k", question, (1,))
    for error, told in [(FileNotFoundError(), FileNotFoundError), (ValueError("no"), RefineError)]:
        answers = iter([error])
        with pytest.raises(told):
            ask("gs://b/k", question, (1, 1))
    assert slept == [1, 2, 1]


def test_one_name_for_each_file(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").symlink_to("a")
    assert whole(str(tmp_path / "b")) == whole(str(tmp_path / "x/../a")) == str(tmp_path / "a")
    assert whole("gs://b/a//c") == "/gs:/b/a//c"
