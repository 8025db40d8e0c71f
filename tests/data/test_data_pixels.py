"""Decoding, crops and conversions, against Pillow, NumPy and arithmetic done by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from skimage import data as photos

from hieratok.core.pixels import decode_image
from hieratok.data.images import BadImageError, center_crop, random_resized_crop, to_float, to_uint8

ROCKET = photos.rocket()  # (427, 640, 3)


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def small_photo(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(ROCKET).resize((width, height))


def pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) -> (H, W, 3)."""
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


# --- decoding


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_has_the_pixels_that_pillow_gives(mode, options):
    data = encode(small_photo().convert(mode), "JPEG", **options)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(decode_image(data, "x")), expected)


def test_jpeg_without_torchvisions_decoder(monkeypatch):
    data = encode(small_photo(), "JPEG")
    fast = decode_image(data, "x")

    def gone(*_):
        raise AttributeError

    monkeypatch.setattr(torch.ops.image, "decode_jpeg", gone)
    assert torch.equal(decode_image(data, "x"), fast)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(kind):
    picture = small_photo()
    data = encode(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(decode_image(data, "x")), np.array(picture))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    picture = small_photo()
    decoded = pixels(decode_image(encode(picture, "AVIF", quality=95), "x"))
    assert np.abs(decoded.astype(int) - np.array(picture)).mean() < 3


# Orientation tag -> what undoes it, on (H, W, 3).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(small_photo(), kind, exif=exif)
    stored = np.array(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(decode_image(data, "x")), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_rounded_to_8_bits(kind):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = pixels(decode_image(encode(Image.fromarray(levels), kind), "x"))
    np.testing.assert_array_equal(decoded, np.repeat(np.round(levels / 257).astype(np.uint8)[..., None], 3, axis=2))


def test_grey_palette_and_bilevel_become_rgb():
    photo = small_photo()
    for mode in ("L", "P", "1"):
        picture = photo.convert(mode)
        np.testing.assert_array_equal(
            pixels(decode_image(encode(picture, "PNG"), "x")), np.array(picture.convert("RGB"))
        )


def test_transparent_parts_lie_on_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]  # opaque, clear, a fifth
    decoded = pixels(decode_image(encode(Image.fromarray(rgba), "PNG"), "x"))
    np.testing.assert_array_equal(decoded[0], [[200, 100, 0], [255, 255, 255], [244, 224, 204]])


def test_transparent_palette_and_grey_lie_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    decoded = pixels(decode_image(encode(palette, "PNG", transparency=1), "x"))
    np.testing.assert_array_equal(decoded[0], [[10, 20, 30], [255, 255, 255]])
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], dtype=np.uint8), "LA")
    np.testing.assert_array_equal(pixels(decode_image(encode(grey, "PNG"), "x"))[0], [[7] * 3, [255] * 3])


