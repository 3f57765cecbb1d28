"""Pairs of image and alt-text, and how they are streamed from tars as img2dataset and DataComp
write them."""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from hqclip_jax.data.text import clean
from refine.inputs.tars import BrokenTar, members, open_tar

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
# Of Pillow's many decoders, those that training reads; one of the others starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
UID = re.compile(r"[0-9a-f]{32}", re.IGNORECASE | re.ASCII)
CAPTION_COLUMNS = ("caption", "text", "txt", "alt_text", "title")  # the first there is counts
UID_COLUMNS = ("uid", "id", "key")
BROKEN = ("broken_tar", "broken_parquet")  # reasons of a Skip that stands for no single pair


@dataclass(frozen=True)
class Skip:
    """Something that did not become a record, and why.

    Attributes:
        reason: the key under which it is counted in the manifest.
        source: the input file it came from.
        key: its name inside that: a member's, a row's number, an image's path.
        uid: 32 hex digits, or "" where none could be read.
        detail: what exactly was wrong.
    """

    reason: str
    source: str = ""
    key: str = ""
    uid: str = ""
    detail: str = ""

    def line(self) -> str:
        """One line of `skipped.jsonl`, empty fields left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v}) + "\n"


@dataclass(frozen=True)
class Pair:
    """One image with its alt-text.

    Attributes:
        uid: 32 lower-case hex digits.
        image: the encoded file, byte for byte; not yet known to decode.
        caption: the alt-text, cleaned; may be empty.
        source: the input file it came from.
        key: its name inside that: a member's, a row's number, an image's path.
    """

    uid: str
    image: bytes
    caption: str
    source: str
    key: str

    def skip(self, reason: str, detail: str = "") -> Skip:
        return Skip(reason, self.source, self.key, self.uid, detail)


def uid_of(given: object, image: bytes | None, caption: str) -> str:
    """The uid of a pair that need not have one of DataComp's, 32 hex digits; a rule of ours.

    An id of 32 hex digits is the uid. Any other id, as text, gives the first 32 hex digits of its
    SHA-256; where there is none, that of the image's SHA-256 (32 bytes) and the caption does.

    Args:
        given: the id; blank text, and what is no string, bytes or whole number, counts as none.
        image: the encoded file; with None and no id the uid is "".
        caption: as received, not cleaned: the uid outlives changes in the cleaning.
    """
    if isinstance(given, bytes):
        given = given.decode("utf-8", "surrogateescape")
    text = str(given).strip() if isinstance(given, str | int) else ""
    if UID.fullmatch(text):
        return text.lower()
    if not text and image is None:
        return ""
    content = text.encode("utf-8", "surrogatepass")
    if not text:
        content = hashlib.sha256(image).digest() + caption.encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:32]


def read_skips(path: Path) -> Iterator[Skip]:
    """The lines of a `skipped.jsonl`."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield Skip(**json.loads(line))


class ImageError(Exception):
    """An image that is not trained on; `reason` is its key in the counts."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_pairs(path: Path, source: str) -> Iterator[Pair | Skip]:
    """Streams a tar's pairs in order, one at a time in memory.

    Members that follow one another and share a name up to its first dot form a pair, webdataset's
    rule. A tar that breaks off yields what it holds and then a Skip "broken_tar".

    Args:
        path: an uncompressed tar of KEY.jpg (png, webp), KEY.txt, KEY.json.
        source: the tar's name in records and in `skipped.jsonl`.

    Raises:
        RefineError: the tar can't be opened or is compressed.
    """
    with open_tar(path) as file:
        key, parts = None, {}
        broken = []
        try:
            for member in members(file):
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                if extension not in IMAGES + TEXTS:
                    continue
                kind = "image" if extension in IMAGES else extension
                if (folder, stem) != key or kind in parts:
                    if key is not None:
                        yield _pair(source, "/".join(filter(None, key)), parts)
                    key, parts = (folder, stem), {}
                file.seek(member.offset)
                parts[kind] = file.read(member.size)
        except BrokenTar as e:
            broken = [Skip("broken_tar", source, detail=str(e))]
        if key is not None:
            yield _pair(source, "/".join(filter(None, key)), parts)
        yield from broken


def _pair(source: str, key: str, parts: dict[str, bytes]) -> Pair | Skip:
    if "json" not in parts:
        return Skip("no_uid", source, key, detail="no .json file")
    try:
        meta = json.loads(parts["json"])
    except (ValueError, RecursionError) as e:
        return Skip("malformed_json", source, key, detail=str(e))
    if not isinstance(meta, dict):
        return Skip("malformed_json", source, key, detail=f"a {type(meta).__name__}, no object")
    uid = meta.get("uid")
    if not isinstance(uid, str) or not UID.fullmatch(uid):
        return Skip("no_uid", source, key, detail=f"uid is {uid!r}, not 32 hex digits"[:200])
    uid = uid.lower()
    caption = parts.get("txt", b"").decode("utf-8", "replace").strip() or meta.get("caption") or ""
    if not isinstance(caption, str):
        detail = f"caption is a {type(caption).__name__}, not a string"
        return Skip("malformed_json", source, key, uid, detail)
    if "image" not in parts:
        status = meta.get("status", "success")
        detail = "no image file" if status == "success" else f"download status {status!r}"[:200]
        return Skip("missing_image", source, key, uid, detail)
    return Pair(uid, parts["image"], clean(caption), source, key)


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Decodes an image to the last row and returns (width, height) in pixels.

    Args:
        data: the encoded file.
        max_pixels: an image whose header claims more is refused before it is decoded.

    Raises:
        ImageError: "corrupt_image" or "image_too_large".
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
    except Image.DecompressionBombError as e:
        raise ImageError("image_too_large", str(e)) from e
    except Exception as e:
        # Hostile bytes make Pillow's decoders raise almost anything: OSError, SyntaxError,
        # struct.error, IndexError.
        raise ImageError("corrupt_image", f"{type(e).__name__}: {e}") from e
    if width * height > max_pixels:
        raise ImageError("image_too_large", f"{width}x{height} pixels, more than {max_pixels:,}")
    return width, height
