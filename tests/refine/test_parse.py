import json
import random
import tarfile
import time
import timeit

import pytest

from refine.engines import Texts
from refine.flaws import _examples
from refine.parse import FIELDS, ITEMS, MAX_CHARACTERS, REASONS, SCHEMA, Parsed, Rejected, parse
from refine.prompts import load_prompt

GOOD = {
    "desc": ["a brown dog lies on a red rug.", "two cups stand on the table to its left."],
    "neg_desc": ["a white cat sits on a green rug.", "six cups stand on the table to its right."],
    "tags": ["brown dog", "red rug", "cups"],
    "neg_tags": ["white cat", "green rug", "bottles"],
}
TEXTS = Texts(**{name: tuple(texts) for name, texts in GOOD.items()})
RAW = json.dumps(GOOD)


def reason(raw: str) -> str:
    with pytest.raises(Rejected) as caught:
        parse(raw)
    assert caught.value.reason in REASONS
    assert caught.value.detail.isprintable() and len(caught.value.detail) < 400
    return caught.value.reason


def changed(**fields) -> str:
    return json.dumps(GOOD | fields)


def test_what_was_asked_for_is_kept_as_it_is():
    assert parse(RAW) == Parsed(TEXTS)
    assert parse(f"\n {json.dumps(GOOD, indent=2)} \n") == Parsed(TEXTS)
    assert parse(changed(score=9, note="x")) == Parsed(TEXTS)


@pytest.mark.parametrize(
    "raw",
    [
        f"```json\n{RAW}\n```",
        f"```\n{RAW}",
        f"Here is the JSON you asked for:\n\n{RAW}\n\nLet me know if you need more.",
        f'<think>A dog {{maybe}}, {{"desc": ["a fox."]}}</think>\n{RAW}',
        f"<think>{RAW.replace('brown', 'pink')}</think>{RAW}",
        f'{{"thoughts": ["a dog?"]}}\n{RAW}',
        f"[{RAW}]",
        f"{RAW}{RAW}",
        RAW + "}}]",
        RAW.replace('"]', '",]').replace("]}", "],}"),
        RAW.replace('"', "'"),
        RAW.replace('"desc"', "desc").replace('"tags"', "tags"),
        RAW.replace('", "', '",\n"').replace('"tags": ["brown', '"tags": ["brown\n'),
        RAW.replace('"cups"]', '"cups"'),
        RAW.replace('", "red rug"', '" "red rug"'),
        RAW[:-1],
        RAW[:-1] + "\n```",
        "{" + RAW,
    ],
)
def test_what_is_nearly_json_is_mended(raw):
    assert parse(raw) == Parsed(TEXTS, repaired=True)


def test_a_plain_string_is_a_list_of_one():
    assert parse(changed(desc=GOOD["desc"][0])) == Parsed(
        Texts(TEXTS.desc[:1], TEXTS.neg_desc, TEXTS.tags, TEXTS.neg_tags), repaired=True
    )
    assert reason(changed(tags="brown dog, red rug, cups, table, terrace, rain, sun")) == (
        "tag_sentence"
    )


def test_texts_are_cleaned_and_repeats_left_out():
    raw = changed(
        desc=["  a caf&eacute;\n on a hill. ", "A cafÃ© on a hill", "", "a café on a hill"],
        tags=["Rug", "rug", "cups", "rug!"],
    )
    parsed = parse(raw)
    assert parsed.texts.desc == ("a café on a hill.", "A café on a hill", "a café on a hill")
    assert parsed.texts.tags == ("Rug", "cups")
    assert not parsed.repaired


