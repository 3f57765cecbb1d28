import json

import pytest

from hqclip_jax.evals.retrieval import Retrieval
from hqclip_jax.evals.sugarcrepe import HardNegatives
from hqclip_jax.evals.suite import SuiteError, known_suites, load_suite, unreadable
from hqclip_jax.evals.zeroshot import ZeroShot

from .colours import write_classification

SETS = [
    {"task": "zeroshot", "name": "z", "path": "a/b"},
    {"task": "retrieval", "name": "r", "path": "c.tar"},
    {"task": "hard_negatives", "name": "h", "path": "h.json", "images": "c.tar"},
    {"task": "hard_negatives", "name": "t", "path": "t.tar"},
]


def test_file_lists_sets_beside_it_or_under_data(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"sets": SETS}))
    assert load_suite(str(file)) == [
        ZeroShot("z", tmp_path / "a/b"),
        Retrieval("r", tmp_path / "c.tar"),
        HardNegatives("h", tmp_path / "h.json", tmp_path / "c.tar"),
        HardNegatives("t", tmp_path / "t.tar"),
    ]
    data = tmp_path / "elsewhere"
    assert load_suite(str(file), data)[0] == ZeroShot("z", data / "a/b")


def test_known_names(tmp_path):
    for name in known_suites():
        assert all(e.path.is_relative_to(tmp_path) for e in load_suite(name, tmp_path))
    assert load_suite("imagenet", "/d")[0].path.as_posix() == "/d/wds_imagenet1k"
    with pytest.raises(SuiteError, match="needs --data=ROOT, the folder that holds wds_imagenet1k"):
        load_suite("imagenet")


def test_folder_is_a_suite_of_one(tmp_path, monkeypatch):
    folder = write_classification(tmp_path / "pets", {"red": 0})
    assert load_suite(str(folder)) == [ZeroShot("pets", folder)]
    monkeypatch.chdir(folder)
    assert load_suite(".") == [ZeroShot("pets", folder)]
    (folder / "dataset_type.txt").write_text("retrieval\n")
    assert load_suite(str(folder)) == [Retrieval("pets", folder)]


def test_wrong_name_lists_the_known_ones():
    with pytest.raises(SuiteError) as e:
        load_suite("imagnet", "/data")
    assert "did you mean 'imagenet'?" in str(e.value)
    assert all(name in str(e.value) for name in known_suites())


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", 'write {"sets"'),
        ('{"sets": []}', 'write {"sets"'),
        ('{"sets": [{"task": "zeroshot", "name": "a"}]}', "must have task, name and path"),
        (
            '{"sets": [{"task": "zeroshot", "name": "a", "path": "a", "paths": 1}]}',
            "must have task, name and path",
        ),
        ('{"sets": [{"task": "zs", "name": "a", "path": "a"}]}', "'zs' is not one of zeroshot"),
        (
            '{"sets": [{"task": "zeroshot", "name": "a", "path": "a", "images": "b"}]}',
            "'a' has unknown keys images: zeroshot must have task, name and path",
        ),
        (json.dumps({"sets": [SETS[0], SETS[0]]}), "two sets are named z"),
    ],
)
def test_unusable_file(tmp_path, content, message):
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(SuiteError, match=message):
        load_suite(str(file))


def test_whatever_a_damaged_set_raises_it_is_unreadable_alone(tmp_path):
    class Damaged(ZeroShot):
        def check(self):
            raise IsADirectoryError("classnames.txt")

    folder = write_classification(tmp_path / "pets", {"red": 0})
    why = unreadable(
        [Damaged("bad", folder), ZeroShot("good", folder), ZeroShot("no", tmp_path / "x")]
    )
    assert why == {"bad": "IsADirectoryError: classnames.txt", "no": f"{tmp_path / 'x'} is missing"}
