import io

import numpy as np
import pytest
from PIL import Image

from hqclip_jax.data.image import (
    ImageError,
    decode_fast,
    eval_transform,
    open_rgb,
    random_resized_crop,
)


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


def jpeg(width: int, height: int, **options) -> bytes:
    smooth = np.kron(noise(width // 8, height // 8), np.ones((8, 8, 1), np.uint8))
    return encode(Image.fromarray(smooth), "JPEG", quality=95, **options)


def test_fast_decode_equals_the_careful_one():
    for encoded in (jpeg(64, 48), encode(Image.fromarray(noise(9, 7))), jpeg(40, 40, exif=exif(6))):
        fast, careful = decode_fast(encoded), np.asarray(open_rgb(encoded))
        assert fast.shape == careful.shape
        assert np.abs(fast.astype(int) - careful).max() <= 3


def exif(orientation: int) -> Image.Exif:
    out = Image.Exif()
    out[0x0112] = orientation
    return out


def test_fast_decode_of_grey_and_cmyk():
    grey = encode(Image.fromarray(noise(16, 16)).convert("L"), "JPEG")
    assert decode_fast(grey).shape == (16, 16, 3)
    cmyk = encode(Image.fromarray(noise(16, 16)).convert("CMYK"), "JPEG")
    assert np.array_equal(decode_fast(cmyk), np.asarray(open_rgb(cmyk)))


def test_half_a_jpeg_is_refused_by_the_fast_path_too():
    whole = encode(Image.fromarray(noise(64, 64)), "JPEG")
    for cut in (len(whole) // 2, 100, 2, 0):
        with pytest.raises(ImageError):
            decode_fast(whole[:cut])


def test_stray_bytes_after_a_jpeg_are_harmless():
    whole = encode(Image.fromarray(noise(16, 16)), "JPEG")
    assert decode_fast(whole + b"trailing").shape == (16, 16, 3)


def test_crop_of_the_whole_area_is_an_area_average():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2) * 16
    found = random_resized_crop(pixels, 2, (1.0, 1.0), FixedAspect())
    means = pixels.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - means).max() <= 1


class FixedAspect:
    """A generator whose every box is square and at the origin."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def integers(self, high: int) -> int:
        return 0


def test_crops_keep_scale_and_aspect_and_stay_inside():
    rows, columns = np.mgrid[0:200, 0:250].astype(np.uint8)
    pixels = np.stack([rows, columns, rows], axis=-1)
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        crop = random_resized_crop(pixels, 32, (0.5, 0.8), rng).astype(float)
        height = (crop[-1, :, 0] - crop[0, :, 0]).mean() * 32 / 31
        width = (crop[:, -1, 1] - crop[:, 0, 1]).mean() * 32 / 31
        areas.append(height * width / (200 * 250))
        assert 0.72 < width / height < 1.4
    assert 0.48 < min(areas) < 0.55 and 0.74 < max(areas) < 0.83


def test_a_shape_that_no_box_fits_is_cut_in_the_middle():
    thin = np.zeros((10, 1000, 3), np.uint8)
    thin[:, 490:510] = 255
    found = random_resized_crop(thin, 8, (0.9, 1.0), np.random.default_rng(0))
    assert found.shape == (8, 8, 3) and found.min() == 255
