import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from convmixer_hub import DataError
from convmixer_hub.data.images import eval_transform, open_image

from .conftest import CAT, CONFIG, IMAGES, encode, write_tree


def gray_ramp(mode: str, highest: int | float) -> Image.Image:
    values = np.linspace(0, highest, 256).reshape(16, 16)
    kind = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    return Image.fromarray(values.astype(kind))


@pytest.mark.parametrize(
    ("mode", "highest", "format"),
    [
        ("L", 255, "PNG"),
        ("I;16", 1023, "TIFF"),
        *(("I;16", highest, "PNG") for highest in (255, 4095, 65535)),  # 4095: 12 bits of scanners
        *(("I", highest, "TIFF") for highest in (65535, 70_000, 2**24 - 1, 2**25)),
        *(("F", highest, "TIFF") for highest in (1.0, 255.0, 65535.0)),
    ],
)
def test_grey_of_every_depth_keeps_its_shades(mode, highest, format):
    image = open_image(encode(gray_ramp(mode, highest), format))
    assert image.mode == "RGB"
    shades = np.asarray(image)[..., 0].ravel()
    np.testing.assert_allclose(shades, np.arange(256), atol=1)


@pytest.mark.parametrize(
    ("value", "shade"),
    [(0.5, 128), (float("nan"), 0), (float("inf"), 0), (200.0, 200), (1.02, 255)],
)
def test_an_even_grey_float_image_is_not_stretched(value, shade):
    image = Image.fromarray(np.full((2, 2), value, dtype=np.float32))
    assert set(np.asarray(open_image(encode(image, "TIFF"))).ravel()) == {shade}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_negative_grey_is_refused(tmp_path, mode):
    kind = {"I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.array([[-1, 1]], dtype=kind)).save(tmp_path / "ct.tiff")
    message = f"^{tmp_path}/ct.tiff: has negative gray values; save it as 8-bit gray$"
    with pytest.raises(DataError, match=message):
        open_image(tmp_path / "ct.tiff")


def test_what_would_be_black_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.001, dtype=np.float32)).save(tmp_path / "faint.tiff")
    message = "faint.tiff: has gray values up to 0.001, where white is 1; save it as 8-bit gray$"
    with pytest.raises(DataError, match=message):
        open_image(tmp_path / "faint.tiff")
    zeros = Image.fromarray(np.zeros((2, 2), dtype=np.float32))
    assert not np.asarray(open_image(encode(zeros, "TIFF"))).any()


def encode_16_bit(colors: np.ndarray) -> bytes:
    """Encode colors, perhaps with alpha, as a PNG of 16 bits, which Pillow does not write."""
    height, width, channels = colors.shape
    kind_of_color = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind_of_color, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]:
        chunk = kind + data
        content += struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def test_colors_of_16_bits_keep_their_shades_or_are_refused():
    colors = np.arange(4096 * 3).reshape(64, 64, 3) % 4096
    np.testing.assert_array_equal(open_image(encode_16_bit(colors * 16)), colors // 16)
    message = "is nearly black, or has fewer than 16 bits a color; save it as 8-bit RGB"
    with pytest.raises(DataError, match=message):
        open_image(encode_16_bit(colors), "from_a_camera.png")
    for channels in ((0, 1, 2, 0), (0, 0)):  # the last one is the alpha
        transparent = colors[..., channels] * 16
        open_image(encode_16_bit(transparent))
        transparent[..., -1] = 4095
        with pytest.raises(DataError, match=message):
            open_image(encode_16_bit(transparent))
    assert not np.asarray(open_image(encode_16_bit(colors * 0))).any()


def change_tag(content: bytes, tag: int, old: int, new: int) -> bytes:
    """Change a number in a TIFF's header."""
    before, after = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (old, new))
    assert content.count(before) == 1
    return content.replace(before, after)


RED = Image.new("RGB", (4, 2), "red")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode(RED, "TIFF", save_all=True, append_images=[RED]), "has several pages; save each"),
        (
            change_tag(encode(gray_ramp("I;16", 4095), "TIFF"), 262, 1, 0),
            "is a negative, with white as 0; save it as 8-bit gray",
        ),
    ],
    ids=["pages", "negative"],
)
def test_a_tiff_that_is_more_or_other_than_pillow_reads_is_refused(content, message):
    with pytest.raises(DataError, match=f"^scan.tiff: {message}"):
        open_image(content, "scan.tiff")


