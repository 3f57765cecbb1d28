"""Images: from encoded bytes to upright RGB, and the two geometries, training and evaluation."""

import io
import logging
import math
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image

# What web data is made of. Leaving it open would hand strangers' bytes to every plug-in of PIL,
# among them EPS, which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

MAX_PIXELS = 89_478_485  # 256 MiB as RGB: Pillow's own default
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten

ORIENTATION = 0x0112  # the EXIF tag
TURNS = dict(enumerate(
    (
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
    ),
    start=2,
))  # fmt: skip

# Decoding runs in threads already: OpenCV's own would only wait for the same cores.
cv2.setNumThreads(1)
# Among web pictures some are always odd; what is refused is counted by its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class ImageError(ValueError):
    """Bytes that are no usable picture; the message says why."""


class TooManyPixels(ImageError):
    """A picture refused for its size, before it was decoded."""


def open_rgb(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes to 8-bit RGB, upright by its EXIF orientation, transparency laid over white.

    OpenCLIP drops the alpha channel instead, which shows whatever colour hides under it, and
    leaves rotated photos lying; opaque upright pictures come out the same. Of an animation it is
    the first frame.

    Raises:
        TooManyPixels: more than `max_pixels`, by the header.
        ImageError: truncated, unknown or unsupported bytes.
    """
    try:
        image = _open(encoded, FORMATS, max_pixels)
        image.load()
        turn = _turn(image)
        return _to_rgb(image if turn is None else image.transpose(turn))
    except ImageError:
        raise
    except Exception as e:  # PIL's readers let struct.error, SyntaxError, EOFError and more through
        raise ImageError(f"{len(encoded):,} bytes do not decode: {e}") from e


def _open(encoded: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """Reads the header, and refuses what would take too much memory or time to decode."""
    # Pillow's limit stays, for what its readers allocate before they return, but never below ours.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = Image.open(io.BytesIO(encoded), formats=formats)
    except Image.DecompressionBombError as e:
        raise TooManyPixels(str(e)) from e
    _check_pixels(*image.size, max_pixels)
    if image.format == "TIFF":
        # A small picture may be one corner of a huge tile, which libtiff decodes whole.
        _check_pixels(image.tag_v2.get(322, 1), image.tag_v2.get(323, 1), max_pixels)
    if image.format in ("JPEG", "MPO"):
        _check_scans(encoded)
    return image


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"{width}x{height} pixels, more than {max_pixels:,}")


def _check_scans(encoded: bytes) -> None:
    """A few bytes make one more scan of all pixels, so a small file could take minutes."""
    code = np.frombuffer(encoded, np.uint8)
    scans = np.count_nonzero((code[:-1] == 0xFF) & (code[1:] == 0xDA))
    if scans > MAX_SCANS:
        raise ImageError(f"JPEG of {scans} scans, more than {MAX_SCANS}")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to set the picture upright; broken EXIF beside good pixels says nothing."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        grey = (pixels >> 8).astype(np.uint8)  # `convert` would clip
        grey[pixels == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of mode {image.mode!r} have no fixed range: store 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eval_transform(image: Image.Image, size: int) -> np.ndarray:
    """OpenCLIP's evaluation geometry: bicubic resize of the shorter side, centre crop.

    The roundings are torchvision's: the long side is cut down to an integer, the crop's corner is
    rounded half to even. Normalisation happens on the device.

    Args:
        image: RGB.
        size: pixels of the square result.

    Returns:
        uint8 [size, size, 3].

    Raises:
        TooManyPixels: so long and thin that the resized picture would not fit in memory.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(size * long / short)
    if size * resized_long > MAX_PIXELS:
        raise TooManyPixels(f"{width}x{height} pixels: resized, {resized_long:,} pixels long")
    resized = (size, resized_long) if width <= height else (resized_long, size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def load_crop(
    encoded: bytes,
    size: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    max_pixels: int = MAX_PIXELS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The training geometry: a random box of `scale` of the area, aspect 3:4 to 4:3, resized.

    The picture is `open_rgb`'s, at libjpeg-turbo's speed where it is a plain JPEG; `resample` is
    the faster kin of evaluation's bicubic. A function of the bytes and of what `rng` draws.

    Args:
        encoded: the file.
        size: pixels of the square result.
        scale: lowest and highest share of the area.
        rng: the example's own generator.
        max_pixels: a picture with more is refused before it is decoded.
        out: uint8 [size, size, 3], contiguous: where to put it.

    Returns:
        uint8 [size, size, 3].

    Raises:
        TooManyPixels, ImageError: as `open_rgb`.
    """
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    if not _jpeg_crop(encoded, out, scale, rng, max_pixels):
        pixels = np.asarray(open_rgb(encoded, max_pixels))
        left, top, w, h = draw_box(pixels.shape[1], pixels.shape[0], scale, rng)
        resample(pixels[top : top + h, left : left + w], out)
    return out


def _jpeg_crop(
    encoded: bytes,
    out: np.ndarray,
    scale: tuple[float, float],
    rng: np.random.Generator,
    max_pixels: int,
) -> bool:
    """False where Pillow has the last word: other formats, CMYK, or stray bytes, maybe harmless.

    A box of four times the result or more is decoded at half the size, or less, down to twice the
    result: the inverse DCT then does part of the averaging, and most of the work is never done.
    """
    if encoded[:2] != b"\xff\xd8":
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        _check_pixels(width, height, max_pixels)
        _check_scans(encoded)
        if colours not in ("YCbCr", "Gray", "RGB"):
            return False
        box = draw_box(width, height, scale, rng)
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(box[2:]) >= 2 * f * len(out))
        # Without `strict`, half a file decodes to half a picture, in silence.
        pixels = simplejpeg.decode_jpeg(
            encoded, "RGB", strict=True, min_height=-(-height // factor),
            min_width=-(-width // factor),
        )  # fmt: skip
    except ImageError:
        raise
    except ValueError:
        return False
    left, top, w, h = (edge // factor for edge in box)
    resample(pixels[top : top + h, left : left + w], out)
    # Turning the crop is turning the picture: the draw knows no up and down. Asking Pillow takes
    # longer than finding that there is nothing to ask.
    head = encoded[: encoded.find(b"\xff\xda")]
    if b"Exif\0\0" in head or b"Orientation" in head:
        turn = _turn(_open(encoded, ("JPEG",), max_pixels))
        if turn is not None:
            out[:] = Image.fromarray(out).transpose(turn)
    return True


def draw_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """torchvision's draw of a random resized crop: left, top, width, height in pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # A shape that no such box fits: the largest one that does, in the middle.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def resample(box: np.ndarray, out: np.ndarray) -> None:
    """Resizes to a square, antialiased along each axis that shrinks.

    A shrinking axis is interpolated to twice the result and averaged in pairs, which against
    Pillow's bicubic is as good as OpenCV's average over areas, to 1 dB on the sharpest pictures,
    at a third of its time. Past 2.4 pixels to one the steps would be too wide, and areas take over.

    Args:
        box: uint8 [h, w, 3], aspect 3:4 to 4:3.
        out: uint8 [size, size, 3], contiguous: where the result is put.
    """
    (h, w), size = box.shape[:2], len(out)
    shrink = math.sqrt(w * h) / size
    if shrink > 2.4:
        cv2.resize(box, (size, size), dst=out, interpolation=cv2.INTER_AREA)
        return
    # Linear is softer: too soft for a box that hardly shrinks, and right for the others.
    how = cv2.INTER_CUBIC if shrink < 1.5 else cv2.INTER_LINEAR
    finer = cv2.resize(box, (size * (1 + (w > size)), size * (1 + (h > size))), interpolation=how)
    cv2.resize(finer, (size, size), dst=out, interpolation=cv2.INTER_AREA)
