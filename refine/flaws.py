"""What makes a text not worth keeping, as far as it shows without looking at the picture.

One sentence or tag at a time, in the order in which a person would notice; all limits are ours.
"""

import re
import string
import unicodedata
import zlib
from functools import cache

from ftfy.badness import is_bad

from refine.prompts import example_sentences

SENTENCE_CHARACTERS, TAG_CHARACTERS, TAG_WORDS = 400, 60, 6
STOP_WORDS = 3  # from so many words on, a tag with a full stop is a sentence, not "u.s.a."

PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’“”…–—、。", " "))
JOINERS = str.maketrans("", "", "\u200c\u200d")  # Persian and emoji are spelled with them
LONG_WORD = re.compile(r"[!-~]{41}")
MARKUP = re.compile(
    r"<(?:[a-z/!?][^<>]*(?:>|$)|[|｜])|\[/?(?:inst|unk|pad|cls|sep|mask)\]|\{\{|```", re.IGNORECASE
)
PHRASES = re.compile(r"(?<!\S)(\S+(?: \S+){0,5})(?: \1){3}(?!\S)")  # one to six words, four times
STUTTER = re.compile(r"(?=\S{12})(\S{1,4}?)\1{11}")
REFUSAL = re.compile(
    r"(?:^|[.!?]\s)\W{0,3}(?:"
    r"(?:i['’]?m|i am)(?: very| so| really| truly)? sorry\b|i apologi[sz]e\b"
    r"|(?:sorry|unfortunately),?(?: but)? i\b)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?:['’]?m| am)?"
    r" (?:can ?not|can['’]?t|won['’]?t|will not|do not|don['’]?t|unable to|not able to)"
    r" (?:be able to )?(?:help|assist|provide|comply|describe|identify|see|view|access|generate"
    r"|create|fulfill?|process|analy[sz]e|determine|discuss|recogni[sz]e|write|answer)\b"
    r"|\bno (?:image|picture) (?:is |was |has been )?(?:provided|attached|uploaded)\b",
    re.IGNORECASE,
)
ECHO = re.compile(
    r"^\W*(?:(?:short|true|false|positive|negative|another) )*"
    r"(?:sentence|description|desc|tag|text|string|item)s?[ _]?(?:\d|one|two|three|four)\W*$"
    r"|\bneg_(?:desc|tags)\b|\balt-text\b|\bfound text\b|\blorem ipsum\b",
    re.IGNORECASE,
)


def flaw(text: str, tag: bool) -> str:
    """Why a cleaned sentence or tag can't be kept, as a key of `refine.parse.REASONS`, or ""."""
    folded = normal(text)
    if REFUSAL.search(text):
        return "refusal"
    if MARKUP.search(text):
        return "markup"
    if tag and is_sentence(text):
        return "tag_sentence"
    if not 2 <= len(text) <= (TAG_CHARACTERS if tag else SENTENCE_CHARACTERS):
        return "repetition" if squeezes(text) else "item_size"
    if is_loop(folded):
        return "repetition"
    if is_noise(text, tag):
        return "noise"
    if ECHO.search(text) or folded in _examples():
        return "prompt_echo"
    return ""


def normal(text: str) -> str:
    """What two texts have in common that differ in case, punctuation and white space alone."""
    return " ".join(text.casefold().translate(PUNCTUATION).split()) or text


def is_sentence(tag: str) -> bool:
    words = tag.count(" ") + 1
    return words > TAG_WORDS or (words >= STOP_WORDS and tag.endswith((".", "!", "?")))


def is_loop(text: str) -> bool:
    """Whether words, or letters within one, come again and again at once."""
    words = text.split()
    if len(words) - len(set(words)) >= 3 and PHRASES.search(text):
        return True
    return STUTTER.search(text) is not None


def is_noise(text: str, tag: bool) -> bool:
    """Whether a text is broken, or symbols for the most part."""
    spaces = text.count(" ")
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    if not text.isascii():
        # Vowels of Indic scripts are marks, not letters.
        letters += sum(unicodedata.category(character)[0] == "M" for character in text)
        if "\ufffd" in text or is_bad(text):
            return True
    if not text.translate(JOINERS).isprintable() or LONG_WORD.search(text):
        return True
    inked = len(text) - spaces
    return letters + digits < 0.5 * inked or (not tag and letters < 0.3 * inked)


def squeezes(text: str, ratio: float = 4) -> bool:
    """Whether a long text says the same again and again: prose becomes half as long, or a third."""
    data = text.encode("utf-8", "replace")
    return len(data) >= 256 and len(data) > ratio * len(zlib.compress(data, 1))


@cache
def _examples() -> frozenset[str]:
    return frozenset(map(normal, example_sentences()))
