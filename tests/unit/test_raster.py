"""What a viewer shows of PNG, JPEG, TIFF, WebP, BMP and GIF files, and what is refused by name."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageCms

from medmoe_edge.errors import ImageError
from medmoe_edge.image.inputs import as_image
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.image.raster import ADAM7

NOISE = np.random.default_rng(3)
GREY = NOISE.integers(0, 256, (24, 36), np.uint8)
RGB = NOISE.integers(0, 256, (24, 36, 3), np.uint8)
SMOOTH = (np.add.outer(np.arange(48), np.arange(64)) * 2).astype(np.uint8)


def encoded(values: npt.NDArray[Any] | Pillow.Image, kind: str, **options: Any) -> bytes:
    picture = values if isinstance(values, Pillow.Image) else Pillow.fromarray(values)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Reads bytes as a file that says nothing by its name."""

    def read(data: bytes, frame: int | None = None) -> Image:
        path = tmp_path / "picture"
        path.write_bytes(data)
        return load_image(path, frame=frame)

    return read


def codes(image: Image) -> list[str]:
    return [notice.code for notice in image.notices]


def three(grey: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.repeat(grey[..., None], 3, axis=2)


# --- kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("BMP", {})])
def test_webp_and_bmp(values: npt.NDArray[Any], kind: str, options: Any, read: Any) -> None:
    expected = values if values.ndim == 3 else three(values)
    image = read(encoded(values, kind, **options))
    np.testing.assert_array_equal(image.pixels, expected)
    assert (image.frames, image.notices, image.spacing) == (1, (), None)


def test_gif(read: Any) -> None:
    np.testing.assert_array_equal(read(encoded(GREY, "GIF")).pixels, three(GREY))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_read(kind: str, read: Any) -> None:
    frames = [Pillow.fromarray(np.roll(GREY, n)) for n in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    image = read(data)
    np.testing.assert_array_equal(image.pixels, three(GREY))
    assert (codes(image), image.frames) == (["animation"], 1)
    np.testing.assert_array_equal(read(data, 0).pixels, image.pixels)
    with pytest.raises(ImageError, match="there is no frame 1"):
        read(data, 1)


# --- proportions ------------------------------------------------------------------------------


def _png(values: npt.NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks before its pixels."""
    data = encoded(values, "PNG")
    return data[:33] + b"".join(_chunk(*chunk) for chunk in chunks) + data[33:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _packed(grey: npt.NDArray[Any], data: bytes, interlaced: int = 0) -> bytes:
    """A grey PNG of that size, and of these filtered rows."""
    head = struct.pack(">IIBBBBB", *grey.shape[::-1], 8, 0, 0, 0, interlaced)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _jfif(unit: int, across: int, down: int) -> bytes:
    data = bytearray(encoded(SMOOTH, "JPEG", quality=98))
    assert data[6:10] == b"JFIF"
    struct.pack_into(">BHH", data, 13, unit, across, down)
    return bytes(data)


def _gif(aspect: int) -> bytes:
    data = bytearray(encoded(SMOOTH, "GIF"))
    data[12] = aspect
    return bytes(data)


STRETCHED = {  # a file and how many times its rows and its columns appear
    "png, ratio": (_png(SMOOTH, (b"pHYs", struct.pack(">IIB", 2, 1, 0))), (2, 1)),
    "png, metres": (_png(SMOOTH, (b"pHYs", struct.pack(">IIB", 1000, 3000, 1))), (1, 3)),
    "png, square": (_png(SMOOTH, (b"pHYs", struct.pack(">IIB", 2835, 2835, 1))), (1, 1)),
    "jpeg, ratio": (_jfif(0, 1, 2), (1, 2)),
    "jpeg, inches": (_jfif(1, 300, 150), (2, 1)),
    "jpeg, nothing": (_jfif(1, 0, 0), (1, 1)),
    "tiff, inches": (encoded(SMOOTH, "TIFF", dpi=(200, 100)), (2, 1)),
    "tiff, no unit": (encoded(SMOOTH, "TIFF", x_resolution=1, y_resolution=3), (1, 3)),
    "bmp": (encoded(SMOOTH, "BMP", dpi=(100, 200)), (1, 2)),
    "gif": (_gif(17), (2, 1)),  # 32 / 64: twice as high as wide
}


@pytest.mark.parametrize("name", STRETCHED)
def test_true_proportions(name: str, read: Any) -> None:
    data, (down, across) = STRETCHED[name]
    expected = three(SMOOTH.repeat(down, axis=0).repeat(across, axis=1)).astype(int)
    image = read(data)
    assert image.pixels.shape == expected.shape
    assert np.abs(image.pixels - expected).max() <= 3


def test_a_turned_picture_keeps_its_proportions(read: Any) -> None:
    exif = Pillow.Exif()
    exif[274] = 6
    for data in (
        encoded(SMOOTH, "PNG", exif=exif, dpi=(200, 100)),
        encoded(SMOOTH, "TIFF", tiffinfo={274: 6}, dpi=(200, 100)),
    ):
        assert read(data).pixels.shape == (64, 96, 3)


def test_impossible_proportions_are_left_and_said(read: Any) -> None:
    image = read(_jfif(1, 300, 1))
    assert image.pixels.shape == (*SMOOTH.shape, 3)
    assert "proportions" in codes(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_upright(orientation: int, read: Any) -> None:
    exif = Pillow.Exif()
    exif[274] = orientation
    as_png = read(encoded(RGB, "PNG", exif=exif)).pixels
    np.testing.assert_array_equal(read(encoded(RGB, "TIFF", exif=exif)).pixels, as_png)
    if orientation == 5:  # mirrored along the diagonal
        np.testing.assert_array_equal(as_png, RGB.transpose(1, 0, 2))


# --- transparency -----------------------------------------------------------------------------


def _with_alpha(colours: npt.NDArray[Any], alpha: npt.NDArray[Any] | int) -> bytes:
    alpha = np.broadcast_to(np.asarray(alpha, np.uint8), colours.shape[:2])
    return encoded(np.dstack([colours, alpha]), "PNG")


def test_a_picture_that_is_all_transparent_is_shown(read: Any) -> None:
    image = read(_with_alpha(RGB, 0))
    np.testing.assert_array_equal(image.pixels, RGB)
    assert codes(image) == ["transparency_ignored"]


def test_what_is_dark_on_transparent_is_shown_on_white(read: Any) -> None:
    image = read(_with_alpha(np.zeros_like(RGB), GREY))
    np.testing.assert_allclose(image.pixels, three(255 - GREY), atol=1)
    assert codes(image) == ["transparency_white"]


def test_what_is_bright_on_transparent_is_shown_on_black(read: Any) -> None:
    image = read(_with_alpha(np.full_like(RGB, 255), GREY))
    np.testing.assert_allclose(image.pixels, three(GREY), atol=1)
    assert codes(image) == []


@pytest.mark.parametrize("key", [0, 255])
def test_a_shade_that_is_marked_transparent_stays(key: int, read: Any) -> None:
    grey = np.where(GREY > 100, key, GREY // 2).astype(np.uint8)
    np.testing.assert_array_equal(read(encoded(grey, "PNG", transparency=key)).pixels, three(grey))
    np.testing.assert_array_equal(
        read(encoded(three(grey), "PNG", transparency=(key, key, key))).pixels, three(grey)
    )


def test_a_palette_that_is_all_transparent_is_shown(read: Any) -> None:
    picture = Pillow.fromarray(RGB).quantize(8)
    data = encoded(picture, "PNG", transparency=bytes(8))
    np.testing.assert_array_equal(read(data).pixels, np.asarray(picture.convert("RGB")))


def test_a_blank_picture_is_said_to_be_blank(read: Any) -> None:
    assert codes(read(encoded(np.full((5, 6), 128, np.uint8), "PNG"))) == ["no_contrast"]


# --- colours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_is_followed(kind: str, read: Any) -> None:
    """XYZ, linear and with other primaries: far from sRGB."""
    gradient = three(SMOOTH)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    plain = read(encoded(gradient, kind, **options)).pixels.astype(int)
    same = read(encoded(gradient, kind, icc_profile=srgb, **options)).pixels
    np.testing.assert_array_equal(same, plain)
    ignored = read(encoded(gradient, kind, icc_profile=profile, **options)).pixels
    np.testing.assert_array_equal(ignored, plain)  # it is not of RGB
    broken = read(encoded(gradient, kind, icc_profile=b"none" * 50, **options)).pixels
    np.testing.assert_array_equal(broken, plain)
    curved = read(encoded(gradient, kind, icc_profile=linear_profile(), **options)).pixels
    expected = srgb_of(plain / 255) * 255
    assert np.abs(curved - expected).mean() < 2
    assert np.abs(curved - plain).mean() > 20


def linear_profile() -> bytes:
    """sRGB's primaries without its curve: an ICC profile (ICC.1:2010) of three matrix columns."""
    text = b"desc" + bytes(4) + struct.pack(">I", 7) + b"linear\0" + bytes(4 + 4 + 2 + 1 + 67)
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)  # none: the identity

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))

    tags = {
        b"desc": text,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 0, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"", b"acsp"
    )
    head = head.ljust(68, b"\0") + white
    profile = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def srgb_of(linear: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """IEC 61966-2-1."""
    curved = 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved)