@pytest.mark.parametrize(
    "content",
    [
        encode(RED, "TIFF", save_all=True, append_images=[RED.resize((2, 1))]),
        encode(RED, "TIFF", save_all=True, append_images=[RED.resize((2, 1)).quantize(2)]),
        change_tag(encode(RED.convert("RGBA"), "TIFF"), 338, 2, 0),
    ],
    ids=["with a preview", "with one of a palette", "with a channel of no meaning"],
)
def test_a_tiff_of_one_picture_is_read(content):
    np.testing.assert_array_equal(open_image(content), RED)


def test_transparency_is_laid_over_white():
    red_and_nothing = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red_and_nothing.putpixel((1, 0), (0, 0, 0, 0))
    for image in (red_and_nothing, red_and_nothing.quantize(4)):  # a palette with transparency
        pixels = np.asarray(open_image(encode(image)))[0].tolist()
        assert pixels == [[255, 0, 0], [255, 255, 255]]


def test_a_palette_image_keeps_its_colours():
    image = Image.open(IMAGES / "frog.png").convert("RGB").quantize(16)
    assert image.mode == "P"
    np.testing.assert_array_equal(open_image(encode(image)), image.convert("RGB"))


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned = open_image(encode(image, exif=exif))
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_does_not_cost_an_image(format):
    image = Image.new("RGB", (4, 2), "red")
    content = encode(image, format, exif=b"Exif\0\0no header", dpi=(72, 72))
    red, green, blue = open_image(content).getpixel((1, 1))
    assert red > 250 and green < 5 and blue < 5


def test_an_image_is_never_left_unturned():
    turned, wrong_type = (0x112, 3, 1, 6, 0), (0x128, 2, 2, b"2\0\0\0")
    tags = struct.pack("<HHIHH", *turned) + struct.pack("<HHI4s", *wrong_type) + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags
    content = encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif)
    with pytest.raises(DataError, match="damaged image"):
        open_image(content, "photo.jpg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such file; check the path"),
        (".", "is a folder; name the image files in it"),
        ("cat" * 100, r"cannot be opened \(.*too long.*\); check the path$"),
        ("text", "not an image that Pillow can read; give a PNG, JPEG, …"),
        ("empty", "not an image that Pillow can read"),
        ("cut off", "damaged image .*; replace the file"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, name, message):
    write_tree(tmp_path, ("text", b"not an image"), ("empty", b""), ("cut off", CAT[:-900]))
    with pytest.raises(DataError, match=f"^{tmp_path / name}: {message}"):
        open_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="has too many pixels to be safe; scale it down first"):
        open_image(IMAGES / "cat.png")


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_an_extremely_long_image_costs_no_more_than_itself(size, tmp_path, run_python):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "long.png")
    found = run_python(f"""
import resource
from convmixer_hub.data.images import eval_transform, open_image

transform = eval_transform({CONFIG})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = transform(open_image("long.png"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(*image.shape, *((image.amax((1, 2)) * 0.25 + 0.5) * 255).round().tolist())
""")
    kilobytes, seen = found.splitlines()
    assert int(kilobytes) < 100_000
    assert seen == "3 32 32 10.0 20.0 30.0"


@pytest.mark.parametrize("size", [(1, 1), (20, 300), (640, 480), (700, 40)])
def test_an_image_of_any_size_is_prepared_as_timm_does(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = timm.data.create_transform(**CONFIG, is_training=False)(image)
    torch.testing.assert_close(eval_transform(CONFIG)(image), expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_are_converted_to_the_channels_of_a_model(channels, mode):
    values = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    config = CONFIG | values | {"input_size": (channels, 32, 32)}
    image = open_image(IMAGES / "cat.png")
    expected = torch.from_numpy(np.array(image.convert(mode))).view(32, 32, channels)
    found = eval_transform(config)(image)
    torch.testing.assert_close(found * 255, expected.permute(2, 0, 1).float())


def test_channels_that_no_image_has_are_refused():
    with pytest.raises(DataError, match="the model takes 5 channels, and images have 1, 2, 3, 4;"):
        eval_transform(CONFIG | {"input_size": (5, 32, 32)})
