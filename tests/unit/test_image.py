"""Raster files, arrays and the preprocessing of the paper; whatever is not an image is refused."""

import gzip
import os
import struct
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bombs import chunk
from hostile import check_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from medmoe_edge.config import VisionConfig
from medmoe_edge.errors import ImageError, ResourceError
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.image.pixels import MAX_ASPECT, Image
from medmoe_edge.image.raster import MAX_PAGES

ROOT = Path(__file__).parents[2]
NOISE = np.random.default_rng(0)
GREY = NOISE.integers(0, 256, (9, 13), np.uint8)
RGB = NOISE.integers(0, 256, (9, 13, 3), np.uint8)
DEEP = NOISE.integers(0, 4096, (9, 13), np.uint16)  # 12 bits in 16, as scanners do

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def encoded(picture: Pillow.Image | npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    if not isinstance(picture, Pillow.Image):
        picture = Pillow.fromarray(picture)
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds not one pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(folder: Path, data: bytes, name: str = "scan.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def three(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([grey] * 3, axis=-1)


def percentiles(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """1st to 99th percentile on 0..255, value by value."""
    low, high = np.percentile(values, 1), np.percentile(values, 99)
    shown = [round(255 * min(max((v - low) / (high - low), 0), 1)) for v in values.ravel()]
    return np.asarray(shown, np.uint8).reshape(values.shape)


LOSSLESS = {
    "grey.png": (encoded(GREY, "PNG"), three(GREY)),
    "rgb.png": (encoded(RGB, "PNG"), RGB),
    "grey.tif": (encoded(GREY, "TIFF"), three(GREY)),
    "rgb.tif": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "palette.png": (
        encoded(Pillow.fromarray(GREY // 32 * 32).convert("RGB").quantize(8), "PNG"),
        three(GREY // 32 * 32),
    ),
    "bilevel.png": (
        encoded(Pillow.fromarray(GREY > 99), "PNG"),
        three((GREY > 99) * np.uint8(255)),
    ),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_file_gives_its_pixels_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    data, expected = LOSSLESS[name]
    image = load_image(saved(tmp_path, data, "scan.dcm"))
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.pixels.dtype == np.uint8
    assert (image.modality, image.window, image.spacing, image.frames) == (None, None, None, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_comes_close(mode: str, tmp_path: Path) -> None:
    smooth = Pillow.linear_gradient("L").resize((32, 24)).convert("RGB")
    path = saved(tmp_path, encoded(smooth.convert(mode), "JPEG", quality=95))
    assert np.abs(load_image(path).pixels.astype(int) - np.asarray(smooth)).max() <= 6


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)],
)
def test_deep_grey_is_stretched(kind: str, dtype: type, tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, encoded(DEEP.astype(dtype), kind)))
    difference = image.pixels.astype(int) - three(percentiles(DEEP))
    assert np.abs(difference).max() <= 1  # rounding at .5
    assert image.window is not None
    centre, width = image.window
    assert centre - width / 2 == pytest.approx(np.percentile(DEEP, 1))
    assert centre + width / 2 == pytest.approx(np.percentile(DEEP, 99))


def test_deep_grey_of_one_value_is_black(tmp_path: Path) -> None:
    image = load_image(saved(tmp_path, encoded(np.full((3, 4), 700, np.uint16), "PNG")))
    assert not image.pixels.any()


def test_deep_grey_with_a_single_bright_dot_shows_it(tmp_path: Path) -> None:
    values = np.zeros((40, 40), np.uint16)
    values[7, 5] = 900
    assert load_image(saved(tmp_path, encoded(values, "PNG"))).pixels[7, 5].tolist() == [255] * 3


@pytest.mark.parametrize("values", [GREY, DEEP])
def test_white_is_zero(values: npt.NDArray[Any], tmp_path: Path) -> None:
    black_is_zero = load_image(saved(tmp_path, encoded(values, "TIFF"))).pixels
    data = encoded(values, "TIFF")
    tag = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation, one short
    assert data.count(tag) == 1
    data = data.replace(tag + b"\1", tag + b"\0")
    np.testing.assert_array_equal(load_image(saved(tmp_path, data)).pixels, 255 - black_is_zero)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_fades_to_black(mode: str, tmp_path: Path) -> None:
    picture = Pillow.fromarray(RGB).convert(mode)
    picture.putalpha(Pillow.fromarray(GREY))
    colours = np.asarray(picture.convert("RGBA"))[..., :3].astype(float)
    expected = colours * (GREY[..., None] / 255)
    image = load_image(saved(tmp_path, encoded(picture, "PNG")))
    assert np.abs(image.pixels - expected).max() <= 1


def test_a_transparent_palette_colour_is_black(tmp_path: Path) -> None:
    picture = Pillow.fromarray(RGB).quantize(4)
    image = load_image(saved(tmp_path, encoded(picture, "PNG", transparency=2)))
    assert not image.pixels[np.asarray(picture) == 2].any()


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_exif_turns_the_picture_upright(orientation: int, turns: int, tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[274] = orientation
    image = load_image(saved(tmp_path, encoded(RGB, "PNG", exif=exif)))
    np.testing.assert_array_equal(image.pixels, np.rot90(RGB, turns))


def test_pages_of_a_tiff(tmp_path: Path) -> None:
    pages = [Pillow.fromarray(GREY // (n + 1)) for n in range(4)]
    path = saved(tmp_path, encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    for frame, page in enumerate(pages):
        image = load_image(path, frame=frame)
        assert image.frames == 4
        np.testing.assert_array_equal(image.pixels[..., 0], np.asarray(page))
    np.testing.assert_array_equal(load_image(path).pixels, load_image(path, frame=1).pixels)
    for frame in (4, -1):
        with pytest.raises(ImageError, match="has 4 frames; there is no frame") as caught:
            load_image(path, frame=frame)
        assert caught.value.remedy == "Choose a frame from 0 to 3."


def test_too_many_pages_are_refused(tmp_path: Path) -> None:
    data = bytearray(encoded(GREY, "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")  # to the next page
    for _ in range(MAX_PAGES):
        data[link : link + 4] = len(data).to_bytes(4, "little")
        link = len(data) + 14
        data += b"\1\0" + bytes(16)  # a page of one entry
    with pytest.raises(ImageError, match="more than 10,000 pages"):
        load_image(saved(tmp_path, bytes(data)))


def test_an_array_is_an_image() -> None:
    given_array = RGB.copy()
    image = Image.from_array(given_array)
    given_array[:] = 0
    np.testing.assert_array_equal(image.pixels, RGB)
    np.testing.assert_array_equal(Image.from_array(GREY).pixels, three(GREY))
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0] = 0


@pytest.mark.parametrize(
    "array",
    [
        RGB.astype(np.float32),
        RGB[..., :2],
        RGB[None],
        RGB[0, 0],
        np.zeros((0, 4), np.uint8),
        np.broadcast_to(np.uint8(0), (10_001, 10_000)),
    ],
)
def test_an_array_that_is_no_picture(array: npt.NDArray[Any]) -> None:
    with pytest.raises(ImageError):
        Image.from_array(array)


def tower(size: int, pad: bool) -> VisionConfig:
    mean, std = (tuple(255 * v for v in values) for values in (CLIP_MEAN, CLIP_STD))
    return VisionConfig("clip", size, 8, mean, std, pad_to_square=pad, layers=2, heads=2)


@settings(max_examples=25)
@given(
    size=st.sampled_from([32, 56, 224]),
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    pad=st.booleans(),
)
def test_preprocessing_is_clips(size: int, height: int, width: int, pad: bool) -> None:
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    if not pad and max(height, width) > MAX_ASPECT * min(height, width):
        return
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    picture = pixels
    if pad:  # LLaVA's expand2square with CLIP's mean colour
        side = max(height, width)
        picture = np.full((side, side, 3), (122, 116, 104), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        picture[top : top + height, left : left + width] = pixels
    expected = processor(Pillow.fromarray(picture), return_tensors="np")["pixel_values"]
    values = preprocess(Image.from_array(pixels), tower(size, pad))
    assert values.shape == (1, 3, size, size)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_long_strip_needs_little_memory(shape: tuple[int, int], pad: bool) -> None:
    strip = Image.from_array(np.full(shape, 200, np.uint8))
    values = preprocess(strip, tower(28, pad))
    # Padded, it is a hair's breadth in a square of the mean colour, which normalises to 0.
    expected = (
        0
        if pad
        else (200 / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(CLIP_STD, (3, 1, 1))
    )
    assert np.abs(values[0] - expected).max() < 0.02


BAD = {
    "text": (b"Is there effusion?", "not an image"),
    "empty": (b"", "is empty"),
    "ico": (encoded(GREY, "ICO"), "not an image"),
    "jpeg 2000": (encoded(GREY, "JPEG2000"), "is a JPEG 2000 picture, which is not read"),
    "avif": (encoded(RGB, "AVIF"), "is a HEIF or AVIF picture, which is not read"),
    "pdf": (encoded(RGB, "PDF"), "is a PDF document, which is not read"),
    "psd": (b"8BPS\0\1", "is a Photoshop document, which is not read"),
    "svg": (b'<?xml version="1.0"?>\n<svg>', "is an SVG drawing, which is not read"),
    "zip": (b"PK\x03\x04\x14\0", "is an archive, which is not read"),
    "nrrd": (b"NRRD0004\ntype: short", "is an NRRD volume, which is not read"),
    "metaimage": (b"ObjectType = Image\nNDims = 3", "is a MetaImage volume, which is not read"),
    "analyze": (struct.pack("<I", 348) + bytes(344), "does not say where left and right are"),
    "signature only": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "no width": (png_header(0, 5), "damaged|has no pixels"),
    "just too large": (png_header(10_000, 10_001), "limit of 100,000,000 pixels"),
    "a bomb": (png_header(30_000, 30_000), "limit of 100,000,000 pixels"),
    "no data": (png_header(300, 300), "cut off"),
    "half a PNG": (LOSSLESS["rgb.png"][0][:200], "cut off"),
    "half a JPEG": (encoded(RGB, "JPEG")[:-40], "cut off"),
    "half a TIFF": (encoded(RGB, "TIFF")[:-40], "cut off"),
    "half a WebP": (encoded(RGB, "WEBP")[:-40], "damaged"),
    "half a BMP": (encoded(RGB, "BMP")[:-40], "cut off"),
    "half a GIF": (encoded(GREY, "GIF")[:-40], "cut off"),
    "gzip": (gzip.compress(b"Is there effusion?"), "not an image"),
    "half a gzip": (gzip.compress(os.urandom(500))[:-90], "cut off"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    with pytest.raises(ImageError, match=message) as caught:
        load_image(saved(tmp_path, data, "ward\n7.png"))
    error = caught.value
    assert error.exit_code == 2
    assert r"'ward\n7.png'" in error.what
    assert "\n" not in str(error)
    assert error.remedy
    assert str(tmp_path) not in str(error)
    assert error.__suppress_context__ or error.__context__ is None  # libraries quote the file


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").write_bytes(b"")
    for path, message in {
        tmp_path: "is a folder",
        tmp_path / "missing.png": "does not exist",
        tmp_path / "pipe": "not a regular file",
        tmp_path / ("x" * 400): "cannot be opened",
        tmp_path / "nul\0": "damaged",
    }.items():
        with pytest.raises(ImageError, match=message):
            load_image(path)


def test_out_of_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("medmoe_edge.image.raster.show", fail)
    with pytest.raises(ResourceError, match="not enough memory"):
        load_image(saved(tmp_path, encoded(RGB, "PNG")))


def test_the_screen_stays_clean_and_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff writes to file descriptor 2 itself, where other threads write as well."""
    data = bytearray(encoded(RGB, "TIFF", compression="tiff_lzw"))
    data[8:40] = bytes(range(200, 232))
    path = saved(tmp_path, bytes(data))

    def read() -> None:
        for _ in range(20):
            with pytest.raises(ImageError):
                load_image(path)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    lines = 0
    while any(thread.is_alive() for thread in threads):
        lines += os.write(2, b"\n")
    assert lines
    assert capfd.readouterr() == ("", lines * "\n")


SEEDS = [
    *(data for data, _ in LOSSLESS.values()),
    encoded(RGB, "JPEG"),
    encoded(RGB, "JPEG", progressive=True),
    encoded(DEEP, "TIFF", compression="tiff_adobe_deflate"),
    encoded(Pillow.fromarray(GREY > 99), "TIFF", compression="group4"),
]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8)


@settings(max_examples=200)
@given(data=st.sampled_from(SEEDS), edits=EDITS, cut=st.none() | st.integers(1, 400))
def test_hostile_files(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    edits: list[tuple[int, int]],
    cut: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "scan.bin"
    check_damaged(path, data, edits, cut)


def test_a_png_costs_no_dicom_library(tmp_path: Path) -> None:
    path = saved(tmp_path, encoded(RGB, "PNG"))
    code = (
        "import sys; from medmoe_edge.image.loading import load_image; load_image(sys.argv[1]);"
        "print({'pydicom', 'nibabel', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "set()\n"


def test_the_example_scan() -> None:
    path = ROOT / "scan.png"
    data = path.read_bytes()
    assert len(data) < 200_000
    with Pillow.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        assert max(picture.size) <= 512
        assert picture.info == {}
    pixels = load_image(path).pixels
    assert pixels.std() > 40
    licence = (ROOT / "scan.png.license").read_text("utf-8")
    assert "SPDX-License-Identifier: MIT" in licence
