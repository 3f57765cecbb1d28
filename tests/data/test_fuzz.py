"""Broken bytes: every picture and record is read, or refused by the error that the loader counts.

    python -m tests.data.test_fuzz [COUNT] [SEED]

runs more of them by hand.
"""

import io
import struct
import subprocess
import sys
import time
from collections import Counter

import numpy as np
from PIL import Image, features

from hqclip_jax.data import record
from hqclip_jax.data.image import ImageError, eval_transform, load_crop, open_rgb
from hqclip_jax.data.record import Record, RecordError
from tests.conftest import make_record

SIZE = 16
MAX_PIXELS = 1_000_000  # what lies about its size may not cost a second
SLOW = 10.0  # seconds for one of them, on a busy machine


def pictures() -> dict[str, bytes]:
    """One small file of each kind."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (40, 52, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 2**16, (40, 52), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    kinds = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg with exif": (rgb, "JPEG", {"exif": exif}),
        "progressive jpeg": (rgb, "JPEG", {"progressive": True, "subsampling": 0}),
        "grey jpeg": (rgb.convert("L"), "JPEG", {}),
        "cmyk jpeg": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {}),
        "png with alpha": (alpha, "PNG", {}),
        "png with palette": (rgb.quantize(9), "PNG", {"transparency": 3}),
        "16-bit png": (deep, "PNG", {}),
        "animated png": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "webp": (rgb, "WEBP", {}),
        "lossless webp": (alpha, "WEBP", {"lossless": True, "exif": exif}),
        "animated webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "gif": (rgb.quantize(9), "GIF", {}),
        "animated gif": (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {}),
        "deflated tiff": (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg in tiff": (rgb, "TIFF", {"compression": "jpeg"}),
        "16-bit tiff": (deep, "TIFF", {"compression": "tiff_lzw"}),
    }
    if features.check("avif"):
        kinds["avif"] = (rgb, "AVIF", {"exif": exif})
    out = {}
    for name, (image, format, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        out[name] = buffer.getvalue()
    return out


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to three of: bits flipped, bytes set, numbers that lie, pieces cut, doubled, spliced."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out) + 1))
        # Headers hold what can do most harm.
        at = at % 128 if rng.random() < 0.5 else at
        length = int(rng.integers(1, 64))
        lies = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(out), SIZE)
        lie = lies[rng.integers(len(lies))]
        match rng.integers(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.integers(8)
            case 1:
                out[at : at + length] = rng.bytes(length)
            case 2:
                order, form = "<>"[rng.integers(2)], "HI"[rng.integers(2)]
                code = struct.pack(order + form, lie & (0xFFFF if form == "H" else 0xFFFFFFFF))
                out[at : at + len(code)] = code
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + 8 * length]
            case 6:
                start = int(rng.integers(len(other) + 1))
                out[at:] = other[start:]
    return bytes(out)


def read(encoded: bytes, seed: int) -> str:
    """What becomes of the bytes on the way to training and to evaluation."""
    try:
        crop = load_crop(encoded, SIZE, (0.9, 1.0), np.random.default_rng(seed), MAX_PIXELS)
        assert crop.dtype == np.uint8 and crop.shape == (SIZE, SIZE, 3)
        outcome = "read"
    except ImageError as e:
        outcome = type(e).__name__
    try:
        whole = eval_transform(open_rgb(encoded, MAX_PIXELS), SIZE)
        assert whole.dtype == np.uint8 and whole.shape == (SIZE, SIZE, 3)
    except ImageError:
        pass
    return outcome


def fuzz_images(count: int, seed: int) -> Counter:
    originals = list(pictures().items())
    outcomes: Counter = Counter()
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        kind, data = originals[i % len(originals)]
        broken = mutate(data, originals[rng.integers(len(originals))][1], rng)
        begun = time.monotonic()
        try:
            outcomes[read(broken, i)] += 1
        except Exception as e:
            raise AssertionError(f"case {i} of seed {seed}, a {kind}: {e!r}") from e
        assert time.monotonic() - begun < SLOW, f"case {i} of seed {seed}, a {kind}, takes long"
    return outcomes


def fuzz_records(count: int, seed: int) -> Counter:
    originals = [record.encode(make_record(i)) for i in range(5)]
    outcomes: Counter = Counter()
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        broken = mutate(originals[i % 5], originals[rng.integers(5)], rng)
        try:
            found = record.decode(broken)
        except RecordError:
            outcomes["RecordError"] += 1
            continue
        except Exception as e:
            raise AssertionError(f"record {i} of seed {seed}: {e!r}") from e
        check_types(found)
        outcomes["read"] += 1
    return outcomes


def check_types(found: Record) -> None:
    assert isinstance(found.image, bytes)
    assert all(isinstance(getattr(found, name), str) for name in record.STRINGS)
    assert all(isinstance(getattr(found, name), int) for name in record.INTEGERS)
    for name in record.LISTS:
        assert all(isinstance(text, str) for text in getattr(found, name))


def test_every_kind_is_read_as_it_is():
    for i, encoded in enumerate(pictures().values()):
        assert read(encoded, i) == "read"


def test_broken_records_are_read_or_refused():
    outcomes = fuzz_records(300, seed=0)
    assert outcomes["read"] > 20 and outcomes["RecordError"] > 20


def test_broken_pictures_are_read_or_refused_without_a_warning():
    # A process of its own, so that a crash in a decoder fails this test and no other. What libtiff
    # writes to stderr no one can turn off.
    command = [sys.executable, "-W", "always", "-m", "tests.data.test_fuzz", "700", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    outcomes = dict(line.split(": ") for line in done.stdout.splitlines())
    least = {"read": 100, "ImageError": 100, "TooManyPixels": 5}
    assert all(int(outcomes[name]) >= n for name, n in least.items())


if __name__ == "__main__":
    number, first = (int(a) for a in (sys.argv[1:] + ["1000", "0"])[:2])
    for name, n in (fuzz_images(number, first) + fuzz_records(number // 4, first)).items():
        print(f"{name}: {n}")
