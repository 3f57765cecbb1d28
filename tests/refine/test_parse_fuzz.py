"""Ten thousand damaged answers, and any text at all: `Rejected` or a valid record, nothing else.

What a valid record is stands here a second time, in plain loops that share nothing with the code.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine.engines import Texts
from refine.parse import REASONS, Parsed, Rejected, parse

ANSWERS = 10_000
COLOURS = ["red", "blue", "green", "white", "brown", "yellow", "grey", "purple"]
THINGS = ["dog", "cup", "lemon", "kettle", "bicycle", "lamp", "horse", "umbrella", "cactus", "boat"]
PLACES = [
    "on a rug",
    "under a tree",
    "behind a fence",
    "beside the river",
    "in a kitchen",
    "on sand",
]
SYMBOLS = list("{}[](),:;\"'\\`<>|/#*-_.!?\n\t \0\x1b\u200b\u202e\ufffd\ue000“”é東🐶") + ["\ud800"]
FIELDS = ["desc", "neg_desc", "tags", "neg_tags"]
WORDS = ["a", "an", "the", "and", "two", "dog", "sorry", "i", "cannot", "as", "ai", "image", "1"]
DEBRIS = ["<|im_end|>", "</s>", "[INST]", "<b>", "I'm sorry, I can't help with that.", "..."]


def answer(rng: random.Random) -> dict[str, list[str]]:
    """Four sentences and some tags, each negative with another thing, colour or place."""
    fields: dict[str, list[str]] = {name: [] for name in FIELDS}
    for _ in range(rng.randint(1, 6)):
        colours, things, places = (
            (rng.choice(words[::2]), rng.choice(words[1::2])) for words in (COLOURS, THINGS, PLACES)
        )
        number = rng.randint(2, 60)
        for name, k in (("desc", 0), ("neg_desc", 1)):
            sentence = f"{number + k} {colours[k]} {things[k]}s of {number * 7 + k} cm {places[k]}."
            fields[name].append(sentence)
        for name, k in (("tags", 0), ("neg_tags", 1)):
            fields[name] += [things[k] + "s", f"{colours[k]} {things[k]}"][: rng.randint(1, 2)]
    return {name: list(dict.fromkeys(texts)) for name, texts in fields.items()}


Mutation = Callable[[random.Random, str], str]


def cut(rng: random.Random, raw: str) -> str:
    return raw[: rng.randrange(len(raw) + 1)]


def flip_bits(rng: random.Random, raw: str) -> str:
    data = bytearray(raw.encode("utf-8", "surrogatepass"))
    for _ in range(rng.randint(1, 6)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data.decode("utf-8", rng.choice(["replace", "ignore", "surrogateescape"]))


def span(rng: random.Random, raw: str) -> tuple[int, int]:
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + rng.choice([1, 5, 40, 300]))


def double(rng: random.Random, raw: str) -> str:
    start, end = span(rng, raw)
    return raw[:end] + raw[start:end] * rng.choice([1, 1, 3, 30]) + raw[end:]


def remove(rng: random.Random, raw: str) -> str:
    start, end = span(rng, raw)
    return raw[:start] + raw[end:]


def shuffle(rng: random.Random, raw: str) -> str:
    start, end = span(rng, raw)
    return raw[:start] + "".join(rng.sample(raw[start:end], end - start)) + raw[end:]


def insert(rng: random.Random, raw: str) -> str:
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice(rng.choice([SYMBOLS, WORDS, DEBRIS])) + raw[at:]
    return raw


def swap_punctuation(rng: random.Random, raw: str) -> str:
    old, new = rng.sample(
        ['"', "'", "[", "]", "{", "}", ",", ":", "“", '\\"', ", ", "\n", "null"], 2
    )
    return raw.replace(old, new, rng.choice([1, 3, -1]))


def wrap(rng: random.Random, raw: str) -> str:
    before = [
        "```json\n",
        "Sure! Here it is: ",
        "<think>{hm}</think>",
        "[",
        '{"a": ',
        "I'm sorry. ",
        "",
    ]
    after = ["\n```", " I hope this helps {you}.", "]", "}", "<|im_end|>", '{"desc": []}', ""]
    return rng.choice(before) + raw + rng.choice(after)


def edit(rng: random.Random, raw: str) -> str:
    """Damages what the answer says rather than its syntax."""
    try:
        fields = json.loads(raw)
        name, other = rng.sample(FIELDS, 2)
        texts = list(fields[name])
        positive = list(fields[name.removeprefix("neg_")])
    except (ValueError, KeyError, TypeError):
        return raw
    k = rng.randrange(len(texts)) if texts else 0
    noise = "".join(rng.choices(SYMBOLS, k=rng.randint(1, 30)))
    new = rng.choice([None, 7, True, [], {}, "", "x", noise, *DEBRIS, ["a"], "dog " * 9, "y" * 999])
    fields[name] = rng.choice(
        [new, [*texts[:k], new, *texts[k + 1 :]], texts * rng.choice([2, 9]), fields.get(other),
         texts[:k], ", ".join(map(str, texts)), [texts], [" ".join(map(str, texts))], positive,
         [f"{noise}{text}" for text in texts], [str(text).upper() for text in positive]]
    )  # fmt: skip
    if rng.random() < 0.1:
        del fields[name]
    return json.dumps(fields, ensure_ascii=rng.random() < 0.5)


MUTATIONS: list[Mutation] = [
    cut, flip_bits, double, remove, shuffle, insert, swap_punctuation, wrap, edit, edit, edit,
]  # fmt: skip


def damaged(rng: random.Random) -> str:
    raw = json.dumps(answer(rng), ensure_ascii=False, indent=rng.choice([None, None, 1]))
    for mutation in rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2, 3, 5])):
        raw = mutation(rng, raw)
    return raw


def plain(text: str) -> str:
    """Letters, digits and the like in lower case; two texts with the same say the same."""
    kept = [c if unicodedata.category(c)[0] in "LNM" else " " for c in text.lower()]
    return " ".join("".join(kept).split())


def fault(parsed: Parsed) -> str:
    """What is wrong with a record that was accepted, in words, or ""."""
    texts = parsed.texts
    both = [(texts.desc, texts.neg_desc), (texts.tags, texts.neg_tags)]
    for kind, (positives, negatives) in zip(("sentence", "tag"), both):
        for group in (positives, negatives):
            if type(group) is not tuple or not 1 <= len(group) <= (
                12 if kind == "sentence" else 24
            ):
                return f"{len(group)} {kind}s"
            for text in group:
                if found := fault_of(text, kind):
                    return f"{kind} {text!r}: {found}"
            if len({plain(text) for text in group}) < 0.5 * len(group):
                return f"repeats among {group}"
        for negative in negatives:
            if any(plain(negative) and plain(negative) == plain(text) for text in positives):
                return f"negative {negative!r} is a positive"
        if plain(" ".join(positives)) == plain(" ".join(negatives)):
            return "the negatives joined are the positives joined"
    return ""


def fault_of(text: str, kind: str) -> str:
    if type(text) is not str or not 2 <= len(text) <= (400 if kind == "sentence" else 60):
        return "not of a string's type and size"
    if text != " ".join(text.split()):
        return "white space"
    for character in text:
        category = unicodedata.category(character)
        if (category[0] == "C" and character not in "\u200c\u200d") or character == "\ufffd":
            return f"character {ord(character):x}"
    if kind == "tag" and len(text.split()) > 6:
        return "a tag of many words"
    letters = sum(unicodedata.category(c)[0] in "LNM" for c in text)
    if letters < 0.5 * len(text.replace(" ", "")):
        return "mostly symbols"
    if max(len(word) for word in text.split()) > 40 and text.isascii():
        return "a word without end"
    lowered = text.lower()
    if re.search(r"</?[a-z][^<>]*>|<\||\[/?inst\]|\{\{", lowered):
        return "markup"
    if re.match(r"i'm sorry|i can(?:not|'t) (?:help|assist)|as an ai\b", lowered):
        return "a refusal"
    words = plain(text).split()
    for size in range(1, 7):
        for k in range(len(words)):
            chunk = words[k : k + size]
            if len(chunk) == size and words[k : k + 4 * size] == chunk * 4:
                return f"a loop of {chunk}"
    return ""


def verdict(raw: str) -> str:
    """The reason for which an output is rejected; "kept" or "mended" for one that is valid."""
    try:
        parsed = parse(raw)
    except Rejected as e:
        assert e.reason in REASONS and e.detail
        e.detail.encode()  # it goes into a file
        return e.reason
    assert not (found := fault(parsed)), f"{found} in {raw!r}"
    return "mended" if parsed.repaired else "kept"


@pytest.mark.parametrize("part", range(4))
def test_damaged_answers_are_rejected_or_valid(part):
    seeds = range(part * ANSWERS // 4, (part + 1) * ANSWERS // 4)
    counts = Counter(verdict(damaged(random.Random(seed))) for seed in seeds)
    # No side is empty: a parser that rejects everything, mends nothing or keeps too much fails.
    assert counts["kept"] > 200 and counts["mended"] > 200
    assert counts["kept"] + counts["mended"] < 1_300


def test_undamaged_answers_are_kept():
    for seed in range(500):
        assert verdict(json.dumps(answer(random.Random(seed)))) == "kept"


@pytest.mark.parametrize(
    ("field", "texts", "found"),
    [
        ("desc", ["x"], "size"),
        ("tags", ["a b c d e f g"], "many words"),
        ("tags", [f"tag no {n}" for n in range(25)], "25 tags"),
        ("neg_desc", [], "0 sentences"),
        ("neg_desc", ["2 RED dogs, on a rug"], "is a positive"),
        ("neg_desc", ["2 red", "dogs on a rug"], "joined"),
        ("desc", ["a\x07b"], "character 7"),
        ("desc", ["a dog \ud83d"], "character d83d"),
        ("desc", ["a dog</s>"], "markup"),
        ("desc", ["i'm sorry"], "refusal"),
        ("desc", ["#!% a ?!*"], "symbols"),
        ("desc", ["a dog a dog a dog a dog"], "loop"),
        ("desc", ["a dog", "A dog", "a dog."], "repeats"),
    ],
)
def test_the_oracle_finds_faults(field, texts, found):
    good = Texts(("2 red dogs on a rug",), ("3 blue cups on sand",), ("dogs",), ("cups",))
    assert fault(Parsed(good)) == ""
    assert found in fault(Parsed(replace(good, **{field: tuple(texts)})))


PIECES = st.sampled_from(
    [*SYMBOLS, *WORDS, *DEBRIS, *(f'"{name}": [' for name in FIELDS), '", "', "]}"]
)
ITEMS = st.one_of(st.text(), st.none(), st.integers(), st.lists(st.text(max_size=5), max_size=3))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.text(st.characters(), max_size=400)
    | st.lists(PIECES, max_size=60).map("".join)
    | st.fixed_dictionaries({}, optional={n: ITEMS | st.lists(ITEMS) for n in FIELDS}).map(
        json.dumps
    )
)
def test_any_text_is_rejected_or_valid(raw):
    verdict(raw)