def test_the_gamma_of_a_png_is_followed(read: Any) -> None:
    """PNG 13.13: samples of gamma 1 are light itself, and are brightened for a screen."""
    image = read(_png(SMOOTH, (b"gAMA", struct.pack(">I", 100_000))))
    expected = 255 * (SMOOTH / 255) ** (1 / 2.2)
    assert np.abs(image.pixels[..., 0] - expected).max() <= 1
    usual = read(_png(SMOOTH, (b"gAMA", struct.pack(">I", 45_455)))).pixels
    np.testing.assert_array_equal(usual, three(SMOOTH))
    stated = read(_png(SMOOTH, (b"gAMA", struct.pack(">I", 100_000)), (b"sRGB", b"\0"))).pixels
    np.testing.assert_array_equal(stated, three(SMOOTH))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("hidden", [0, 1])
def test_colours_that_are_seen_through_are_converted_as_well(
    kind: str, hidden: int, read: Any
) -> None:
    """Where nothing shows through them, they are those of the same picture without transparency."""
    alpha = np.full(SMOOTH.shape, 255, np.uint8)
    alpha[0, :hidden] = 0
    options = {"icc_profile": linear_profile(), **({"lossless": True} if kind == "WEBP" else {})}
    expected = read(encoded(three(SMOOTH), kind, **options)).pixels.copy()
    expected[0, :hidden] = 0
    seen = read(encoded(np.dstack([three(SMOOTH), alpha]), kind, **options)).pixels
    np.testing.assert_array_equal(seen, expected)


