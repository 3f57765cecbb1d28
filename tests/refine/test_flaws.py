import random
import time

import pytest

from refine.flaws import flaw, is_loop, normal, squeezes
from refine.prompts import example_sentences

SENTENCES = [
    "a brown dog lies on a red rug.",
    "A sign reads \"50% off!\" in white letters on blue.",
    "the price tag reads $1,299.99.",
    'the digital clock shows "12:30 - 14:00, 25.12.2020".',
    'a card with the words "I\'m sorry, my love" leans on a vase.',
    "sorry we're closed is written on the door.",
    "the man can't see the ball because a wall hides it.",
    "an assistant hands the doctor a pair of scissors.",
    "two very, very, very tall men.",
    "1 < 2 and a > b stand on a blackboard; below, i <3 you.",
    "una niña con un sombrero de paja está en la playa.",
    "ein Rindfleischetikettierungsüberwachungsaufgabengesetz.",
    "東京タワーの前に二人の子供が立っている。",
    "एक लड़की लाल साड़ी में खड़ी है।",
    "की टोपी।",
    "یک سگ قهوه\u200cای روی فرش می\u200cخوابد.",
    "a family emoji 👨\u200d👩\u200d👧 and a heart ❤\ufe0f on a phone.",
    "the lake is 1000000 years old.",
    "abcdefghijklmnopqrst" * 2 + " is written on the wall.",
    "a sentence is written on the blackboard.",
    "no image hangs on the wall.",
    "a dog sits near a dog that sits near a dog.",
]  # fmt: skip
TAGS = [
    "dog", "猫の", "t-shirt", "r&b", "$5", "2019", "3d", "text", "sentence", "u.s.a.", "st. moritz",
    "washington d.c.", "hello kitty!", "one two three four five six", "50 mm", "café",
    "abcdefghijklmnopqrst" * 2,
]  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences_that_are_kept(text):
    assert flaw(text, tag=False) == ""


@pytest.mark.parametrize("text", TAGS)
def test_tags_that_are_kept(text):
    assert flaw(text, tag=True) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I cannot describe this.", "refusal"),
        ("i’m really sorry about that.", "refusal"),
        ("I am sorry.", "refusal"),
        ("a dog. sorry, but i will stop here.", "refusal"),
        ("Unfortunately, I have to stop.", "refusal"),
        ("As an AI language model, the dog is brown.", "refusal"),
        ("I can't assist with that request.", "refusal"),
        ("i am unable to see the picture.", "refusal"),
        ("I do not identify people.", "refusal"),
        ("I apologize for the confusion.", "refusal"),
        ("no image was provided.", "refusal"),
        ("a dog<|im_end|>", "markup"),
        ("a dog <｜end▁of▁sentence｜>", "markup"),
        ("<b>a dog</b> on a rug", "markup"),
        ("a dog <script src=x onerror=", "markup"),
        ("a dog </s>", "markup"),
        ("<!-- a dog -->", "markup"),
        ("[INST] a dog on a rug", "markup"),
        ("a dog {{image}} on a rug", "markup"),
        ("```json a dog", "markup"),
        ("a", "item_size"),
        (" ".join(f"word{i}" for i in range(80)), "item_size"),
        ("the dog sits. " * 40, "repetition"),
        ("a red red red red rug", "repetition"),
        ("a dog on a rug, a dog on a rug, A dog on a rug, a dog on a rug", "repetition"),
        ("a dog says aaaaaaaaaaaaaaa", "repetition"),
        ("a dog says hahahahahahahahahahahaha", "repetition"),
        ("a dog \ufffd on a rug", "noise"),
        ("a dog \u202e on a rug", "noise"),
        ("a dog \u200b on a rug", "noise"),
        ("a dog \x07 on a rug", "noise"),
        ("a dog \ue000 on a rug", "noise"),
        ("a dog \ud800 on a rug", "noise"),
        ("a dog \U000e0041 on a rug", "noise"),
        ("...", "noise"),
        ("🐶🐶", "noise"),
        ("!@# a $%^ b &*( c", "noise"),
        ("12 34 56 78 90", "noise"),
        ("Ã©tÃ© Ã  la plage", "noise"),
        ("see https://example.com/a/very/long/path/to/a/file.jpg", "noise"),
        ("abcdefghijklmnopqrst" * 2 + "u", "noise"),
        ("sentence 1", "prompt_echo"),
        ("Short true sentence two.", "prompt_echo"),
        ("the neg_desc of a dog", "prompt_echo"),
        ("the alt-text says a dog", "prompt_echo"),
        ("lorem ipsum dolor sit amet", "prompt_echo"),
    ],
)
def test_flaws_of_sentences(text, reason):
    assert flaw(text, tag=False) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a brown dog lies on a rug", "tag_sentence"),
        ("a brown dog.", "tag_sentence"),
        ("what a dog!", "tag_sentence"),
        ("x", "item_size"),
        ("wonderfully extraordinarily incomprehensible characterisation", "item_size"),
        ("tag 1", "prompt_echo"),
        ("neg_tags", "prompt_echo"),
        ("???", "noise"),
        ("$$$ a", "noise"),
        ("<tag>", "markup"),
        ("i cannot identify people", "refusal"),
        ("ho ho ho ho", "repetition"),
    ],
)
def test_flaws_of_tags(text, reason):
    assert flaw(text, tag=True) == reason


def test_bounds_are_exact():
    words = "".join(random.Random(0).choices("abcdefghijkl   ", k=401))
    assert flaw(words[:400], tag=False) == "" and flaw(words[:401], tag=False) == "item_size"
    tag = "extraordinarily-unbelievable incomprehensible-characterisation"
    assert flaw(tag[:60], tag=True) == "" and flaw(tag[:61], tag=True) == "item_size"
    assert flaw("ab", tag=True) == ""


def test_the_prompts_own_examples_are_no_answer():
    for sentence in example_sentences():
        assert flaw(sentence, tag=False) == "prompt_echo"
        assert flaw(sentence.upper().rstrip("."), tag=False) == "prompt_echo"
        assert flaw("today " + sentence, tag=False) == ""


def test_normal_forms():
    assert normal("  A Dog's “rug”, red. ") == normal("a dog s rug red")
    assert normal("a red rug") != normal("a rug red")
    assert normal("1.5 l") != normal("15 l")
    assert normal("STRASSE") == normal("straße")
    assert normal("...") == "..." and normal("🐶") != normal("🐱")
    assert normal("की") != normal("कि")


def test_a_long_text_takes_no_longer_than_it_is():
    begin = time.process_time()
    for text in ("! " * 30_000, "< " * 30_000, "<a" * 30_000, "i am " * 12_000, "sorry " * 10_000):
        assert flaw(text, tag=False) in ("repetition", "markup", "item_size")
    assert time.process_time() - begin < 2


def test_loops():
    assert is_loop("a b a b a b a b") and not is_loop("a b a b a b")
    assert is_loop("x one two three four five six" + " one two three four five six" * 3)
    assert not is_loop("red redder redred reddest red")
    assert is_loop("ab" * 12) and not is_loop("ab" * 11)


def test_prose_does_not_squeeze():
    assert squeezes("a dog sits on the mat. " * 20)
    assert not squeezes("a dog sits on the mat. " * 11)  # shorter than what is measured
    prose = (
        "a brown dog sits on a mat. the mat is woven of blue straw. behind the dog stands a low "
        "table with four cups. rain falls on the terrace, and a man in a yellow coat runs to the "
        "door. the left wall is covered with ivy, the right one with posters of old silent films."
    )
    assert len(prose) > 256 and not squeezes(prose, ratio=2)
