import json

from refine.inputs.pairs import Skip, read_skips
from refine.ledger import Ledger


def test_everything_is_counted_and_the_first_of_each_reason_named(tmp_path):
    with Ledger(tmp_path / "s.jsonl", named=2) as ledger:
        for i in range(5):
            ledger.skip(Skip("corrupt_image", "0.tar", str(i)))
        ledger.add(
            "annotation_without_pair",
            10**9,
            (Skip("annotation_without_pair", uid=str(i)) for i in range(9)),
        )
        ledger.add("not_in_subset", 7)
    assert ledger.counts == {
        "corrupt_image": 5,
        "annotation_without_pair": 10**9,
        "not_in_subset": 7,
    }
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").open()]
    assert lines == [
        {"reason": "corrupt_image", "source": "0.tar", "key": "0"},
        {"reason": "corrupt_image", "source": "0.tar", "key": "1"},
        {"reason": "annotation_without_pair", "uid": "0"},
        {"reason": "annotation_without_pair", "uid": "1"},
    ]


def test_another_ledger_is_included_with_its_names(tmp_path):
    skips = [Skip("no_uid", "a\udcff\n.tar", "é", detail='"'), Skip("no_caption", uid="0" * 32)]
    with Ledger(tmp_path / "1.jsonl") as one:
        for skip in skips:
            one.skip(skip)
    with Ledger(tmp_path / "2.jsonl") as two:
        two.skip(Skip("no_uid"))
        two.include(one.counts, read_skips(tmp_path / "1.jsonl"), one.named)
    assert two.counts == {"no_uid": 2, "no_caption": 1}
    assert list(read_skips(tmp_path / "2.jsonl")) == [Skip("no_uid"), *skips]


def test_names_are_not_read_where_none_has_room(tmp_path):
    def unread():
        raise AssertionError("read")
        yield

    with Ledger(tmp_path / "s.jsonl", named=1) as ledger:
        ledger.skip(Skip("no_uid"))
        ledger.include({"no_uid": 5, "pairs": 7}, unread(), ["no_uid"])
    assert ledger.counts == {"no_uid": 6, "pairs": 7}
