import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refine.inputs.pairs import ImageError
from refine.inputs.pictures import fitted, prepared


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 10**6))
def test_fitted_is_as_large_as_allowed_and_keeps_the_shape(width, height, most):
    wide, high = fitted(width, height, most)
    assert 1 <= wide <= width and 1 <= high <= height and wide * high <= most
    if width * height <= most:
        assert (wide, high) == (width, height)
    scale = math.sqrt(most / (width * height))
    if scale < 1 and min(width, height) * scale > 20:
        assert wide / high == pytest.approx(width / height, rel=0.06)
        assert wide * high > 0.9 * most


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_shrunk_to_the_limit_and_stays_the_same_picture(kind):
    data = encoded(ramp(400, 200), kind)
    image = prepared(data, 10**6, 5_000)
    assert image.mode == "RGB" and image.size == (100, 50)
    expected = np.asarray(ramp(400, 200).resize((100, 50), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(image, float) - expected).mean() < 4
    assert prepared(data, 10**6, 80_000).size == (400, 200)
    assert prepared(data, 10**6, 10**6).size == (400, 200)  # never enlarged


def test_exif_turns_it_and_transparency_lies_over_white():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    turned = prepared(encoded(ramp(40, 20), "JPEG", exif=exif), 10**6, 10**6)
    assert turned.size == (20, 40)
    assert turned.getpixel((19, 0))[0] < 40 and turned.getpixel((19, 39))[0] > 215
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert prepared(encoded(clear, "PNG"), 100, 100).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([9, 9, 9] * 256)
    data = encoded(palette, "PNG", transparency=3)
    assert prepared(data, 100, 100).getpixel((4, 4)) == (255, 255, 255)


def test_grey_cmyk_and_sixteen_bits():
    grey = prepared(encoded(Image.new("L", (8, 8), 100), "JPEG"), 100, 100)
    assert grey.getpixel((4, 4)) == (100, 100, 100)
    deep = Image.fromarray(np.full((8, 8), 100 << 8, np.uint16))
    assert prepared(encoded(deep, "PNG"), 100, 100).getpixel((4, 4)) == (100, 100, 100)
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = prepared(cmyk, 100, 100).getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt_image"),
        (b"\xff\xd8 no picture", "corrupt_image"),
        (encoded(ramp(40, 40), "EPS"), "corrupt_image"),  # its decoder is another program
        (encoded(ramp(40, 40), "JPEG")[:-60], "corrupt_image"),
        (encoded(ramp(40, 40), "PNG")[:100], "corrupt_image"),
        (encoded(ramp(200, 60), "PNG"), "image_too_large"),
    ],
)
def test_what_cannot_be_shown_has_a_reason(data, reason):
    with pytest.raises(ImageError) as e:
        prepared(data, 10_000, 100)
    assert e.value.reason == reason
