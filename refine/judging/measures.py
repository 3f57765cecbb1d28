"""What is measured of an output: of each record's texts, and of all texts together."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hqclip_jax.data.record import Record
from hqclip_jax.data.tags import COUNTS_FILE, normalise
from refine.judging.outputs import Output

VOCABULARY = 10_000  # tags that training knows by default
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Measure:
    """Something that has a value for every record, whose mean is told.

    Attributes:
        key: in files.
        label: for people.
        group: of the table.
        percent: it is a share, shown in percent.
        digits: behind the point.
    """

    key: str
    label: str
    group: str
    percent: bool = False
    digits: int = 1


MEASURES = (
    Measure("clip_caption", "alt-text", "CLIP score"),
    Measure("clip_desc", "description", "CLIP score"),
    Measure("clip_tags", "tags", "CLIP score"),
    Measure("clip_neg_desc", "negative description", "CLIP score"),
    Measure("clip_neg_tags", "negative tags", "CLIP score"),
    Measure("clip_margin", "description − its negative", "CLIP score"),
    Measure("clip_right", "description above its negative, %", "CLIP score", percent=True),
    Measure("judge_caption", "alt-text", "judge, 0 to 10", digits=2),
    Measure("judge_desc", "description", "judge, 0 to 10", digits=2),
    Measure("judge_neg_desc", "negative description", "judge, 0 to 10", digits=2),
    Measure("judge_margin", "description − its negative", "judge, 0 to 10", digits=2),
    Measure("judge_unread", "texts that the judge said nothing of", "judge, 0 to 10", digits=3),
    Measure("words_caption", "words of the alt-text", "length"),
    Measure("words_desc", "words of the description", "length"),
    Measure("words_neg_desc", "words of its negative", "length"),
    Measure("tokens_desc", "CLIP tokens of the description", "length"),
    Measure("cut_desc", "descriptions that CLIP cuts, %", "length", percent=True),
    Measure("sentences", "sentences", "length"),
    Measure("tags", "tags", "length"),
    Measure("has_negative", "records with a negative description, %", "negatives", percent=True),
    Measure("kept_words", "their words that the description has too, %", "negatives", percent=True),
    Measure("equal", "that repeat a sentence of the description, %", "negatives", percent=True),
    Measure("has_tags", "records with tags, %", "tags", percent=True),
    Measure("known_tags", "records with a tag among the 10,000, %", "tags", percent=True),
)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The tags of an output.

    Attributes:
        distinct: how many different ones.
        covered: share of all mentions that the 10,000 most frequent make.
        known: those 10,000.
    """

    distinct: int
    covered: float
    known: frozenset[str]

    @classmethod
    def of(cls, output: Output) -> "Vocabulary":
        counts = json.loads((output.directory / COUNTS_FILE).read_text())["counts"]
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:VOCABULARY]
        mentions = sum(counts.values())
        covered = sum(count for _, count in ranked) / mentions if mentions else np.nan
        return cls(len(counts), covered, frozenset(tag for tag, _ in ranked))


def of_texts(record: Record, known: frozenset[str]) -> dict[str, float]:
    """The measures of a record's texts; NaN where a text is absent."""
    caption, desc, neg_desc = words(record.caption), words(" ".join(record.desc)), words(
        " ".join(record.neg_desc)
    )  # fmt: skip
    shared = sum((Counter(desc) & Counter(neg_desc)).values())
    sentences = {" ".join(words(text)) for text in record.desc}
    repeated = any(" ".join(words(text)) in sentences for text in record.neg_desc)
    both = bool(desc and neg_desc)
    return {
        "words_caption": len(caption) or np.nan,
        "words_desc": len(desc) or np.nan,
        "words_neg_desc": len(neg_desc) or np.nan,
        "sentences": len(record.desc) or np.nan,
        "tags": len(record.tags) or np.nan,
        "has_negative": bool(neg_desc),
        "kept_words": shared / len(neg_desc) if both else np.nan,
        "equal": repeated if both else np.nan,
        "has_tags": bool(record.tags),
        "known_tags": any(normalise(tag) in known for tag in record.tags),
    }


def of_clip(rows: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """The measures of CLIP's rows, f64 [n] each; `context` is the tokens that it sees."""
    found = {
        f"clip_{name}": rows[name].astype(float)
        for name in ("caption", "desc", "tags", "neg_desc", "neg_tags")
    }
    margin = found["clip_desc"] - found["clip_neg_desc"]
    tokens = rows["desc_tokens"].astype(float)
    return found | {
        "clip_margin": margin,
        "clip_right": np.where(np.isnan(margin), np.nan, margin > 0),
        "tokens_desc": tokens,
        "cut_desc": np.where(np.isnan(tokens), np.nan, tokens > context),
    }


def of_judge(rows: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of a judge's rows, f64 [n] each."""
    found = {f"judge_{name}": rows[name].astype(float) for name in ("caption", "desc", "neg_desc")}
    margin = found["judge_desc"] - found["judge_neg_desc"]
    return found | {"judge_margin": margin, "judge_unread": rows["unread"].astype(float)}


def diversity(tokens: Iterable[Sequence[str]], first: int) -> dict[str, float]:
    """How varied texts are.

    Args:
        tokens: the words of each text.
        first: how many words the ratio of different ones is taken of, in all outputs the same,
            because it falls with the number of words.
    """
    ones, twos, taken, total, pairs = set(), set(), set(), 0, 0
    for text in tokens:
        taken.update(text[: max(0, first - total)])
        total += len(text)
        pairs += max(0, len(text) - 1)
        ones.update(text)
        twos.update(pairwise(text))
    return {
        "distinct_1": len(ones) / total if total else np.nan,
        "distinct_2": len(twos) / pairs if pairs else np.nan,
        "type_token_ratio": len(taken) / first if first else np.nan,
    }