def test_the_gamma_of_what_is_seen_through_is_followed(read: Any) -> None:
    alpha = np.full(SMOOTH.shape, 254, np.uint8)
    for values in (np.dstack([SMOOTH, alpha]), np.dstack([three(SMOOTH), alpha])):
        pixels = read(_png(values, (b"gAMA", struct.pack(">I", 100_000)))).pixels
        expected = 255 * (SMOOTH / 255) ** (1 / 2.2)
        assert np.abs(pixels[..., 0] - expected).max() <= 2


@pytest.mark.parametrize("orientation", [b"II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\x006\0\0\0", b"odd"])
def test_odd_metadata_does_not_stop_the_picture(orientation: bytes, read: Any) -> None:
    exif = orientation + bytes(4)  # an orientation in letters; no EXIF at all
    np.testing.assert_array_equal(read(encoded(GREY, "PNG", exif=exif)).pixels, three(GREY))
    plain = encoded(GREY, "JPEG")
    marked = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    np.testing.assert_array_equal(read(marked + plain[2:]).pixels, read(plain).pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("tag", "type_", "value"),
    [(296, 2, b"in"), (531, 4, b"\0\0\1"), (296, 9, b"\xff" * 4), (256, 2, b"36"), (258, 2, b"8")],
)
def test_odd_metadata_does_not_stop_the_picture_from_being_turned(
    kind: str, tag: int, type_: int, value: bytes, read: Any
) -> None:
    entries = sorted([(274, 3, 1, b"\6"), (tag, type_, 3 if type_ == 2 else 1, value)])
    exif = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0" * (kind == "JPEG") + b"II*\0\x08\0\0\0\2\0" + exif + bytes(4)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(GREY, kind, exif=exif, **options)
    expected = np.rot90(read(encoded(GREY, kind, **options)).pixels, -1)
    np.testing.assert_array_equal(read(data).pixels, expected)
    with Pillow.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(as_image(opened).pixels, expected)


