"""Scenes of coloured shapes: what a picture shows, what would be false of it, and the picture.

A stand-in for web photos that is made in milliseconds, with two things that no crawl has: every
fact of a picture is known, so a negative is false by construction; and eight of the 48 colour-shape
pairs never occur in training, in no picture and no text, negatives included.

All of it is a function of (split, seed, index): numpy and Pillow only, no JAX.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Folds the plane onto one of the ten edges, from the tip (1, 0) to the notch at 36 degrees."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    dx, dy = 0.45 * np.cos(tenth) - 1, 0.45 * np.sin(tenth)
    return ((x - 1) * dy - y * dx) / np.hypot(dx, dy)


SHAPES: dict[str, Distance] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.85,
    "triangle": lambda u, v: np.maximum(v - 0.7, 0.87 * abs(u) - 0.5 * v - 0.5),
    "cross": lambda u, v: np.minimum(
        np.maximum(abs(u) - 0.95, abs(v) - 0.3), np.maximum(abs(u) - 0.3, abs(v) - 0.95)
    ),
    "star": _star,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.55, v)),
}
"""Distance to the outline, negative inside, for points in units of the radius, y downward."""

TEXTURES: dict[str, Distance] = {
    "plain": lambda u, v: np.zeros_like(u),
    "striped": lambda u, v: np.clip(0.5 + 2 * np.sin(2 * np.pi * (u + v) / 7), 0, 1),
    "dotted": lambda u, v: np.clip(2.5 - np.hypot(u % 6 - 3, v % 6 - 3), 0, 1),
}
"""Where the shade is dark, 0 to 1, for points in pixels: patterns that survive halving the size."""


def draw(
    image: np.ndarray,
    shape: str,
    center: tuple[float, float],
    radius: float,
    turn: float,
    color: np.ndarray,
    texture: str,
) -> None:
    """Paints one shape onto `image`, in place.

    Args:
        image: float [height, width, 3], 0 to 255.
        shape: a key of `SHAPES`.
        center: x and y in pixels.
        radius: pixels.
        turn: radians, clockwise.
        color: [3], 0 to 255.
        texture: a key of `TEXTURES`.
    """
    reach = int(np.ceil(radius)) + 2
    left, top = (max(int(c) - reach, 0) for c in center)
    window = image[top : int(center[1]) + reach + 1, left : int(center[0]) + reach + 1]
    y, x = np.mgrid[: window.shape[0], : window.shape[1]] + 0.5
    dx, dy = x + left - center[0], y + top - center[1]
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    coverage = np.clip(0.5 - SHAPES[shape](u / radius, v / radius) * radius, 0, 1)
    fill = color * (1 - 0.55 * TEXTURES[texture](u, v)[..., None])
    window += coverage[..., None] * (fill - window)


SIDE = 64
COLORS = {
    "red": (215, 30, 35), "orange": (250, 130, 10), "yellow": (240, 210, 20),
    "green": (25, 150, 55), "aqua": (20, 195, 215), "blue": (35, 65, 220),
    "purple": (130, 40, 165), "pink": (250, 130, 190),
}  # fmt: skip
BACKGROUNDS = {"white": 245, "gray": 128, "black": 18}
SIZES = {"small": 8.0, "large": 13.0}
"""Radius in pixels."""
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis (0 is x, 1 is y) and side of the first group."""
NUMBERS = {1: "one", 2: "two", 3: "three"}
SPLITS = ("train", "test")
RENDERING, ALT_TEXT, ANNOTATION = 1, 2, 3
"""Purposes of a scene's random streams."""

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT = frozenset(zip(COLORS, 2 * tuple(SHAPES)))
"""One pair per colour; every colour and every shape stays in training with others."""


@dataclass(frozen=True)
class Group:
    """One to three equal shapes."""

    color: str
    shape: str
    size: str = "large"
    texture: str = "plain"
    count: int = 1

    @property
    def noun(self) -> str:
        plural = {"cross": "crosses"}.get(self.shape, self.shape + "s")
        return self.shape if self.count == 1 else plural

    def told_as(self, adjectives: str, counted: bool = True) -> str:
        """Such as "a small star", or "two small stars", or "small stars" where not counted."""
        if self.count > 1:
            return f"{NUMBERS[self.count]} " * counted + f"{adjectives} {self.noun}"
        return f"{'an' if adjectives[0] in 'aeiou' else 'a'} {adjectives} {self.noun}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        key: (split, seed, index): the picture's identity, from which its layout is drawn.
        groups: one group, or two that differ in colour and in shape; three shapes at most in all.
        relation: where the first group lies as seen from the second; "" with one group.
        background: a key of `BACKGROUNDS`.
    """

    key: tuple[int, int, int]
    groups: tuple[Group, ...]
    relation: str
    background: str

    @property
    def uid(self) -> str:
        """32 hex digits, as DataComp's."""
        return hashlib.sha256("/".join(map(str, self.key)).encode()).hexdigest()[:32]

    @property
    def count(self) -> int:
        return sum(g.count for g in self.groups)

    @property
    def held_out(self) -> bool:
        """Whether a colour-shape pair occurs that training never sees."""
        return any((g.color, g.shape) in HELD_OUT for g in self.groups)

    def rng(self, purpose: int) -> np.random.Generator:
        """A stream of the scene's own, one per purpose, so that no draw disturbs another."""
        return np.random.default_rng([*self.key, purpose])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def sample(seed: int, index: int, split: str = "train") -> Scene:
    """The scene number `index`; a test scene holds a held-out pair, a train scene none."""
    key = (SPLITS.index(split), seed, index)
    rng = np.random.default_rng(key)
    seen = [p for p in PAIRS if p not in HELD_OUT]
    first = pick(rng, seen if split == "train" else sorted(HELD_OUT))
    pairs = [first]
    if rng.random() < 0.7:
        others = seen if split == "train" else PAIRS
        pairs.append(pick(rng, [p for p in others if p[0] != first[0] and p[1] != first[1]]))
        pairs = [pairs[i] for i in rng.permutation(2)]
    counts = pick(rng, [(1, 1), (1, 2), (2, 1)] if len(pairs) == 2 else [(1,), (2,), (3,)])
    groups = tuple(
        Group(color, shape, pick(rng, tuple(SIZES)), pick(rng, tuple(TEXTURES)), count)
        for (color, shape), count in zip(pairs, counts)
    )
    relation = pick(rng, tuple(RELATIONS)) if len(groups) == 2 else ""
    return Scene(key, groups, relation, pick(rng, tuple(BACKGROUNDS)))


