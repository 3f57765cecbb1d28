import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from hqclip_jax.data import image
from hqclip_jax.data.image import (
    ImageError,
    TooManyPixels,
    draw_box,
    eval_transform,
    load_crop,
    open_rgb,
    resample,
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
    coloured = cv2.imencode(".png", np.array([[[65535, 32768, 256]]], np.uint16))[1].tobytes()
    assert np.asarray(open_rgb(coloured))[0].tolist() == [[1, 128, 255]]


def test_sixteen_bit_grey_key_lies_over_white():
    png = encode(Image.fromarray(np.array([[7, 256 * 9]], np.uint16)))
    key = b"tRNS" + struct.pack(">H", 7)
    chunk = struct.pack(">I", 2) + key + zlib.crc32(key).to_bytes(4)
    assert np.asarray(open_rgb(png[:33] + chunk + png[33:]))[0, :, 0].tolist() == [255, 9]


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


def load(encoded: bytes, size: int = 8, max_pixels: int = 10**6, seed: int = 0) -> np.ndarray:
    return load_crop(encoded, size, (0.9, 1.0), np.random.default_rng(seed), max_pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_bomb_is_refused_by_its_header(format):
    encoded = encode(Image.new("RGB", (50, 40)), format)
    for read in (open_rgb, lambda e, n: load(e, max_pixels=n)):
        read(encoded, 2000)
        with pytest.raises(TooManyPixels, match="50x40 pixels, more than 1,999"):
            read(encoded, 1999)


def test_the_header_is_enough_to_refuse():
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + zlib.crc32(header).to_bytes(4)
    half_jpeg = encode(Image.new("RGB", (90, 80)), "JPEG")[:700]
    for encoded in (png + b"\0\0\0\0IDAT", half_jpeg):
        with pytest.raises(TooManyPixels):
            load(encoded, max_pixels=7000)


def test_pillows_own_limit_neither_warns_nor_refuses(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for format in ("JPEG", "PNG", "GIF", "WEBP"):
        assert load(encode(Image.new("RGB", (50, 50)), format), max_pixels=2500).shape == (8, 8, 3)


def test_animation_larger_than_its_first_frame_claims_is_refused():
    frames = [Image.new("P", (60, 60), i) for i in range(3)]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2)
    small = gif[:6] + struct.pack("<HH", 2, 2) + gif[10:]
    with pytest.raises(TooManyPixels):
        open_rgb(small, 3000)
    assert open_rgb(gif, 3600).size == (60, 60)


def test_small_picture_in_a_huge_tile_is_refused():
    size, grey8 = [(256, 4, 20), (257, 4, 20)], [(258, 3, 8), (259, 3, 8), (262, 3, 1)]
    tile = [(322, 4, 20_000), (323, 4, 20_000), (324, 4, 0), (325, 4, 100)]
    fields = size + grey8 + tile
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + directory + bytes(104)
    with pytest.raises(TooManyPixels, match="20000x20000"):
        open_rgb(tiff, 10**6)


def test_endless_scans_are_refused(monkeypatch):
    monkeypatch.setattr(image.simplejpeg, "decode_jpeg", None)  # not to be called
    whole = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    for read in (open_rgb, load):
        with pytest.raises(ImageError, match="scans, more than 100"):
            read(whole[:-2] + last * 200 + whole[-2:])


def test_too_long_a_picture_is_not_resized_for_evaluation():
    with pytest.raises(TooManyPixels, match="90000x1 pixels: resized, 20,160,000 pixels long"):
        eval_transform(Image.new("RGB", (90_000, 1)), 224)


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


def exif(orientation: int) -> Image.Exif:
    out = Image.Exif()
    out[0x0112] = orientation
    return out


WHOLE = (1.0, 1.0)


class FixedAspect:
    """A generator whose every box is square and at the origin."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def integers(self, high: int) -> int:
        return 0


def whole(encoded: bytes, size: int) -> np.ndarray:
    """The crop that is all of a square picture."""
    return load_crop(encoded, size, WHOLE, FixedAspect()).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_jpegs_are_upright_as_the_careful_ones(orientation):
    encoded = jpeg(64, 64, exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))).astype(int)
    assert np.array_equal(np.asarray(open_rgb(encoded)), upright)
    assert np.abs(whole(encoded, 64) - upright).max() <= 3


def test_orientation_is_found_in_xmp_and_behind_other_segments():
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for options in ({"xmp": packet}, {"exif": exif(6), "icc_profile": bytes(60_000)}):
        encoded = jpeg(64, 64, **options)
        upright = np.asarray(Image.open(io.BytesIO(encoded)).transpose(Image.Transpose.ROTATE_270))
        assert np.abs(whole(encoded, 64) - upright).max() <= 3


def test_grey_and_cmyk_jpegs():
    grey = Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16))
    found = whole(encode(grey, "JPEG", quality=100), 16)
    assert np.abs(found - np.asarray(grey)[..., None]).max() <= 2
    # Ink as Photoshop writes it, inverted and with Adobe's marker; Pillow writes it so too.
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 51))
    cmyk = encode(inks, "JPEG", quality=100)
    assert b"Adobe" in cmyk
    assert np.abs(whole(cmyk, 16) - [0, 204, 204]).max() <= 2


def test_half_a_jpeg_is_refused_for_training_too():
    whole_file = encode(Image.fromarray(noise(64, 64)), "JPEG")
    for cut in (len(whole_file) // 2, 100, 2, 0):
        with pytest.raises(ImageError):
            load(whole_file[:cut])


def test_stray_bytes_after_a_jpeg_are_harmless():
    assert load(encode(Image.fromarray(noise(16, 16)), "JPEG") + b"trailing").shape == (8, 8, 3)


def scene(width: int, height: int) -> np.ndarray:
    """Waves in all directions, down to two and a half pixels: what aliases does it here."""
    y, x = np.mgrid[0:height, 0:width]
    waves = sum(
        np.sin(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / n)
        for n in (2.5, 3, 4, 5, 9, 17, 40, 90)
        for a in np.arange(0, np.pi, 0.7)
    )
    grey = 128 + 100 * waves / np.abs(waves).max()
    return np.stack([grey, 255 - grey, grey * 0.5], axis=-1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize(
    "width, height", [(70, 70), (96, 80), (96, 120), (110, 96), (130, 140), (200, 180), (230, 260)]
)
def test_resampling_is_as_antialiased_as_pillows(width, height):
    pixels = scene(width, height)
    found = np.zeros((96, 96, 3), np.uint8)
    resample(pixels, found)
    bicubic = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC))
    areas = cv2.resize(pixels, (96, 96), interpolation=cv2.INTER_AREA)
    assert psnr(found, bicubic) > max(42, psnr(areas, bicubic) - 0.5)


@pytest.mark.parametrize("width, height, factor", [(380, 380, 1), (400, 400, 2), (1000, 900, 4)])
def test_large_jpegs_are_decoded_smaller_and_look_the_same(width, height, factor, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        image, "resample", lambda box, out: (shapes.append(box.shape), resample(box, out))
    )
    encoded = encode(Image.fromarray(scene(width, height)), "JPEG", quality=95)
    found = load_crop(encoded, 96, WHOLE, FixedAspect())
    h, w, _ = shapes[0]
    assert max(h, w) * factor <= max(width, height) < (max(h, w) + 60) * factor
    assert min(h, w) >= 192
    full = open_rgb(encoded).crop((0, 0, w * factor, h * factor))
    assert psnr(found, np.asarray(full.resize((96, 96), Image.Resampling.BICUBIC))) > 36


@pytest.mark.parametrize("width, height", [(400, 320), (96, 96), (40, 32), (1000, 900)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "turned"])
def test_the_crop_is_put_where_it_is_told(width, height, form):
    picture = Image.fromarray(scene(width, height))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"format": "JPEG", "exif": exif} if form == "turned" else {"format": form}
    encoded = encode(picture, **options)
    rows = np.zeros((3, 96, 96, 3), np.uint8)
    rng = np.random.default_rng
    found = load_crop(encoded, 96, WHOLE, rng(1), out=rows[1])
    assert found.base is rows and not rows[[0, 2]].any()
    assert np.array_equal(rows[1], load_crop(encoded, 96, WHOLE, rng(1)))


def test_the_crop_is_a_function_of_bytes_and_draw():
    for encoded in (jpeg(400, 320), encode(Image.fromarray(noise(40, 32)))):
        assert np.array_equal(load(encoded, seed=3), load(encoded, seed=3))
        assert not np.array_equal(load(encoded, seed=3), load(encoded, seed=4))


def test_crops_keep_scale_and_aspect_and_stay_inside():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(250, 200, (0.5, 0.8), rng) for _ in range(500)])
    left, top, w, h = boxes.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + w).max() <= 250 and (top + h).max() <= 200
    shares, aspects = w * h / 50_000, w / h
    assert 0.49 < shares.min() < 0.52 and 0.78 < shares.max() < 0.81
    assert 0.74 < aspects.min() < 0.77 and 1.31 < aspects.max() < 1.34


def test_a_shape_that_no_box_fits_is_cut_in_the_middle():
    thin = np.zeros((10, 1000, 3), np.uint8)
    thin[:, 490:510] = 255
    found = load_crop(encode(Image.fromarray(thin)), 8, (0.9, 1.0), np.random.default_rng(0))
    assert found.shape == (8, 8, 3) and found.min() == 255
    assert load(encode(Image.fromarray(noise(1, 1)))).shape == (8, 8, 3)
