"""Pictures as a model gets them: decoded, upright, opaque, no larger than asked."""

import io
import math

from PIL import Image, ImageOps

from refine.inputs.pairs import FORMATS, ImageError


def prepared(data: bytes, skip_pixels: int, max_pixels: int) -> Image.Image:
    """Decodes a picture and makes it small.

    Args:
        data: the encoded file.
        skip_pixels: a picture whose header claims more is refused before it is decoded.
        max_pixels: the result has no more; a picture that has fewer keeps its size.

    Returns:
        RGB, turned upright by EXIF, transparency over white.

    Raises:
        ImageError: "corrupt_image" or "image_too_large".
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > skip_pixels:
                raise ImageError(
                    "image_too_large", f"{width}x{height} pixels, more than {skip_pixels:,}"
                )
            # libjpeg scales by halves while it decodes, at a fraction of the time.
            image.draft("RGB", fitted(width, height, 4 * max_pixels))
            return _shrunk(_opaque(ImageOps.exif_transpose(image)), max_pixels)
    except Image.DecompressionBombError as e:
        raise ImageError("image_too_large", str(e)) from e
    except ImageError:
        raise
    except Exception as e:  # hostile bytes make Pillow's decoders raise almost anything
        raise ImageError("corrupt_image", f"{type(e).__name__}: {e}") from e


def fitted(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of about the same shape with at most `max_pixels`; never enlarges."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    wide, high = max(1, int(width * scale)), max(1, int(height * scale))
    # A strip that is one pixel high may still be too long.
    return (min(wide, max_pixels // high), high) if wide >= high else (
        wide, min(high, max_pixels // wide)
    )  # fmt: skip


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    size = fitted(*image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        image = image.point(lambda value: value / 256).convert("L")
    return image.convert("RGB")
