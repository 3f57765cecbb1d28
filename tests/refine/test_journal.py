import json

import pytest

from refine.engines import Texts
from refine.inputs.pairs import Pair
from refine.journal import Answer, Journal, journal_folder, key_of, read_answers

TEXTS = Texts(("a cat “x”.",), ("a dog.",), ("cat",), ("dog",))


def answer(key: str, **more) -> Answer:
    return Answer(key, "vllm:m:p", TEXTS, attempts=1, **more)


def test_an_answer_is_on_disk_before_the_journal_is_closed(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.add(answer("k"))
    assert read_answers(tmp_path / "j") == ({"k": answer("k")}, {})
    bad = Answer("b", reason="refusal", detail="I'm sorry", raw="\ud800 raw\0", attempts=3)
    journal.add(bad)
    journal.close()
    assert read_answers(tmp_path / "j")[0]["b"] == bad


def test_who_goes_on_knows_what_is_answered_and_writes_another_file(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.add(answer("a"))
    second.add(answer("b"))
    first.add(answer("c"))
    assert second.keys == {"b"}
    third = Journal(tmp_path)
    assert third.keys == {"a", "b", "c"}
    third.add(answer("d"))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("cut", [1, 20, "newline"])
def test_a_torn_line_is_asked_again(tmp_path, cut):
    journal = Journal(tmp_path)
    for key in "abc":
        journal.add(answer(key))
    journal.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1] if cut == "newline" else data[:-cut])
    # A whole line without its newline is an answer too.
    assert Journal(tmp_path).keys == ({"a", "b", "c"} if cut in (1, "newline") else {"a", "b"})
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\0" * 512 + b"\n" + lines[1] + b'[1]\n"k"\n{}\n')
    assert set(read_answers(tmp_path)[0]) == {"a", "b"}


def test_of_two_answers_the_first_counts_and_sums_add_up(tmp_path):
    journal = Journal(tmp_path)
    journal.add(answer("a", output_tokens=1))
    journal.count({"seconds": 1.5, "http_429": 2})
    journal.add(answer("a", output_tokens=2))
    journal.count({"seconds": 2})
    answers, sums = read_answers(tmp_path)
    assert answers["a"].output_tokens == 1
    assert sums == {"seconds": 3.5, "http_429": 2}


def test_a_part_without_answers_has_no_folder(tmp_path):
    folder = journal_folder(tmp_path, 7)
    Journal(folder).close()
    assert folder.name == "000007.journal" and not folder.exists()
    assert read_answers(folder) == ({}, {})


def test_a_key_tells_pairs_of_one_uid_apart():
    pair = Pair("0" * 32, b"image", "caption", "s", "k")
    others = [("0" * 32, b"imagf", "caption"), ("0" * 32, b"image", "captiom"),
              ("1" * 32, b"image", "caption")]  # fmt: skip
    assert key_of(pair) == key_of(Pair("0" * 32, b"image", "caption", "other", "place"))
    assert len({key_of(pair), *(key_of(Pair(*other, "s", "k")) for other in others)}) == 4
    assert key_of(Pair("0" * 32, b"", "\ud800", "s", "k"))


def test_lines_are_ascii(tmp_path):
    Journal(tmp_path).add(answer("a"))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_bytes().decode("ascii"))["refiner"] == "vllm:m:p"
