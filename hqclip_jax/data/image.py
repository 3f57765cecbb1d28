"""Images: from encoded bytes to upright RGB, and the two geometries, training and evaluation."""

import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# What web data is made of. Leaving it open would hand strangers' bytes to every plug-in of PIL,
# among them EPS, which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class ImageError(ValueError):
    """Bytes that are no usable picture; the message says why."""


def open_rgb(encoded: bytes) -> Image.Image:
    """Decodes to 8-bit RGB, upright by its EXIF orientation, transparency laid over white.

    OpenCLIP drops the alpha channel instead, which shows whatever colour hides under it, and
    leaves rotated photos lying; opaque upright pictures come out the same.

    Raises:
        ImageError: truncated, unknown or unsupported bytes, or a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        image.load()
    except Exception as e:  # PIL's readers let struct.error, SyntaxError, EOFError and more through
        raise ImageError(f"{len(encoded):,} bytes do not decode: {e}") from e
    image = _upright(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # `convert` would clip
    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of mode {image.mode!r} have no fixed range: store 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF beside good pixels: keep the pixels as they are
        return image


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
        ImageError: so long and thin that the resized picture would not fit in memory.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(size * long / short)
    if size * resized_long > Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"{width}x{height} pixels: resized, {resized_long:,} pixels long")
    resized = (size, resized_long) if width <= height else (resized_long, size)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode_fast(encoded: bytes) -> np.ndarray:
    """`open_rgb` as uint8 [h, w, 3], at libjpeg-turbo's speed where the picture is a plain JPEG.

    Raises:
        ImageError: as `open_rgb`.
    """
    # A rotated picture carries its orientation in an Exif block near the start.
    if encoded[:2] == b"\xff\xd8" and b"Exif" not in encoded[:4096]:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "Gray") and height * width <= Image.MAX_IMAGE_PIXELS:
                # Without `strict`, half a file decodes to half a picture, in silence.
                return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
        except ValueError:
            pass  # stray bytes between segments are harmless: PIL has the last word
    return np.asarray(open_rgb(encoded))


def random_resized_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """The training geometry: a random box of `scale` of the area, aspect 3:4 to 4:3, resized.

    torchvision's draw. The box is resampled by area when it shrinks, which is antialiased and
    faster than PIL's bicubic; evaluation uses `eval_transform`.

    Args:
        image: uint8 [h, w, 3].
        size: pixels of the square result.
        scale: lowest and highest share of the area.
        rng: the example's own generator.

    Returns:
        uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:  # a shape that no such box fits: the largest one that does, in the middle
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = image[top : top + h, left : left + w]
    shrinks = w > size and h > size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(box, (size, size), interpolation=how)
