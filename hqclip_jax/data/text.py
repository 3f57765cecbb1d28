"""Text: the one cleaning every string passes, and which texts an example trains on."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

import ftfy
import numpy as np

LIST_FORMS = ("join", "shuffle", "sample", "first")
# No character has a number this long, and Python refuses to read one of thousands of digits.
_NO_CHARACTER = re.compile(r"&#\d{8,};?")


def clean(text: str) -> str:
    """Repairs mojibake, unescapes HTML twice and folds white space.

    The rule of OpenAI's CLIP tokenizer. Every text passes it once, before storage, tokeniser, LVLM
    prompt or evaluation query: it costs more than tokenising, so the training path never runs it.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = ftfy.fix_text(text)
        for _ in range(2):
            text = html.unescape(_NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", text))
    # Plain ASCII has nothing to mend; going past ftfy is fourteen times faster.
    return " ".join(text.split())


def list_to_text(parts: Sequence[str], form: str, rng: np.random.Generator) -> str:
    """One string from a list of sentences or tags; the paper does not say how (our inference).

    Args:
        parts: sentences or tags, cleaned.
        form: `join` (all, in order), `shuffle` (all, in random order), `sample` (one of them),
            `first` (the first one).
        rng: the example's own generator.
    """
    if not parts:
        return ""
    if form == "first":
        return parts[0]
    if form == "sample":
        return parts[rng.integers(len(parts))]
    if form == "shuffle":
        parts = [parts[i] for i in rng.permutation(len(parts))]
    return ", ".join(parts)


@dataclass(frozen=True)
class TextChoice:
    """How an example's positive and negative text are drawn.

    Published (framework figure): the positive is the caption or the description, the negative is
    the negative description or the negative tags, at random. The probabilities and the form of the
    lists are not published: ours.
    """

    p_desc: float = 0.5
    p_neg_desc: float = 0.5
    list_form: str = "join"

    def positive(self, caption: str, desc: Sequence[str], rng: np.random.Generator) -> str:
        """Caption or description; whichever exists where the other is empty."""
        take_desc = rng.random() < self.p_desc
        described = list_to_text(desc, self.list_form, rng)
        return (described or caption) if take_desc else (caption or described)

    def negative(
        self, neg_desc: Sequence[str], neg_tags: Sequence[str], rng: np.random.Generator
    ) -> str:
        """Negative description or negative tags; "" where the record has neither."""
        take_desc = rng.random() < self.p_neg_desc
        described = list_to_text(neg_desc, self.list_form, rng)
        tagged = list_to_text(neg_tags, self.list_form, rng)
        return (described or tagged) if take_desc else (tagged or described)
