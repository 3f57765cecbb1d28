import io

import numpy as np
import pytest
from PIL import Image

from hqclip_jax.data.image import ImageError, eval_transform, open_rgb


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width * 1000 + height)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def test_opaque_picture_is_untouched():
    pixels = noise(7, 5)
    assert np.array_equal(np.asarray(open_rgb(encode(Image.fromarray(pixels)))), pixels)


def test_alpha_lies_over_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 200
    pixels[0, :, 3] = 0, 255, 128
    found = np.asarray(open_rgb(encode(Image.fromarray(pixels))))
    # 200 * a + 255 * (1 - a), 0 * a + 255 * (1 - a) at a = 128/255
    assert found[0].tolist() == [[255, 255, 255], [200, 0, 0], [227, 127, 127]]


def test_transparent_palette_and_grey_keys_lie_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    found = np.asarray(open_rgb(encode(palette, transparency=0)))
    assert found[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert np.asarray(open_rgb(encode(grey, transparency=7)))[0].tolist() == [[255] * 3, [9] * 3]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(open_rgb(encode(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied_and_broken_exif_is_ignored():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255  # a white corner, top left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    found = np.asarray(open_rgb(encode(Image.fromarray(pixels), exif=exif)))
    assert found.shape == (3, 2, 3)
    assert found[0, 1].tolist() == [255] * 3
    broken = encode(Image.fromarray(pixels), exif=b"Exif\0\0garbage!")
    assert np.array_equal(np.asarray(open_rgb(broken)), pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_picture_is_refused(format):
    whole = encode(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(ImageError, match=r"bytes do not decode: .+"):
        open_rgb(whole[: len(whole) // 2])


def test_other_bytes_are_refused():
    for junk in (b"", b"<html>404</html>", encode(Image.fromarray(noise(4, 4)), "EPS")):
        with pytest.raises(ImageError, match="do not decode"):
            open_rgb(junk)
    with pytest.raises(ImageError, match="mode 'F'"):
        open_rgb(encode(Image.new("F", (2, 2)), "TIFF"))


def test_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        open_rgb(encode(Image.new("RGB", (50, 50))))
    with pytest.raises(ImageError, match="90x1 pixels: resized, 360 pixels long"):
        eval_transform(Image.new("RGB", (90, 1)), 4)


@pytest.mark.parametrize(
    "width, height, resized, corner",
    [
        (8, 8, (4, 4), (0, 0)),
        (10, 7, (5, 4), (0, 0)),  # int(4 * 10 / 7) = 5; half a pixel rounds to even: 0
        (7, 12, (4, 6), (0, 1)),  # int(4 * 12 / 7) = 6
        (15, 8, (7, 4), (2, 0)),  # int(7.5) = 7, 1.5 rounds to 2
        (3, 2, (6, 4), (1, 0)),  # smaller than the result: enlarged
    ],
)
def test_geometry_is_torchvisions(width, height, resized, corner):
    image = Image.fromarray(noise(width, height))
    found = eval_transform(image, 4)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    left, top = corner
    assert found.dtype == np.uint8
    assert np.array_equal(found, whole[top : top + 4, left : left + 4])


def test_right_sized_picture_is_not_resampled():
    pixels = noise(32, 32)
    assert np.array_equal(eval_transform(Image.fromarray(pixels), 32), pixels)
