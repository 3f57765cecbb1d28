"""Images: from encoded bytes to upright RGB, and the geometry that evaluation uses."""

import io

import numpy as np
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