def test_a_cut_off_answer_is_kept_without_what_was_cut():
    """Wherever an answer ends, what is kept of it was written in full."""
    whole = json.dumps(GOOD, indent=1)
    kept = 0
    for end in range(len(whole)):
        try:
            parsed = parse(whole[:end])
        except Rejected as e:
            assert e.reason in ("cut_off", "no_json") and e.detail
            assert e.reason == "cut_off" or end < 20
            continue
        kept += 1
        assert parsed.repaired
        for name in FIELDS:
            texts = getattr(parsed.texts, name)
            assert texts == tuple(GOOD[name][: len(texts)])
            assert name == "neg_tags" or len(texts) == len(GOOD[name])
    assert kept > 20
    assert parse(RAW[: RAW.index('"bottles"') + 3]).texts.neg_tags == ("white cat", "green rug")
    assert parse(RAW[: RAW.index('"bottles"') + 9]).texts.neg_tags == ("white cat", "green rug")
    assert parse(RAW[: RAW.index('"bottles"') + 10]).texts.neg_tags == TEXTS.neg_tags


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("", "no_json"),
        ("A brown dog lies on a rug.", "no_json"),
        ("[1, 2]", "no_json"),
        ("null", "no_json"),
        ('"desc"', "no_json"),
        ("{", "cut_off"),
        ("{}", "missing_field"),
        ("{{{{", "no_json"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI, I have no eyes.", "refusal"),
        (" " * MAX_CHARACTERS + RAW, "too_long"),
        (RAW[:-1] + " " * 9_000 + "x", "repetition"),
        ('{"desc": [' + '"a dog.", ' * 500, "repetition"),
        (json.dumps({"answer": GOOD}), "missing_field"),
        (changed(desc=7), "wrong_type"),
        (changed(desc=None), "wrong_type"),
        (changed(tags=["dog", 2019]), "wrong_type"),
        (changed(tags=[["dog"]]), "wrong_type"),
        (changed(tags={"a": "dog"}), "wrong_type"),
        (changed(desc=[]), "empty_field"),
        (changed(neg_tags=["", " ", "&nbsp;"]), "empty_field"),
        (changed(desc=""), "empty_field"),
        (changed(desc=[f"{n} dogs lie on a rug." for n in range(13)]), "list_length"),
        (changed(tags=[f"dog {n}" for n in range(25)]), "list_length"),
        (changed(tags=["dog"] * 25), "repetition"),
        (changed(desc=["a dog.", "A dog", "a dog!"]), "repetition"),
        (
            changed(desc=[f"there are {n} dogs on the rug in the room." for n in range(12)]),
            "repetition",
        ),
        (changed(tags=["a brown dog lies on a red rug"]), "tag_sentence"),
        (changed(tags=list("dog")), "item_size"),
        (changed(neg_desc=["a dog<|im_end|>"]), "markup"),
        (changed(desc=["a dog \ud800."]), "noise"),
        (changed(desc=["a dog \u202e."]), "noise"),
        (changed(desc=["I'm sorry, I can't see the picture."]), "refusal"),
        (changed(neg_desc=["sentence 1", "sentence 2"]), "prompt_echo"),
        (changed(neg_desc=GOOD["desc"]), "equal_negative"),
        (changed(neg_desc=[t.upper().rstrip(".") for t in GOOD["desc"]]), "equal_negative"),
        (changed(neg_desc=[" ".join(GOOD["desc"])]), "equal_negative"),
        (changed(neg_tags=["Cups", "brown-dog"]), "equal_negative"),
        (changed(neg_tags=["brown", "dog red rug", "cups"]), "equal_negative"),
    ],
)
def test_what_is_not_kept_has_a_reason(raw, expected):
    assert reason(raw) == expected


def test_a_long_answer_is_kept_but_not_mended():
    padded = RAW[:-1] + ', "more": "' + "".join(random.Random(0).choices("abc def", k=9_000))
    assert parse(padded + '"}') == Parsed(TEXTS)
    with pytest.raises(Rejected, match="too_long: broken JSON of 9,"):
        parse(padded)


def test_whatever_mending_stumbles_on_is_no_json(monkeypatch):
    def stumble(*_, **__):
        raise IndexError

    monkeypatch.setattr("json_repair.loads", stumble)
    with pytest.raises(Rejected, match="no_json: beyond mending: IndexError"):
        parse(RAW[:-1])


def test_every_reason_is_explained_and_seen_in_these_tests():
    cases = test_what_is_not_kept_has_a_reason.pytestmark[0].args[1]
    assert {expected for _, expected in cases} == set(REASONS)
    assert all(REASONS.values())


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name):
    raw = json.dumps({field: texts for field, texts in GOOD.items() if field != name})
    with pytest.raises(Rejected, match=f"missing_field: {name}"):
        parse(raw)
    with pytest.raises(Rejected, match=f"missing_field: {name}"):
        parse(f"Sure: {raw}")


def test_negatives_that_equal_a_positive_are_left_out_and_counted():
    parsed = parse(
        changed(
            neg_desc=[GOOD["desc"][1].upper(), GOOD["neg_desc"][0], GOOD["desc"][0]],
            neg_tags=["red rug", "white cat"],
        )
    )
    assert parsed.texts.neg_desc == (GOOD["neg_desc"][0],)
    assert parsed.texts.neg_tags == ("white cat",)
    assert (parsed.dropped, parsed.repaired) == (3, False)


def test_repeats_are_left_out_and_counted():
    desc = [GOOD["desc"][0], GOOD["desc"][1], GOOD["desc"][0].upper()]
    assert parse(changed(desc=desc)) == Parsed(TEXTS, dropped=1)
    assert reason(changed(desc=desc + desc[:2])) == "repetition"


