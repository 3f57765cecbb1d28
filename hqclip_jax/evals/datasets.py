"""Readers of evaluation sets, streaming from tars: images pass, labels and texts stay.

Here: tars, their captions as img2dataset writes them, and tars with a hard negative beside each
caption. Classes are read by `classification`, `folders` and `tfds`, captions beside a folder of
images by `folders`; a fine-grained set's own layout stands in its module, and gets its images from
`read_files`.

What one image lacks is counted in `Skips` and left out; what the set lacks is an `EvalDataError`.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hqclip_jax.data.image import open_rgb
from hqclip_jax.evals.outcome import Skips

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset's key: up to the name's first dot


class EvalDataError(ValueError):
    """An evaluation set that is missing or broken; the message names the file and the mend."""


@dataclass(frozen=True)
class Example:
    """An encoded image and where it came from, for error messages."""

    source: str
    image: bytes

    def rgb(self) -> Image.Image:
        """What the model is to see, upright. Raises ImageError."""
        return open_rgb(self.image)


@dataclass(frozen=True)
class Labelled(Example):
    """`metadata`: what the set says of the image beside its class, such as where it was taken."""

    label: int
    metadata: tuple[int, ...] = ()


@dataclass(frozen=True)
class Captioned(Example):
    captions: tuple[str, ...]


class Region(NamedTuple):
    """A picture by the name of its file, or the part of it in a box: x, y, width and height."""

    file: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Item:
    """A question of a fine-grained set.

    Attributes:
        key: unique in the set.
        images: one; or several, the i-th of which belongs to the i-th right text.
        right: texts that are true of the image.
        wrong: texts that are not.
        category: in what right and wrong differ; "" where the set doesn't say.
    """

    key: str
    images: tuple[Region, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class Pictured(Example):
    """A picture and the items of which it is the first image."""

    region: Region
    items: tuple[Item, ...] = ()

    def rgb(self) -> Image.Image:
        image = super().rgb()
        if self.region.box is None:
            return image
        x, y, width, height = self.region.box
        return image.crop((x, y, x + width, y + height))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise EvalDataError(f"{path} is missing") from e
    except UnicodeDecodeError as e:
        raise EvalDataError(f"{path} is not UTF-8 text: {e}") from e


def read_json(text: str | bytes, source: str) -> dict | list:
    try:
        return json.loads(text)
    except ValueError as e:
        raise EvalDataError(f"{source} is not JSON: {e}") from e


def load_json(path: Path) -> dict | list:
    """Raises EvalDataError: the file is missing or no JSON."""
    return read_json(read_text(path), str(path))


def tar_files(path: str | Path, split: str = "test") -> list[Path]:
    """The tars of a set: one tar, a folder of tars, or CLIP_benchmark's `test/0.tar` and on.

    Raises:
        EvalDataError: nothing there, or fewer tars than `nshards.txt` promises.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise EvalDataError(f"{path} is missing")
    count = path / split / "nshards.txt"
    if not count.exists():
        if tars := sorted(path.glob("*.tar")):
            return tars
        raise EvalDataError(f"{path} holds neither {split}/nshards.txt nor a .tar")
    text = read_text(count).strip()
    if not text.isdecimal() or int(text) == 0:
        raise EvalDataError(f"{count} holds {text[:40]!r}: write the number of tars beside it")
    tars = [path / split / f"{i}.tar" for i in range(int(text))]
    if missing := [t.name for t in tars if not t.exists()]:
        raise EvalDataError(
            f"{count} promises {len(tars)} tars, missing beside it: {', '.join(missing[:8])}"
            + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        )
    return tars