def test_one_resolution_says_nothing_of_proportions(read: Any) -> None:
    data = _tiff(SMOOTH, resolution=(2, 1))
    assert read(data).pixels.shape == (96, 64, 3)
    without = data.replace(struct.pack("<HH", 283, 5), struct.pack("<HH", 286, 5), 1)
    np.testing.assert_array_equal(read(without).pixels, three(SMOOTH))


# --- TIFF -------------------------------------------------------------------------------------


def _tiff(values: npt.NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u2", "f4"])
def test_deep_samples_of_either_byte_order(
    dtype: str, order: str, compression: str | None, read: Any
) -> None:
    values = (SMOOTH.astype(float) - (100 if dtype[0] == "i" else 0)).astype(dtype)
    low, high = np.percentile(values, 1), np.percentile(values, 99)
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    pixels = read(_tiff(values, byteorder=order, compression=compression)).pixels
    assert np.abs(pixels[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_sixteen_bits(compression: str | None, read: Any) -> None:
    planes = np.moveaxis(RGB, -1, 0).astype(np.uint16) * 257
    data = _tiff(planes, photometric="rgb", planarconfig="separate", compression=compression)
    np.testing.assert_array_equal(read(data).pixels, RGB)


def test_grey_that_does_not_say_which_end_is_black(read: Any) -> None:
    """As libtiff reads it; of more bits as of 8."""
    for values, options in ((SMOOTH, {}), (SMOOTH > 90, {"compression": "packbits"})):
        data = _tiff(values, photometric="minisblack", **options)
        unsaid = data.replace(struct.pack("<HH", 262, 3), struct.pack("<HH", 261, 3), 1)
        assert unsaid != data
        np.testing.assert_array_equal(read(unsaid).pixels, read(data).pixels)


def test_a_palette_of_8_bits_where_16_are_stated(read: Any) -> None:
    colours = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)])
    for scale in (1, 257):
        data = _tiff(SMOOTH, photometric="palette", colormap=(colours * scale).astype(np.uint16))
        expected = np.stack([colour[SMOOTH] for colour in colours], axis=-1)
        np.testing.assert_array_equal(read(data).pixels, expected)


def test_thumbnails_are_no_pages(read: Any) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY)
        for _ in range(4):
            writer.write(GREY[::2, ::2], subfiletype=1)
    image = read(file.getvalue())
    assert image.frames == 1
    np.testing.assert_array_equal(image.pixels, three(GREY))


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"rowsperstrip": 5, "predictor": 2}])
def test_a_changed_bit_in_a_deflated_tiff_is_noticed(options: dict[str, Any], read: Any) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, SMOOTH, compression="zlib", **options)
    whole = file.getvalue()
    np.testing.assert_array_equal(read(whole).pixels, three(SMOOTH))
    with tifffile.TiffFile(io.BytesIO(whole)) as tiff:
        places = [
            tiff.pages[0].dataoffsets[-1] + i for i in range(2, tiff.pages[0].databytecounts[-1])
        ]
    refused = 0
    for place in places:
        try:
            image = read(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        except ImageError:
            refused += 1
        else:  # a bit between the last code and the sum, or of the last code
            is_right = np.array_equal(image.pixels, three(SMOOTH))
            assert is_right or codes(image) == ["may_be_damaged"]
    assert refused > 0.8 * len(places)


@pytest.mark.parametrize("kind", ["flushed", "without its sum"])
def test_a_deflated_tiff_without_an_end_is_shown_and_told_of(kind: str, read: Any) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, SMOOTH, compression="zlib")
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        (start,), (size,) = tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts
        at, offset = (
            tiff.pages.first.tags[f"Strip{name}"].valueoffset for name in ("ByteCounts", "Offsets")
        )
    packer = zlib.compressobj()
    flushed = packer.compress(SMOOTH.tobytes()) + packer.flush(zlib.Z_SYNC_FLUSH)
    held = flushed if kind == "flushed" else data[start : start + size - 4]
    changed = bytearray(data + held)
    changed[at : at + 4] = len(held).to_bytes(4, "little")
    changed[offset : offset + 4] = len(data).to_bytes(4, "little")
    image = read(bytes(changed))
    np.testing.assert_array_equal(image.pixels, three(SMOOTH))
    assert codes(image) == ["may_be_damaged"]