def refused(data: bytes) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, "holiday/x.png")
    message = str(caught.value)
    assert message.startswith("cannot read holiday/x.png: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_truncated_jpeg_is_not_half_grey(options, share):
    data = encode(Image.fromarray(ROCKET), "JPEG", **options)
    assert "truncated" in refused(data[: int(share * len(data))]).lower()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_of_other_formats(kind, share):
    data = encode(small_photo(), kind)
    refused(data[: int(share * len(data))])


def test_files_that_are_no_images():
    assert "empty" in refused(b"")
    assert "not an image" in refused(b"These are not the pixels you are looking for.\n" * 100)
    assert "not an image" in refused(bytes(1000))


def test_postscript_is_not_handed_to_another_program():
    assert "not an image" in refused(encode(small_photo(), "EPS"))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_decompression_bombs_are_refused_before_they_are_decoded():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    assert refused(bomb) == "cannot read holiday/x.png: it has more than 134,217,728 pixels"

    jpeg = bytearray(encode(small_photo(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")  # marker, length (2), precision (1), height (2), width (2)
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 50_000, 50_000)
    assert "more than 134,217,728 pixels" in refused(bytes(jpeg))


def test_pixels_without_a_known_range_are_refused():
    assert "range" in refused(encode(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))
    assert "range" in refused(encode(Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32)), "TIFF"))


VALID = [encode(small_photo(24, 16), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(VALID), st.data())
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on damaged metadata
def test_damaged_bytes_give_an_image_or_the_one_error(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    damaged = damaged[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else damaged
    try:
        image = decode_image(bytes(damaged), "x")
    except BadImageError:
        return
    assert pixels(image).ndim == 3


# --- crops


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def adm_crop(array: np.ndarray, size: int) -> np.ndarray:
    """The published procedure, by itself: the crop is cut from the array and not by Pillow."""
    picture = Image.fromarray(array)
    halvings = 0
    while min(array.shape[:2]) // 2**halvings >= 2 * size:
        halvings += 1
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    ratio = size / min(*picture.size)
    resized = np.asarray(picture.resize(tuple(round(side * ratio) for side in picture.size), resample=Image.BICUBIC))
    y, x = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [16, 64, 100, 128, 256, 300])
def test_center_crop_is_adms(size):
    for photo in (ROCKET, photos.chelsea(), ROCKET.transpose(1, 0, 2), ROCKET[:100, :101]):
        photo = np.ascontiguousarray(photo)
        np.testing.assert_array_equal(pixels(center_crop(tensor(photo), size)), adm_crop(photo, size))


def test_center_crop_halves_with_a_box_filter():
    photo = ROCKET[:400, :600]
    halved = photo.reshape(200, 2, 300, 2, 3).astype(float).mean(axis=(1, 3))
    cropped = pixels(center_crop(tensor(photo), 200))
    assert np.abs(cropped - halved[:, 50:250]).max() <= 1  # Pillow rounds after the rows and after the columns


def test_center_crop_equals_resize_and_center_crop_below_twice_the_size():
    """The published crop and torchvision's Pillow pipeline agree where no halving happens."""
    from torchvision.transforms import v2

    pipeline = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(256)])
    photo = Image.fromarray(photos.coffee()).resize((500, 375), Image.Resampling.LANCZOS)
    expected = np.array(pipeline(photo))
    np.testing.assert_array_equal(pixels(center_crop(tensor(np.array(photo)), 256)), expected)
    bilinear = v2.Compose([v2.Resize(256, v2.InterpolationMode.BILINEAR), v2.CenterCrop(256)])
    error = ((np.array(bilinear(photo)).astype(float) - expected) ** 2).mean()
    assert 30 < 10 * np.log10(255**2 / error) < 50  # a wrong filter would show


def test_center_crop_of_the_right_size_is_the_image_itself():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(center_crop(image, 32), image)


def test_center_crop_refuses_what_would_fill_the_memory():
    with pytest.raises(BadImageError, match="1 x 20000 pixels is too narrow"):
        center_crop(torch.zeros(3, 20_000, 1, dtype=torch.uint8), 256)


@pytest.mark.parametrize("crop", [center_crop, lambda x, size: random_resized_crop(x, size, torch.Generator())])
def test_crops_refuse_other_input(crop):
    with pytest.raises(ValueError, match="uint8"):
        crop(torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        crop(torch.zeros(8, 8, 3, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="at least 2"):
        crop(torch.zeros(3, 8, 8, dtype=torch.uint8), 1)


def position_image(height: int, width: int) -> torch.Tensor:
    """Red grows from left to right, green from top to bottom: a crop's colours tell where it lay."""
    x = torch.linspace(0, 255, width).expand(height, width)
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return torch.stack([x, y, torch.zeros(height, width)]).round().to(torch.uint8)


def test_random_resized_crop_takes_parts_of_the_permitted_area_and_aspect():
    height, width, size = 256, 384, 64
    image = position_image(height, width)
    areas, aspects = [], []
    for seed in range(200):
        crop = random_resized_crop(image, size, torch.Generator().manual_seed(seed), (0.3, 0.9)).float()
        part_width = (crop[0, 32, -1] - crop[0, 32, 0]) / 255 * width * size / (size - 1)
        part_height = (crop[1, -1, 32] - crop[1, 0, 32]) / 255 * height * size / (size - 1)
        areas.append(float(part_width * part_height / (height * width)))
        aspects.append(float(part_width / part_height))
    tolerance = 0.03  # 8-bit positions, and the filter at the border
    assert 0.3 - tolerance < min(areas) < 0.35
    assert 0.8 < max(areas) < 0.9 + tolerance
    assert 0.75 - tolerance < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 4 / 3 + tolerance


def test_random_resized_crop_is_the_generators_choice_alone():
    image = tensor(ROCKET)
    a, b, c = (random_resized_crop(image, 48, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert a.shape == (3, 48, 48)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_random_resized_crop_draws_the_same_number_of_values_whatever_the_image():
    states = []
    for shape in ((3, 64, 64), (3, 4, 4000), (3, 1, 1)):
        generator = torch.Generator().manual_seed(3)
        random_resized_crop(torch.zeros(shape, dtype=torch.uint8), 8, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 40), st.integers(0, 2**32))
def test_random_resized_crop_of_any_shape_keeps_a_constant_image_constant(height, width, size, seed):
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    crop = random_resized_crop(image, size, torch.Generator().manual_seed(seed))
    assert crop.shape == (3, size, size)
    assert (crop == 77).all()


def test_random_resized_crop_of_a_strip_takes_its_middle():
    strip = torch.zeros(3, 30, 3000, dtype=torch.uint8)
    strip[:, :, 1480:1520] = 200  # the middle 30 x 40
    crop = random_resized_crop(strip, 16, torch.Generator().manual_seed(0))
    assert (crop == 200).all()


# --- conversion


def test_every_uint8_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)[:, None]
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_takes_the_nearest_value_and_clamps():
    x = torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64)[:, None]
    exact = ((x + 1) * 127.5).clamp(0, 255)
    assert (to_uint8(x).double() - exact).abs().max() <= 0.5 + 1e-4
    assert to_uint8(torch.tensor([[-7.0, 7.0]])).tolist() == [[0, 255]]
    assert to_uint8(torch.tensor([[-1.0, 1.0]], dtype=torch.bfloat16)).tolist() == [[0, 255]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad):
    images = torch.zeros(4, 3, 2, 2)
    images[2, 1, 0, 1] = bad
    with pytest.raises(ValueError, match=r"images \[2\] of a batch of 4 hold NaN or infinite values"):
        to_uint8(images)


def test_conversions_refuse_the_other_type():
    with pytest.raises(ValueError, match="must be uint8"):
        to_float(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="must be floating-point"):
        to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
