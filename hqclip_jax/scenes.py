"""The texts of rendered scenes, and the layouts of the data sets that they stand for.

Alt-texts are as poor as the web's; the annotations are the generator's own truth, which no model's
are. The writers give the demo its data and the tests their fixtures; no JAX here.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from hqclip_jax.shapes import (
    ALT_TEXT,
    ANNOTATION,
    BACKGROUNDS,
    NUMBERS,
    PAIRS,
    SIDE,
    SPLITS,
    TEXTURES,
    Group,
    Scene,
    alterations,
    encode,
    pick,
    sample,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption(scene: Scene) -> str:
    """The main facts in one phrase, such as "a large red circle left of two small blue squares"."""
    return f" {scene.relation} ".join(g.told_as(f"{g.size} {g.color}") for g in scene.groups)


def _total(scene: Scene) -> str:
    return f"{NUMBERS[scene.count]} {'shape' if scene.count == 1 else 'shapes'}"


def describe(scene: Scene) -> list[str]:
    """Four short lower-case sentences (`desc`): pairs and relation, textures, sizes, the whole.

    Joined they take 32 CLIP tokens at most.
    """
    groups = scene.groups
    return [
        f" {scene.relation} ".join(g.told_as(g.color) for g in groups),
        " and ".join(g.told_as(g.texture, counted=False) for g in groups),
        " and ".join(g.told_as(g.size, counted=False) for g in groups),
        f"{_total(scene)} on {scene.background}",
    ]


def contradict(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene of which every sentence of `describe` is false here.

    One fact changes for each sentence, but what is told stays one picture: a text that contradicts
    itself could be told from the true one without a look at the image.
    """
    for facts in (
        ("color", "shape", "relation", "swap"),
        ("texture",),
        ("size",),
        ("count", "background"),
    ):
        scene = pick(rng, pick(rng, [a for fact in facts if (a := alterations(scene, fact))]))
    return scene


def tags(scene: Scene) -> list[str]:
    """`tags`: colours, shapes, pairs, textures, the count and the background."""
    found = []
    for g in scene.groups:
        found += [f"{g.color} {g.shape}", g.color, g.shape, f"{g.texture} {g.shape}"]
    return [*found, _total(scene), f"{scene.background} background"]


ALT_TEXTS = {"full": 0.25, "partial": 0.35, "coarse": 0.15, "file": 0.15, "unrelated": 0.1}
"""How much of the picture an alt-text tells, and how often: our choice, made before any training
and not tuned to its results."""
DECORATIONS = (
    "{}", "{} clipart", "Buy {} online", "{} - stock illustration", "{} | Free Vector",
    "Vector image of {}", "{} &amp; more shapes", "{} (set of 12)", "{} PNG transparent",
)  # fmt: skip
COARSE = (
    "geometric shapes", "abstract background", "colorful shapes for kids", "simple icon",
    "{} shapes", "{} abstract art", "something {}",
)  # fmt: skip
FILES = ("IMG_{n:04d}.JPG", "DSC{n:05d}", "{color}_{shape}-{n}.png", "{shape}.jpg")
UNRELATED = (
    "Home", "click to enlarge", "Free shipping on orders over $50", "logo", "loading...",
    "Subscribe to our newsletter", "product image", "Share on Facebook",
)  # fmt: skip


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """What a web page might say: decorated, partial, a file name, or nothing to do with it."""
    kind = rng.choice(list(ALT_TEXTS), p=list(ALT_TEXTS.values()))
    group = pick(rng, scene.groups)
    if kind == "unrelated":
        return pick(rng, UNRELATED)
    if kind == "coarse":
        return pick(rng, COARSE).format(group.color)
    if kind == "file":
        n = int(rng.integers(1, 10_000))
        return pick(rng, FILES).format(n=n, color=group.color, shape=group.shape)
    told = caption(scene)
    if kind == "partial":
        pair = f"{group.color} {group.noun}"
        told = pick(rng, (pair, pair, f"{group.texture} {group.noun}", f"{group.size} {pair}"))
    told = told.title() if rng.random() < 0.3 else told
    return pick(rng, DECORATIONS).format(told)