def test_of_a_tiff_that_was_cut_off_only_a_whole_page_is_shown(read: Any) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in range(3):
            writer.write(np.roll(GREY, page))
    whole = read(file.getvalue())
    refused: list[str] = []
    for size in range(100, len(file.getvalue()), 97):
        try:
            image = read(file.getvalue()[:size])
        except ImageError as error:
            refused.append(error.what)
        else:
            assert image.frames == whole.frames
            np.testing.assert_array_equal(image.pixels, whole.pixels)
    assert len(refused) > 10
    assert all("cut off" in what for what in refused)


@pytest.mark.parametrize(
    ("pictures", "options"),
    [
        (1, {"description": "ImageJ=1.54f\nimages=5\nslices=5\n"}),
        (4, {"volumetric": True, "tile": (16, 16, 16), "photometric": "minisblack"}),
    ],
)
def test_pictures_that_are_no_pages_are_told_of(pictures: int, options: Any, read: Any) -> None:
    data = _tiff(np.stack([GREY] * pictures) if pictures > 1 else GREY, **options)
    assert [notice.code for notice in read(data).notices] == ["unlisted_pages"]
    assert read(_tiff(np.stack([GREY] * 5), imagej=True)).notices == ()


def _with_damaged_table(data: bytes) -> bytes:
    """A JPEG picture with one wrong byte in its table of quantisation: how wide its numbers are."""
    at = data.index(b"\xff\xdb") + 4
    return data[:at] + b"\x10" + data[at + 1 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (imagecodecs.jpegls_encode(GREY), "JPEG-LS picture of 1 x 8 bits, which is not read"),
        (
            imagecodecs.jpeg8_encode(GREY.astype(np.uint16), bitspersample=12),
            "JPEG picture of 1 x 12 bits, which is not read",
        ),
        (imagecodecs.jpegls_encode(GREY)[:100], "cut off"),
        (_with_damaged_table(encoded(RGB, "JPEG")), "its header is damaged or cut off"),
        (_with_damaged_table(encoded(GREY, "JPEG")), "its header is damaged or cut off"),
    ],
)
def test_a_jpeg_that_is_not_read_says_what_it_is(data: bytes, message: str, read: Any) -> None:
    with pytest.raises(ImageError, match=message):
        read(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_tiff(SMOOTH.astype(np.float64)), "not read: grey, 64 bits, float"),
        (_tiff(SMOOTH.astype(np.uint64)), "not read: grey, 64 bits, unsigned"),
        (
            _tiff(RGB.astype(np.float32), photometric="rgb"),
            r"not read: RGB, 32 \+ 32 \+ 32 bits, float",
        ),
        (_tiff(GREY, bigtiff=True, byteorder=">"), "a big-endian BigTIFF, which is not read"),
        (_tiff(GREY, compression="lerc"), "whose compression, number 34887, is not read"),
        (b"II*\0\xff\xff\0\0" + bytes(20), "without a readable directory"),
    ],
)
def test_a_tiff_that_is_not_read_says_what_it_holds(data: bytes, message: str, read: Any) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        read(data)
    assert "PNG" in caught.value.remedy or "again" in caught.value.remedy


# --- damage -----------------------------------------------------------------------------------


def test_every_bit_of_a_png_counts(read: Any) -> None:
    data = encoded(GREY, "PNG")
    for at in range(33 * 8, (len(data) - 12) * 8, 41):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ImageError, match=r"damaged|cut off"):
            read(bytes(damaged))


@pytest.mark.parametrize("missing", [1, 37, 370, 888])  # 37 bytes a row
def test_a_png_without_its_last_rows_is_cut_off(missing: int, read: Any) -> None:
    black = GREY.copy()
    black[-6:] = 0
    for picture in (GREY, black):
        data = b"".join(b"\0" + row.tobytes() for row in picture)
        np.testing.assert_array_equal(read(_packed(picture, data)).pixels, three(picture))
        with pytest.raises(ImageError, match="is cut off"):
            read(_packed(picture, data[:-missing]))


