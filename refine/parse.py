"""From what a model wrote to four texts, or to the reason why they are not kept.

An answer is read as strict JSON; where that fails an object is looked for in it, and if that is
broken it is mended. Then the texts are judged, for syntax says little: a model may refuse, loop,
fall into symbols, copy its prompt, or give a truth for its falsehood. All limits are ours: the
paper does not say what it kept.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from refine.engines import Texts
from refine.flaws import REFUSAL, flaw, normal, squeezes

FIELDS = tuple(field.name for field in fields(Texts))
ITEMS = {"desc": 12, "neg_desc": 12, "tags": 24, "neg_tags": 24}
MAX_CHARACTERS = 1 << 16

# Mending takes quadratic time in these: within them the slowest of many thousand hostile answers
# took 0.7 s, without them minutes. Four full lists need half of the quotation marks.
MAX_MENDED = 1 << 13
MAX_MARKS = ((re.compile(r"[\[{]"), 16), (re.compile(r"\("), 32), (re.compile(r"[\"'“”]"), 512))

# Strings have no bounds of length: xgrammar then lets raw control characters into them.
SCHEMA = {
    "type": "object",
    "properties": {
        name: {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": most}
        for name, most in ITEMS.items()
    },
    "required": list(FIELDS),
    "additionalProperties": False,
}

REASONS = {
    "too_long": f"the output is longer than {MAX_CHARACTERS:,} characters",
    "no_json": "there is no JSON object in the output, or one beyond mending",
    "cut_off": "the output ends before all four fields came: more tokens may help",
    "missing_field": "one of the four fields is missing",
    "wrong_type": "a field is no list of strings",
    "empty_field": "a field has no text in it",
    "list_length": f"more than {ITEMS['desc']} sentences or {ITEMS['tags']} tags",
    "item_size": "a sentence or tag is a single character or too long",
    "markup": "a text holds HTML or a chat template's tokens",
    "noise": "a text is broken or mostly symbols",
    "repetition": "the model repeated itself",
    "tag_sentence": "a tag is a sentence",
    "refusal": "the model refused",
    "prompt_echo": "the model copied from its prompt",
    "equal_negative": "every negative equals a positive",
}

THOUGHT_END = "</think>"
DECODER = json.JSONDecoder()
OBJECT_END = re.compile(r"[\]\"']\s*(?:,\s*)?\}")  # without one, the output was cut off
LIST_END = re.compile(r"\][\s,`]*$")


class Rejected(ValueError):
    """An answer that is not kept.

    Attributes:
        reason: a key of `REASONS`.
        detail: the same in words, with the place; printable whatever the answer was.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Parsed:
    """An answer that is kept.

    Attributes:
        texts: cleaned; no list is empty, and no negative equals a positive.
        repaired: the output was not the bare JSON object that was asked for.
        dropped: texts left out: repeated ones, and negatives that equal a positive.
    """

    texts: Texts
    repaired: bool = False
    dropped: int = 0


def parse(raw: str) -> Parsed:
    """Reads and judges an answer.

    Args:
        raw: what the model wrote; may be anything.

    Raises:
        Rejected: it is not kept; nothing else is raised.
    """
    if len(raw) > MAX_CHARACTERS:
        raise Rejected("too_long", f"{len(raw):,} characters")
    stored, repaired = _read(raw)
    lists = {name: _strings(stored, name) for name in FIELDS}
    kept = {name: _distinct(name, texts) for name, texts in lists.items()}
    texts = Texts.cleaned(**kept)
    for name in FIELDS:
        _judge(name, getattr(texts, name))
    neg_desc = _false("neg_desc", texts.neg_desc, texts.desc)
    neg_tags = _false("neg_tags", texts.neg_tags, texts.tags)
    texts = Texts(texts.desc, neg_desc, texts.tags, neg_tags)
    count = sum(map(len, lists.values())) - sum(len(getattr(texts, name)) for name in FIELDS)
    repaired |= any(isinstance(stored[name], str) for name in FIELDS)
    return Parsed(texts, repaired, count)