def test_as_many_texts_as_allowed_are_kept():
    things = ["dogs", "hens", "oxen", "cups", "jars", "bins", "cars", "kites", "boats", "books"]
    things += ["chairs", "trees"]
    desc = [f"{thing} of {n * n} kinds are {thing[::-1]}." for n, thing in enumerate(things)]
    tags = [f"{colour} {thing}" for colour in ("red", "blue") for thing in things]
    assert (len(desc), len(tags)) == (ITEMS["desc"], ITEMS["tags"])
    assert parse(changed(desc=desc, tags=tags)).texts.tags == tuple(tags)


def test_the_prompts_examples_would_be_kept_but_for_being_examples(monkeypatch):
    lines = load_prompt("teacher-v1").text.split("\n")
    answers = [line for line in lines if line.startswith('{"')]
    assert len(answers) == 4
    for raw in answers:
        assert reason(raw) == "prompt_echo"
    monkeypatch.setattr("refine.flaws._examples", frozenset)
    for raw in answers:
        parsed = parse(raw)
        assert (parsed.repaired, parsed.dropped) == (False, 0)
        assert {name: list(getattr(parsed.texts, name)) for name in FIELDS} == json.loads(raw)
    monkeypatch.undo()
    assert _examples()


MARKS = ["[", "{", '{"a":', "[{", '("', '{"b": ["', 'he said "x" and ', 'a"', "\\", "//", "/*", "`"]
STARTS = ["", "{", '{"desc": ["a dog", ', '{desc: ["x", ']


@pytest.mark.parametrize("size", [8_000, 65_000])
def test_an_endless_pattern_is_no_work(size):
    for pattern in MARKS:
        for start in STARTS:
            begin = time.process_time()
            assert reason((start + pattern * size)[:size]) in ("repetition", "no_json")
            assert time.process_time() - begin < 0.5


def test_mending_is_given_up_before_it_takes_long():
    """Marks at random do not squeeze, and if nothing is done take a hundred times as long."""
    rng = random.Random(0)
    begin = time.process_time()
    for _ in range(60):
        marks = rng.sample([*MARKS, ",", ":", " ", "]", "}", ")", "a", "'", "“", "\n"], 5)
        raw = (rng.choice(STARTS) + "".join(rng.choices(marks, k=8_192)))[:8_192]
        assert reason(raw)
    assert time.process_time() - begin < 3


def test_the_most_marks_that_are_mended_take_a_moment():
    rng = random.Random(0)
    for filler in ("a b ", ", ", "\\", "\n", ") "):
        marks = [*"[{" * 7, *"(" * 32, *'"“' * 256, *filler * 1600]
        rng.shuffle(marks)
        begin = time.process_time()
        with pytest.raises(Rejected) as caught:
            parse(("{" + "".join(marks))[:8_192])
        assert time.process_time() - begin < 5
        assert "broken JSON with more than" not in caught.value.detail


def test_nesting_without_loops_is_no_recursion_error():
    raw = "{" + "".join(f'"{n}": [{{' for n in range(900))
    assert reason(raw) == "no_json"
    assert reason(changed(tags=json.loads("[" * 500 + "]" * 500))) == "wrong_type"


def test_a_typical_answer_takes_half_a_millisecond_where_nothing_else_runs():
    fields = {name: [*texts, *(f"{text} too" for text in texts)] for name, texts in GOOD.items()}
    raw = json.dumps(fields)
    assert len(raw) > 500 and not parse(raw).dropped
    times = timeit.repeat(lambda: parse(raw), time.process_time, number=20, repeat=10)
    assert min(times) / 20 < 2e-3


def test_the_schema_asks_for_what_is_kept():
    assert list(SCHEMA["properties"]) == SCHEMA["required"] == list(FIELDS)
    assert SCHEMA["additionalProperties"] is False
    for name, form in SCHEMA["properties"].items():
        assert form["items"] == {"type": "string"}  # bounds here break xgrammar's strings
        assert (form["minItems"], form["maxItems"]) == (1, ITEMS[name])
    json.dumps(SCHEMA)


def test_published_annotations_would_be_kept(real_data):
    kept, reasons = 0, []
    with tarfile.open(real_data / "grocery/annotations/val/00000.tar") as tar:
        for member in tar.getmembers():
            try:
                kept += not parse(tar.extractfile(member).read().decode()).repaired
            except Rejected as e:
                reasons.append(e.reason)
    assert kept > 200
    assert len(reasons) < 0.1 * kept
    assert set(reasons) <= {"equal_negative"}  # sibling products may share a description