def test_what_lies_behind_the_last_row_of_a_png_is_not_unpacked(read: Any) -> None:
    """It could be without end."""
    black = np.zeros_like(GREY)
    packer = zlib.compressobj()
    rows = packer.compress(bytes(37 * 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = _packed(black, b"")
    head, end = data[:33], data[-12:]
    behind = _chunk(b"IDAT", rows) + _chunk(b"IDAT", b"\xff" * 50)  # no deflated data
    np.testing.assert_array_equal(read(head + behind + end).pixels, three(black))


def test_an_interlaced_png_that_ends_in_black_is_whole(read: Any) -> None:
    for height, width in ((24, 36), (23, 35), (5, 3), (1, 1)):
        black = GREY[:height, :width].copy()
        black[-2:] = 0
        passes = [black[y::down, x::right] for x, y, right, down in ADAM7]
        data = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
        np.testing.assert_array_equal(read(_packed(black, data, 1)).pixels, three(black))
        with pytest.raises(ImageError, match="is cut off"):
            read(_packed(black, data[:-1], 1))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_that_was_closed_too_early_is_cut_off(mode: str, options: Any, read: Any) -> None:
    rough = Pillow.fromarray(NOISE.integers(0, 256, (120, 160, 3), np.uint8)).convert(mode)
    data = encoded(rough, "JPEG", quality=80, **options)
    assert codes(read(data)) == []
    for share in (0.4, 0.6, 0.8, 0.95):
        with pytest.raises(ImageError, match=r"is cut off|is damaged"):
            read(data[: int(len(data) * share)] + b"\xff\xd9")


def test_a_jpeg_that_was_closed_between_its_scans_is_cut_off(read: Any) -> None:
    """What is there looks whole, only blurred, or grey where a colour's scan is missing."""
    progressive = encoded(RGB, "JPEG", progressive=True)
    at = [match.start() for match in re.finditer(rb"\xff[\xc4\xda]", progressive)]
    cuts = [progressive[:end] + b"\xff\xd9" for end in at if b"\xff\xda" in progressive[:end]]
    assert len(cuts) > 10
    planes = [encoded(np.ascontiguousarray(RGB[..., i]), "JPEG") for i in range(3)]
    start = planes[0].index(b"\xff\xda")
    frame = planes[0].index(b"\xff\xc0")
    head = planes[0][:frame] + b"\xff\xc0\0\x11" + planes[0][frame + 4 : frame + 9]
    head += bytes([3, 82, 0x11, 0, 71, 0x11, 0, 66, 0x11, 0]) + planes[0][frame + 13 : start]
    scans = [
        plane[start : start + 5] + bytes([name]) + plane[start + 6 : -2]
        for name, plane in zip(b"RGB", planes, strict=True)
    ]
    head = head[:2] + head[20:]  # without JFIF, whose colours are YCbCr
    whole = read(head + b"".join(scans) + b"\xff\xd9").pixels
    for i, plane in enumerate(planes):
        np.testing.assert_array_equal(whole[..., i], read(plane).pixels[..., 0])
    for data in (*cuts[:-7], *(head + b"".join(scans[:i]) + b"\xff\xd9" for i in (1, 2))):
        with pytest.raises(ImageError, match="is cut off"):
            read(data)
    for data in cuts[-7:]:  # of the last bits, which T.81 lets an encoder leave out
        assert codes(read(data)) == ["may_be_damaged"]


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_jpeg_has_beside_its_picture_changes_nothing(progressive: bool, read: Any) -> None:
    """A thumbnail, a marker in metadata, a restart before the end, bytes before a segment."""
    plain = encoded(RGB, "JPEG", progressive=progressive)
    small = encoded(RGB[::3, ::3].copy(), "JPEG")
    beside = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        for body in (b"Exif\0\0" + small, b"x\xff\xda\xff\xc2\xff\xd9")
    )
    frame = re.search(rb"\xff[\xc0\xc2]\0\x11", plain)
    assert frame is not None
    at, expected = frame.start(), read(plain).pixels
    for data in (plain[:-2] + b"\xff\xd0\xff\xd9", plain[:at] + b"\xff\0" + plain[at:], plain):
        image = read(data[:2] + beside + data[2:])
        np.testing.assert_array_equal(image.pixels, expected)
        assert codes(image) == []


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_that_ends_in_black_is_whole(mode: str, read: Any) -> None:
    for rows in (10, 60, 110):
        picture = NOISE.integers(0, 256, (120, 160, 3), np.uint8)
        picture[rows:] = 0
        data = encoded(Pillow.fromarray(picture).convert(mode), "JPEG", quality=90, optimize=True)
        assert read(data).pixels[112:].max() <= 8  # where 4:2:0 runs over