def _read(raw: str) -> tuple[dict, bool]:
    """The object in an answer, and whether there was more to do than to decode it."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value, False
    text = raw.rpartition(THOUGHT_END)[2]
    start = text.find("{")
    if start < 0:
        reason = "refusal" if REFUSAL.search(text) else "no_json"
        raise Rejected(reason, f"the output begins {text[:80]!r}")
    try:
        value, _ = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and all(name in value for name in FIELDS):
        return value, True
    return _mended(text[start:]), True


def _mended(text: str) -> dict:
    """The object that a broken one was meant to be; of several, the first with all fields."""
    if squeezes(text, ratio=6):
        raise Rejected("repetition", f"the output begins {text[:80]!r} and goes on like this")
    if len(text) > MAX_MENDED:
        raise Rejected("too_long", f"broken JSON of {len(text):,} characters")
    for marks, most in MAX_MARKS:
        if len(marks.findall(text)) > most:
            raise Rejected("no_json", f"broken JSON with more than {most} of {marks.pattern}")

    from json_repair import loads

    try:
        value = loads(text, skip_json_loads=True)
    except Exception as e:  # guesses about hostile text: whatever they stumble on, it is no JSON
        raise Rejected("no_json", f"beyond mending: {type(e).__name__}") from e
    objects = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, dict)]
    if not objects:
        raise Rejected("no_json", f"the output begins {text[:80]!r}")
    whole = [v for v in objects if all(name in v for name in FIELDS)]
    found = whole[0] if whole else objects[0]
    if not OBJECT_END.search(text):
        _close(found, in_list=not LIST_END.search(text))
    return found


def _close(found: dict, in_list: bool) -> None:
    """Takes out of an object that was cut off the item in which it was."""
    last = list(found)[-1] if found else ""
    if in_list and last in FIELDS:
        value = found[last]
        found[last] = value[:-1] if isinstance(value, list) else []
    if not all(found.get(name) for name in FIELDS):
        raise Rejected("cut_off", f"the output ends in {last[:80]!r}")


def _strings(stored: dict, name: str) -> list[str]:
    """A field's texts; a plain string counts as a list of one."""
    if name not in stored:
        raise Rejected("missing_field", name)
    value = stored[name]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"{name} is a {type(value).__name__}")
    for item in value:
        if not isinstance(item, str):
            raise Rejected("wrong_type", f"{name} holds a {type(item).__name__}")
    return value


def _distinct(name: str, texts: list[str]) -> list[str]:
    """The texts without repeats, of which there may not be too many."""
    distinct: dict[str, str] = {}
    for text in texts:
        distinct.setdefault(normal(text), text)
    if 2 * len(distinct) < len(texts):
        raise Rejected("repetition", f"{name} has {len(texts)} texts, {len(distinct)} different")
    if len(texts) > ITEMS[name]:
        raise Rejected("list_length", f"{name} has {len(texts)} texts, {ITEMS[name]} at most")
    return list(distinct.values())


def _judge(name: str, texts: tuple[str, ...]) -> None:
    if not texts:
        raise Rejected("empty_field", name)
    for text in texts:
        reason = flaw(text, tag=name.endswith("tags"))
        if reason:
            raise Rejected(reason, f"{name}: {text[:80]!r}")
    if squeezes(" ".join(texts)):
        raise Rejected("repetition", f"{name}: {texts[0][:80]!r} and so on")


def _false(name: str, negatives: tuple[str, ...], positives: Iterable[str]) -> tuple[str, ...]:
    """The negatives that differ from every positive, also when both are read as one text."""
    true = set(map(normal, positives))
    false = tuple(text for text in negatives if normal(text) not in true)
    if not false or normal(" ".join(negatives)) == normal(" ".join(positives)):
        raise Rejected("equal_negative", f"{name}: {negatives[0][:80]!r}")
    return false
