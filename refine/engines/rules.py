"""The engine `rules`: texts from the alt-text alone. It NEVER LOOKS AT THE PICTURE.

A baseline that needs no model, and a stand-in where there is none: what it says of an image is no
more than what the web said, cut into sentences and tags; its negatives change colours, numbers,
places, objects and antonyms by word lists. Everything here is ours, nothing is from the paper.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from hqclip_jax.data.tags import normalise
from refine.engines import Refined, Refiner, Texts, unique
from refine.inputs.pairs import Pair, Skip
from refine.ledger import Ledger
from refine.uids import Subset, UidTable

WORDS_FILE = Path(__file__).parent / "words.json"
VERSION = "v1"
MAX_SENTENCES, MAX_TAGS, MAX_TAG_WORDS = 8, 10, 3
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*[;|•·]\s*|\s+[-–—:]\s+")
TAG_BREAK = re.compile(r"[^\w\s'’&-]|_")


@dataclass(frozen=True)
class WordList:
    """Which words may stand for which.

    Attributes:
        swaps: word → the words that may take its place.
        stop_words: words that are in no tag.
        pattern: finds the words of `swaps` and plain numbers, with the article before them.
        digest: of the file, 12 hex digits.
    """

    swaps: dict[str, tuple[str, ...]]
    stop_words: frozenset[str]
    pattern: re.Pattern
    digest: str

    @classmethod
    def load(cls, path: Path = WORDS_FILE) -> "WordList":
        """Reads groups of words of a kind, their plurals made by rule, and pairs of antonyms."""
        data = path.read_bytes()
        stored = json.loads(data)
        swaps: dict[str, tuple[str, ...]] = {}
        for group in stored["groups"].values():
            words = group["words"]
            swaps |= {word: tuple(w for w in words if w != word) for word in words}
            if group["countable"]:
                many = [plural(word, stored["plurals"]) for word in words]
                swaps |= {word: tuple(w for w in many if w != word) for word in many}
        for one, other in stored["antonyms"]:
            swaps |= {one: (other,), other: (one,)}
        longest_first = sorted(swaps, key=lambda word: (-len(word), word))
        words = "|".join(map(re.escape, longest_first))
        pattern = re.compile(
            rf"(?:\b(?P<article>an?) )?(?<![\w'’-])(?P<word>{words}|(?<![.,])\d{{1,6}}(?![.,]?\d))"
            r"(?![\w-])"
        )
        digest = hashlib.sha256(data).hexdigest()[:12]
        return cls(swaps, frozenset(stored["stop_words"]), pattern, digest)


def plural(word: str, irregular: dict[str, str]) -> str:
    """The plural of an English noun."""
    if word in irregular:
        return irregular[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@dataclass(frozen=True)
class Rules:
    """Texts by rule, a function of the uid and the alt-text."""

    note: ClassVar[str] = "texts made from the alt-text by word lists; never looks at the picture"

    buckets: int = 1

    @property
    def refiner(self) -> str:
        return f"rules:{VERSION}:{WordList.load().digest}"

    def plan(self, times: bool) -> dict:
        return {}

    def prepare(self, workers: int) -> None:
        pass

    def open(self) -> Refiner:
        return partial(refine, WordList.load())

    def settle(self, ledger: Ledger, seen: UidTable, subset: Subset | None, whole: bool) -> None:
        pass


def refine(words: WordList, pairs: Iterable[Pair], number: int) -> Iterator[Refined | Skip]:
    """Gives each pair its texts; one without a caption is skipped."""
    for pair in pairs:
        if pair.caption:
            yield Refined(pair, texts_of(pair.caption, pair.uid, words))
        else:
            yield pair.skip("no_caption")


def texts_of(caption: str, uid: str, words: WordList) -> Texts:
    """Sentences and tags of a caption, and the same with changed facts.

    A negative that equals a positive is left out: where nothing can be changed there is none.

    Args:
        caption: the alt-text, cleaned.
        uid: decides which words take the place of others; a word is changed the same way
            throughout a record.
        words: what may be changed.
    """
    lowered = caption.lower()
    desc = sentences(lowered)
    tags = tags_of(lowered, words.stop_words)
    change = partial(changed, uid=uid, words=words, present=_present(lowered, words))
    neg_desc = tuple(text for text in map(change, desc) if text not in desc)
    positive = set(map(normalise, tags))
    neg_tags = unique(tag for tag in map(change, tags) if normalise(tag) not in positive)
    return Texts(desc, neg_desc, tags, neg_tags)


def sentences(text: str) -> tuple[str, ...]:
    """The parts of a text between full stops, bars, dashes and the like that hold a letter."""
    parts = (part.strip(" ,.:!?-–—") for part in SENTENCE_END.split(text))
    kept = dict.fromkeys(part for part in parts if re.search(r"[^\W\d_]", part))
    return tuple(kept)[:MAX_SENTENCES]


def tags_of(text: str, stop_words: frozenset[str]) -> tuple[str, ...]:
    """Noun chunks, roughly: runs of words between stop words and punctuation, the last three of
    each, since an English noun phrase ends with its noun."""
    tags: list[str] = []
    for phrase in TAG_BREAK.split(text):
        run: list[str] = []
        for word in [*phrase.split(), ""]:
            word = word.strip("'’&-")
            if word and word not in stop_words and not word.isdigit():
                run.append(word)
                continue
            tag = " ".join(run[-MAX_TAG_WORDS:])
            if len(tag) > 2 and re.search(r"[^\W\d_]", tag):
                tags.append(tag)
            run = []
    return unique(tags)[:MAX_TAGS]


def changed(text: str, uid: str, words: WordList, present: frozenset[str]) -> str:
    """A text with every word and number that can be changed replaced, and "a" and "an" to fit."""

    def replacement(match: re.Match) -> str:
        word = match["word"]
        if word.isdigit():
            new = _other_number(word, uid)
        else:
            choices = [w for w in words.swaps[word] if w not in present]
            new = choices[_draw(uid, word, len(choices))] if choices else word
        if not match["article"]:
            return new
        return f"{'an' if new[0] in 'aeiou' else 'a'} {new}"

    return words.pattern.sub(replacement, text)


def _present(text: str, words: WordList) -> frozenset[str]:
    return frozenset(match["word"] for match in words.pattern.finditer(text))


def _draw(uid: str, word: str, choices: int) -> int:
    digest = hashlib.sha256(f"{uid}:{word}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % choices


def _other_number(number: str, uid: str) -> str:
    """Another number of as many digits, not 0 or 1 where there is a choice."""
    low, high = max(2, 10 ** (len(number) - 1)), 10 ** len(number)
    choices: Sequence[int] = [n for n in range(low, min(high, low + 1000)) if n != int(number)]
    return str(choices[_draw(uid, number, len(choices))])