def alterations(scene: Scene, fact: str) -> list[Scene]:
    """All scenes that differ in one fact, so that their description is false of this picture.

    Where the scene holds no held-out pair, none of the results does: a pair that training met only
    in negatives would be taught to be false.

    Args:
        scene: the true one.
        fact: `color`, `shape`, `size`, `texture` or `count` of one group, `relation`, `background`,
            or `swap`: the colours of two groups exchanged.

    Raises:
        ValueError: another fact.
    """
    groups = scene.groups

    def with_group(i: int, **change: object) -> Scene:
        return replace(scene, groups=(*groups[:i], replace(groups[i], **change), *groups[i + 1 :]))

    if fact == "background":
        return [replace(scene, background=b) for b in BACKGROUNDS if b != scene.background]
    if fact == "relation":
        others = [r for r in RELATIONS if scene.relation and r != scene.relation]
        return [replace(scene, relation=r) for r in others]
    if fact == "swap":
        if len(groups) == 1:
            return []
        a, b = groups
        found = [replace(scene, groups=(replace(a, color=b.color), replace(b, color=a.color)))]
    else:
        values: dict[str, Sequence] = {
            "color": tuple(COLORS), "shape": tuple(SHAPES), "size": tuple(SIZES),
            "texture": tuple(TEXTURES), "count": (1, 2, 3),
        }  # fmt: skip
        if fact not in values:
            known = ", ".join([*values, "relation", "background", "swap"])
            raise ValueError(f"fact {fact!r} is none of {known}")
        # A colour or shape that the other group has would leave two groups hard to tell apart.
        taken = {getattr(g, fact) for g in groups} if fact in ("color", "shape") else set()
        found = [
            with_group(i, **{fact: value})
            for i, group in enumerate(groups)
            for value in values[fact]
            if value != getattr(group, fact) and value not in taken
        ]
    return [s for s in found if s.count <= 3 and (scene.held_out or not s.held_out)]


def centers(scene: Scene) -> list[tuple[Group, float, float]]:
    """Where each shape goes, in pixels: two groups in two halves, one group in the middle."""
    low, middle, high = SIDE * 0.25, SIDE * 0.5, SIDE * 0.75
    if len(scene.groups) == 1:
        row = {1: [(middle, middle)], 2: [(low, middle), (high, middle)]}
        triangle = [(low, low), (high, low), (middle, high)]
        group = scene.groups[0]
        return [(group, x, y) for x, y in row.get(group.count, triangle)]
    axis, side = RELATIONS[scene.relation]
    placed = []
    for group, along in zip(scene.groups, (low, high) if side < 0 else (high, low)):
        for across in (middle,) if group.count == 1 else (low, high):
            placed.append((group, along, across) if axis == 0 else (group, across, along))
    return placed


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 [64, 64, 3]: shapes with smooth edges, jittered in place, turn and shade,
    on a background with a slope of light and some noise."""
    rng = scene.rng(RENDERING)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    slope_x, slope_y = rng.uniform(-12, 12, 2)
    light = BACKGROUNDS[scene.background] + slope_x * x + slope_y * y
    image = np.repeat(light[..., None], 3, axis=-1)
    for group, x, y in centers(scene):
        draw(
            image,
            group.shape,
            center=(x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5)),
            radius=SIZES[group.size] * rng.uniform(0.93, 1.07),
            turn=rng.uniform(-0.2, 0.2),
            color=np.array(COLORS[group.color]) + rng.uniform(-12, 12, 3),
            texture=group.texture,
        )
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(scene: Scene, form: str = "png") -> bytes:
    """The picture as a `png` or `jpg` file's bytes."""
    stream = io.BytesIO()
    picture = Image.fromarray(render(scene))
    if form == "png":
        picture.save(stream, "PNG", compress_level=1)
    else:
        picture.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()