def annotation(scene: Scene, negative: Scene | None = None) -> dict[str, list[str]]:
    """The four lists of a published annotation; of the negative tags those that are false.

    Args:
        scene: the true one.
        negative: one of which every sentence is false here; by default `contradict` draws it.
    """
    negative = negative or contradict(scene, scene.rng(ANNOTATION))
    true = tags(scene)
    return {
        "tags": true,
        "neg_tags": [tag for tag in tags(negative) if tag not in true],
        "desc": describe(scene),
        "neg_desc": describe(negative),
    }


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes members in order, under a temporary name until whole; equal input, equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with tarfile.open(partial, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    partial.replace(path)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def write_pairs(
    directory: str | Path, count: int, seed: int = 0, split: str = "train", shard: int = 1000
) -> None:
    """Writes tars as img2dataset does: KEY.jpg, KEY.txt (the alt-text) and KEY.json."""

    def members(start: int) -> Iterator[tuple[str, bytes]]:
        for index in range(start, min(start + shard, count)):
            scene = sample(seed, index, split)
            key = f"{start // shard:05d}{index - start:04d}"
            text, image = alt_text(scene, scene.rng(ALT_TEXT)), encode(scene, "jpg")
            about = {
                "uid": scene.uid, "caption": text, "key": key, "status": "success",
                "width": SIDE, "height": SIDE, "sha256": hashlib.sha256(image).hexdigest(),
            }  # fmt: skip
            yield f"{key}.jpg", image
            yield f"{key}.txt", text.encode()
            yield f"{key}.json", _json(about)

    for start in range(0, count, shard):
        _write_tar(Path(directory) / f"{start // shard:05d}.tar", members(start))


def write_annotations(
    directory: str | Path,
    count: int,
    seed: int = 0,
    split: str = "train",
    missing: float = 0.02,
    shard: int = 1000,
    annotate: Callable[[Scene], dict[str, list[str]]] = annotation,
) -> None:
    """Writes tars in the published layout, NNNNNN/<uid>.json, in another order than the pairs.

    A share `missing` of the scenes has no annotation, as in the wild.
    """
    order = np.random.default_rng([seed, count]).permutation(count)
    kept = order[: count - round(missing * count)]
    for start in range(0, len(kept), shard):
        name = f"{start // shard:06d}"
        scenes = [sample(seed, int(i), split) for i in kept[start : start + shard]]
        _write_tar(
            Path(directory) / f"{name}.tar",
            ((f"{name}/{s.uid}.json", _json(annotate(s))) for s in scenes),
        )


def write_zeroshot(
    directory: str | Path,
    per_class: int = 5,
    seed: int = 1,
    pairs: Iterable[tuple[str, str]] = PAIRS,
) -> None:
    """Writes a zero-shot set as CLIP_benchmark lays it out: one large shape to name among all 48.

    Args:
        directory: gets `classnames.txt`, `zeroshot_classification_templates.txt` and `test/`.
        per_class: pictures of each pair.
        seed: of textures, backgrounds and layout.
        pairs: which classes have pictures; the class names are always all 48.
    """
    directory = Path(directory)
    textures, backgrounds = tuple(TEXTURES), tuple(BACKGROUNDS)

    def members() -> Iterator[tuple[str, bytes]]:
        for n, (color, shape) in enumerate(p for p in pairs for _ in range(per_class)):
            key = (len(SPLITS), seed, n)
            rng = np.random.default_rng(key)
            group = Group(color, shape, "large", pick(rng, textures))
            scene = Scene(key, (group,), "", pick(rng, backgrounds))
            yield f"s{n:07d}.png", encode(scene)
            yield f"s{n:07d}.cls", str(PAIRS.index((color, shape))).encode()

    _write_tar(directory / "test" / "0.tar", members())
    (directory / "test" / "nshards.txt").write_text("1\n")
    (directory / "classnames.txt").write_text("\n".join(map(" ".join, PAIRS)) + "\n")
    templates = ("a {c}", "a large {c}", "{c} clipart")
    (directory / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


def paraphrases(scene: Scene) -> list[str]:
    """Two captions that no training text has word for word; the second is told the other way."""
    ground = f"{scene.background} background"
    turned = replace(scene, groups=scene.groups[::-1], relation=OPPOSITE.get(scene.relation, ""))
    return [f"{caption(scene)} on a {ground}", f"on a {ground}, {caption(turned)}"]


def write_retrieval(directory: str | Path, count: int, seed: int = 1, split: str = "test") -> None:
    """Writes one tar of KEY.png and KEY.json {"captions": [...]}; no caption fits two pictures."""

    def members() -> Iterator[tuple[str, bytes]]:
        seen: set[str] = set()
        index = -1
        for n in range(count):
            captions = None
            while captions is None or seen.intersection(captions):
                index += 1
                scene = sample(seed, index, split)
                captions = paraphrases(scene)
            seen.update(captions)
            yield f"{n:09d}.png", encode(scene)
            yield f"{n:09d}.json", _json({"captions": captions})

    _write_tar(Path(directory) / "00000.tar", members())


CATEGORIES = ("color", "shape", "size", "count", "relation", "swap")


def write_hard_negatives(
    directory: str | Path, count: int, seed: int = 2, split: str = "test"
) -> None:
    """Writes one tar of KEY.png and KEY.json {"caption", "negative_caption", "category"}.

    The two captions differ in one fact, the category; the categories take turns over scenes of two
    groups.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        index, n = -1, 0
        while n < count:
            index += 1
            scene, category = sample(seed, index, split), CATEGORIES[n % len(CATEGORIES)]
            altered = alterations(scene, category)
            if len(scene.groups) == 1 or not altered:
                continue
            negative = caption(pick(scene.rng(ANNOTATION), altered))
            about = {
                "caption": caption(scene), "negative_caption": negative, "category": category
            }  # fmt: skip
            yield f"{n:09d}.png", encode(scene)
            yield f"{n:09d}.json", _json(about)
            n += 1

    _write_tar(Path(directory) / "00000.tar", members())