def read_tar(path: Path, skips: Skips) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (source, {lower-case suffix: bytes}) for each run of members with one key.

    A tar that is empty, no tar or cut short is one skip; what stands before the cut is read.
    """
    key, sample, count = "", {}, 0
    try:
        # A name that is no UTF-8 would end up in logs and JSON as half a character.
        with tarfile.open(path, "r|", errors="backslashreplace") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                if not member.isfile() or not match:
                    continue
                if sample and match[1] != key:
                    yield f"{path}:{key}", sample
                    sample = {}
                key = match[1]
                sample[match[2].lower()] = tar.extractfile(member).read()
                count += 1
            end = tar.offset
    except tarfile.TarError as e:
        skips.add("tar is cut short or no uncompressed tar", f"{path}: {e}")
        return  # the last sample may lack members
    with path.open("rb") as file:
        file.seek(end)
        # `tarfile` takes a broken header, or no more bytes, for a complete archive's end.
        if file.read(1024) != bytes(1024):
            skips.add("tar is cut short or no uncompressed tar", f"{path} at byte {end:,}")
            return
    if sample:
        yield f"{path}:{key}", sample
    if not count:
        skips.add("tar is empty", str(path))


def image_of(source: str, sample: dict[str, bytes], skips: Skips) -> bytes | None:
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return sample[suffix]
    skips.add(f"no image (.{', .'.join(IMAGE_SUFFIXES)})", f"{source}: only .{', .'.join(sample)}")
    return None


def _metadata(source: str, sample: dict[str, bytes]) -> dict:
    stored = read_json(sample.get("json", b"{}"), source + ".json")
    if not isinstance(stored, dict):
        raise EvalDataError(f"{source}.json is not a JSON object")
    return stored


def _captions(stored: dict) -> tuple[str, ...]:
    captions = stored.get("captions") or [stored.get("caption") or ""]
    return tuple(c.strip() for c in captions if c.strip())


def read_captioned(path: str | Path, skips: Skips) -> Iterator[Captioned]:
    """Images with one or more captions each.

    The captions are `captions` or `caption` of `KEY.json`, else the lines of `KEY.txt`, as
    CLIP_benchmark's retrieval sets have them.
    """
    for tar in tar_files(path):
        for source, sample in read_tar(tar, skips):
            captions = _captions(_metadata(source, sample))
            if not captions:
                lines = sample.get("txt", b"").decode(errors="replace").splitlines()
                captions = tuple(line.strip() for line in lines if line.strip())
            if not captions:
                skips.add("no caption: neither `captions` or `caption` in .json, nor .txt", source)
            elif (image := image_of(source, sample, skips)) is not None:
                yield Captioned(source, image, captions)


def read_contrasted(path: str | Path, skips: Skips) -> Iterator[Pictured]:
    """Tars of `KEY.jpg` and `KEY.json` with `negative_caption` and `caption` (or `captions`, of
    which the first is taken), and perhaps `category`.

    Raises:
        EvalDataError: a `.json` without one of the texts.
    """
    for tar in tar_files(path):
        for source, sample in read_tar(tar, skips):
            stored = _metadata(source, sample)
            stored["caption"] = next(iter(_captions(stored)), "")
            right = text_of(stored, "caption", f"{source}.json")
            wrong = text_of(stored, "negative_caption", f"{source}.json")
            region = Region(source)
            item = Item(source, (region,), (right,), (wrong,), stored.get("category", ""))
            if (image := image_of(source, sample, skips)) is not None:
                yield Pictured(source, image, region, (item,))


def text_of(item: dict, field: str, source: str) -> str:
    """An item's text. Raises EvalDataError where it has none."""
    text = item.get(field) if isinstance(item, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise EvalDataError(f"{source} has no `{field}`: {str(item)[:80]}")
    return text.strip()


def read_files(where: Path, files: Iterable[str], skips: Skips) -> Iterator[tuple[str, str, bytes]]:
    """Yields (file, source, image) for each of the named files that is there.

    Args:
        where: the folder of those files, or tars whose keys are their names without suffix.
        files: paths under `where`, each once.
    """
    missing = "an item's image is missing"
    if where.is_dir() and not any(where.glob("*.tar")):
        for file in files:
            if (where / file).is_file():
                yield file, str(where / file), (where / file).read_bytes()
            else:
                skips.add(missing, str(where / file))
        return
    waiting = {str(Path(file).with_suffix("")): file for file in files}
    stems = Counter(Path(key).name for key in waiting)
    # A tar may lie flat, or in other folders, as long as the names alone tell the files apart.
    by_stem = {Path(key).name: key for key in waiting if stems[Path(key).name] == 1}
    for tar in tar_files(where):
        for source, sample in read_tar(tar, skips):
            key = source.removeprefix(f"{tar}:")
            key = key if key in waiting else by_stem.get(Path(key).name, "")
            if key in waiting and (image := image_of(source, sample, skips)) is not None:
                yield waiting.pop(key), source, image
    for file in waiting.values():
        skips.add(missing, f"{where}: {file}")
