"""Is what a text says of a rendered scene true? Sentences and tags read back into facts.

The judge of `make demo-lvlm`: whatever words a model put together are compared with what was drawn.
It knows the words and the grammar of `hqclip_jax.scenes` and no others: a text that it can't read
is neither true nor false.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations, zip_longest

from hqclip_jax.scenes import OPPOSITE
from hqclip_jax.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    NUMBERS,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Scene,
)

SEVERAL = -1
"""The count of a plural without a number."""
DETERMINERS = {"a": 1, "an": 1} | {word: number for number, word in NUMBERS.items()}
SINGULAR = {shape: shape for shape in SHAPES}
PLURAL = {Group("", shape, count=2).noun: shape for shape in SHAPES}
ADJECTIVES = dict.fromkeys(COLORS, "color") | dict.fromkeys(SIZES, "size")
ADJECTIVES |= dict.fromkeys(TEXTURES, "texture")


@dataclass(frozen=True)
class Mention:
    """What is told of one group; None where nothing is.

    Attributes:
        count: 1 to 3, or `SEVERAL`.
    """

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None
    count: int | None = None

    def agrees(self, group: Group, fact: str) -> bool:
        """Whether one fact is told, and as it is."""
        told, true = getattr(self, fact), getattr(group, fact)
        return told == true or (told == SEVERAL and true > 1)

    def fits(self, group: Group) -> bool:
        """Whether nothing is told that is not so."""
        told = (f.name for f in fields(self) if getattr(self, f.name) is not None)
        return all(self.agrees(group, fact) for fact in told)

    def joined(self, other: "Mention") -> "Mention":
        """Both together; of two that speak of the same fact, this one."""
        return replace(other, **{k: v for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class Claim:
    """What a sentence or a tag says.

    Attributes:
        groups: in the order in which they are told.
        relation: where the first lies as seen from the second, or "".
        total: how many shapes there are in all, or None.
        background: or None.
    """

    groups: tuple[Mention, ...] = ()
    relation: str = ""
    total: int | None = None
    background: str | None = None

    def fits(self, scene: Scene) -> bool:
        """Whether all of it is true of the picture."""
        return (
            self.total in (None, scene.count)
            and self.background in (None, scene.background)
            and any(
                all(m.fits(scene.groups[i]) for m, i in zip(self.groups, order))
                and self.relation in ("", _relation(scene, order))
                for order in permutations(range(len(scene.groups)), len(self.groups))
            )
        )


def _relation(scene: Scene, order: Sequence[int]) -> str:
    """Where the first of the ordered groups lies as seen from the second; "" with one."""
    if len(order) < 2:
        return ""
    return scene.relation if order[0] < order[1] else OPPOSITE[scene.relation]


def read(text: str) -> Claim | None:
    """What a sentence or tag says, or None if it is none that `hqclip_jax.scenes` could write."""
    words = text.lower().rstrip(".").split()
    if words[1:] == ["background"] and words[0] in BACKGROUNDS:
        return Claim(background=words[0])
    background = None
    if words[-2:-1] == ["on"] and words[-1] in BACKGROUNDS:
        words, background = words[:-2], words[-1]
    if len(words) == 2 and words[1] in ("shape", "shapes") and words[0] in DETERMINERS:
        return Claim(total=DETERMINERS[words[0]], background=background)
    first, rest = _mention(words)
    if first is None or not rest:
        return first and Claim((first,), background=background)
    for link in ("and", *OPPOSITE):
        if rest[: len(link.split())] == link.split():
            second, rest = _mention(rest[len(link.split()) :])
            if second is not None and not rest:
                return Claim((first, second), link if link in OPPOSITE else "", None, background)
    return None


def _mention(words: Sequence[str]) -> tuple[Mention | None, Sequence[str]]:
    """The group told at the beginning of the words, and the words after it."""
    told: dict[str, str | int] = {}
    if words and words[0] in DETERMINERS:
        told["count"], words = DETERMINERS[words[0]], words[1:]
    while words and words[0] in ADJECTIVES and ADJECTIVES[words[0]] not in told:
        told[ADJECTIVES[words[0]]], words = words[0], words[1:]
    if words and words[0] in SINGULAR and told.get("count", 1) == 1:
        told["shape"], words = words[0], words[1:]
    elif words and words[0] in PLURAL and told.get("count") != 1:
        told = {"count": SEVERAL} | told | {"shape": PLURAL[words[0]]}
        words = words[1:]
    elif "count" in told or not told:
        return None, words
    return Mention(**told), words


FACTS = ("color", "shape", "size", "texture", "count")


def judge(texts: Mapping[str, Sequence[str]], scene: Scene) -> Counter[tuple[str, bool]]:
    """Counts what is right and wrong in the four texts of a picture.

    What all sentences of the description say of the first group is taken together, and so for the
    second; they are laid onto the true groups in the order that makes most of it right, and what is
    not told is wrong.

    Args:
        texts: `desc`, `neg_desc`, `tags` and `neg_tags`.
        scene: what was drawn.

    Returns:
        How often (measure, right): the facts of each group; `pair` (colour and shape of one
        group; `held_out_pair` of those that training never shows), `relation` (of two),
        `background`; `desc` and `tags` (texts that are true), `neg_desc` and
        `neg_tags` (texts that are false). An unreadable text is wrong in any field.
    """
    claims = [claim for text in texts["desc"] if (claim := read(text))]
    told = [_joined(mentions) for mentions in zip_longest(*(c.groups for c in claims))]
    told = (told + [Mention()] * 2)[: max(2, len(told))]
    order = max(
        permutations(range(len(told)), len(scene.groups)),
        key=lambda order: sum(map(len, _right(told, order, scene))),
    )
    right = _right(told, order, scene)
    found = Counter((fact, fact in facts) for facts in right for fact in FACTS)
    for group, facts in zip(scene.groups, right):
        pairs = ["pair"] + ["held_out_pair"] * ((group.color, group.shape) in HELD_OUT)
        found.update((name, {"color", "shape"} <= facts) for name in pairs)
    grounds = [claim.background for claim in claims if claim.background]
    found["background", scene.background in grounds[:1]] += 1
    if len(scene.groups) == 2:
        stated = [claim.relation for claim in claims if claim.relation]
        true = _relation(scene, [order.index(k) for k in (0, 1)]) if set(order) == {0, 1} else ""
        found["relation", true in stated[:1]] += 1
    for field, truth in (("desc", True), ("tags", True), ("neg_desc", False), ("neg_tags", False)):
        for text in texts[field]:
            claim = read(text)
            found[field, claim is not None and claim.fits(scene) == truth] += 1
    return found


def _joined(mentions: Sequence[Mention | None]) -> Mention:
    whole = Mention()
    for mention in mentions:
        whole = whole.joined(mention) if mention else whole
    return whole


def _right(told: Sequence[Mention], order: Sequence[int], scene: Scene) -> list[set[str]]:
    """For each true group the facts that are told rightly."""
    return [
        {fact for fact in FACTS if told[i].agrees(group, fact)}
        for i, group in zip(order, scene.groups)
    ]


def shares(found: Counter[tuple[str, bool]]) -> dict[str, float]:
    """Measure → share that is right."""
    names = dict.fromkeys(name for name, _ in found)
    return {n: found[n, True] / (found[n, True] + found[n, False]) for n in names}
