"""Where a negative differs from its positive: texts of two lists matched, differing words marked.

The lists differ in length and order, so a negative is matched with the positive that it shares most
words with, never with the one at its place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, islice
from operator import itemgetter

# What is compared of a list, a text and a word: the time grows with the squares of all three.
TEXTS, WORDS, LETTERS = 16, 60, 64
ALIKE = 0.3  # share of words in common from which two texts are a pair
_WORD = re.compile(r"\S+\s*")
_EDGES = re.compile(r"^\W+|\W+$")
_ALPHANUMERIC = re.compile(r"\w+")


@dataclass(frozen=True)
class Span:
    """Neighbouring words that all differ from the other text, or all occur in it."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Pairing:
    """A positive and its negative; one is empty where the other has no counterpart.

    Attributes:
        positive: the whole text, in spans.
        negative: the whole text, in spans.
        equal: the two say the same, case and punctuation aside.
    """

    positive: tuple[Span, ...] = ()
    negative: tuple[Span, ...] = ()
    equal: bool = False


def pair_up(positives: Sequence[str], negatives: Sequence[str]) -> list[Pairing]:
    """Every text once: the positives in order with their negatives, then what is left over.

    Best matches first, one to one. Of a list only the first 16 are compared, and of a text the
    first 60 words.
    """
    ones, others = ([_words(t) for t in texts[:TEXTS]] for texts in (positives, negatives))
    matches = []
    for i, one in enumerate(ones):
        for j, other in enumerate(others):
            alike = _matcher(one, other).ratio()
            if alike >= ALIKE:
                matches.append((-alike, i, j))
    of_positive: dict[int, int] = {}
    for _, i, j in sorted(matches):
        if i not in of_positive and j not in of_positive.values():
            of_positive[i] = j
    found = [
        _pairing(positive, negatives[of_positive[i]])
        if i in of_positive
        else Pairing(positive=(Span(positive, False),))
        for i, positive in enumerate(positives)
    ]
    taken = set(of_positive.values())
    alone = [negative for j, negative in enumerate(negatives) if j not in taken]
    return found + [Pairing(negative=(Span(negative, False),)) for negative in alone]


def _pairing(positive: str, negative: str) -> Pairing:
    one, other = _words(positive), _words(negative)
    marked_one, marked_other = [False] * len(one), [False] * len(other)
    for tag, i, i_end, j, j_end in _matcher(one, other).get_opcodes():
        if tag != "equal":
            marked_one[i:i_end] = [True] * (i_end - i)
            marked_other[j:j_end] = [True] * (j_end - j)
    equal = _ALPHANUMERIC.findall(positive.casefold()) == _ALPHANUMERIC.findall(negative.casefold())
    return Pairing(_spans(positive, marked_one), _spans(negative, marked_other), equal)


def _matcher(one: list[str], other: list[str]) -> SequenceMatcher:
    return SequenceMatcher(None, one, other, autojunk=False)


def _words(text: str) -> list[str]:
    return [_bare(match[0]) for match in islice(_WORD.finditer(text), WORDS)]


def _bare(word: str) -> str:
    """What is compared of a word; a mark that stands alone is compared as it is."""
    word = word.strip()[:LETTERS].casefold()
    return _EDGES.sub("", word) or word


def _spans(text: str, differs: list[bool]) -> tuple[Span, ...]:
    """The text cut where differing words begin or end; what was not compared does not differ."""
    pieces, end = [], 0
    for match, marked in zip(_WORD.finditer(text), differs):
        pieces.append((marked, text[end : match.end()]))
        end = match.end()
    if text[end:]:
        pieces.append((False, text[end:]))
    runs = groupby(pieces, key=itemgetter(0))
    return tuple(Span("".join(part for _, part in run), marked) for marked, run in runs)
