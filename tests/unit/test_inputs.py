"""The same picture in every form that Python code has it in: the same bits."""

import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image as Pillow
from pydicom.data import get_testdata_file

from medmoe_edge.errors import ImageError, InputError, MedMoEError
from medmoe_edge.image.inputs import as_image
from medmoe_edge.image.loading import load_image

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (9, 12), np.uint8)
COLOUR = GENERATOR.integers(0, 256, (9, 12, 3), np.uint8)
DEEP = GENERATOR.integers(0, 4096, (9, 12), np.uint16)


def same(found: Any, path: Path, **options: Any) -> None:
    expected = load_image(path, **options)
    assert np.array_equal(found.pixels, expected.pixels)
    assert (found.window, found.notices) == (expected.window, expected.notices)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_file_in_every_form(tmp_path: Path, suffix: str, pixels: Any) -> None:
    path = tmp_path / f"scan.{suffix}"
    Pillow.fromarray(pixels).save(path)
    content = path.read_bytes()
    for source in (path, str(path), content, bytearray(content), memoryview(content)):
        same(as_image(source), path)
    same(as_image(io.BytesIO(content)), path)
    with path.open("rb") as file:
        same(as_image(file), path)
    with Pillow.open(path) as picture:
        same(as_image(picture), path)


@pytest.mark.parametrize("pixels", [GREY, COLOUR, DEEP], ids=["grey", "colour", "uint16"])
def test_an_array_is_what_its_png_is(tmp_path: Path, pixels: Any) -> None:
    path = tmp_path / "scan.png"
    Pillow.fromarray(pixels).save(path)
    same(as_image(pixels), path)
    same(as_image(Pillow.fromarray(pixels)), path)
    same(as_image(np.asfortranarray(pixels)), path)


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "La", "I;16B"])
def test_a_pil_image_of_a_mode_that_no_file_has(mode: str) -> None:
    grey = Pillow.fromarray(GREY)
    through = {"La": "LA", "RGBa": "RGBA", "HSV": "RGB"}
    if mode == "I;16B":
        picture, plain = Pillow.frombytes(mode, (12, 9), DEEP.astype(">u2").tobytes()), DEEP
    else:
        picture, plain = grey.convert(through[mode]).convert(mode), GREY
    assert np.array_equal(as_image(picture).pixels, as_image(plain).pixels)
    assert picture.mode == mode


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_pil_image_of_a_tiff_is_what_its_file_is(tmp_path: Path, dtype: Any, turned: int) -> None:
    """Upright once, not twice, and white at 0 where the file says so."""
    path = tmp_path / "a.tif"
    tags = [(274, "H", 1, turned, True)]
    tifffile.imwrite(path, DEEP.astype(dtype), photometric="miniswhite", extratags=tags)
    with Pillow.open(path) as picture:
        same(as_image(picture), path)


def test_what_decides_how_a_picture_is_shown_goes_with_it(tmp_path: Path) -> None:
    """Turned by EXIF, with pixels that are not square, with a palette, with a gamma."""
    turned, oblong, palette, dark = (tmp_path / f"{name}.png" for name in "abcd")
    exif = Pillow.Exif()
    exif[274] = 6
    Pillow.fromarray(GREY).save(turned, exif=exif)
    Pillow.fromarray(GREY).save(oblong, dpi=(100, 200))
    Pillow.fromarray(COLOUR).quantize(8).save(palette)
    gamma = b"\x00\x00\x00\x04gAMA\x00\x00\xb1\x8f\x0b\xfca\x05"  # 0.45455, with its checksum
    Pillow.fromarray(GREY).save(dark)
    content = dark.read_bytes()
    dark.write_bytes(content[:33] + gamma + content[33:])
    for path in (turned, oblong, palette, dark):
        with Pillow.open(path) as picture:
            same(as_image(picture), path)


def test_a_stated_range() -> None:
    floats = GREY.astype(np.float32) / 255
    assert np.array_equal(as_image(floats, value_range=(0, 1)).pixels, as_image(GREY).pixels)
    hounsfield = np.array([[-1000, -160], [40, 240]], np.int16)
    shown = as_image(hounsfield, value_range=(-160, 240))
    assert shown.pixels[..., 0].tolist() == [[0, 0], [128, 255]]
    assert list(shown.window or ()) == [40, 400]
    rgb = as_image(COLOUR / 255, value_range=(0.0, 1.0))
    assert np.array_equal(rgb.pixels, COLOUR)


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "examples_rgb_color.dcm"]
)
def test_a_dataset_is_what_its_file_is(name: str) -> None:
    found: Any = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip(f"this pydicom has no {name}")
    path = Path(str(found))
    same(as_image(pydicom.dcmread(path)), path)


def test_a_dataset_that_was_never_a_file(tmp_path: Path) -> None:
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Modality = "OT"
    dataset.Rows, dataset.Columns = GREY.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = GREY.tobytes()
    dataset["PixelData"].VR = "OB"
    assert np.array_equal(as_image(dataset).pixels[..., 0], GREY)
    del dataset.PixelData
    with pytest.raises(ImageError, match="holds no image"):
        as_image(dataset)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_nifti_image_is_what_its_file_is(tmp_path: Path, dtype: Any, kind: Any) -> None:
    voxels = GENERATOR.integers(0, 200, (8, 9, 5)).astype(dtype)
    image = kind(voxels, np.diag([1.0, 1.0, 2.0, 1.0]))
    image.header.set_data_dtype(dtype)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(image, path)
    for source in (image, nibabel.load(path)):
        for frame in (None, 0, 4):
            same(as_image(source, frame=frame), path, frame=frame)


def test_scaled_voxels_are_never_scaled_anew(tmp_path: Path) -> None:
    path = tmp_path / "scaled.nii"
    image: Any = nibabel.Nifti1Image(GENERATOR.normal(0, 1, (8, 9, 3)), np.eye(4))  # type: ignore[no-untyped-call]
    image.header.set_data_dtype(np.int16)  # nibabel chooses a slope
    nibabel.save(image, path)
    same(as_image(nibabel.load(path)), path)


@pytest.mark.parametrize(
    ("source", "options", "what"),
    [
        (b"", {}, "is empty"),
        (b"no image", {}, "not an image"),
        (io.StringIO("text"), {}, "gives text"),
        (3, {}, "A int is no image"),
        (None, {}, "A NoneType is no image"),
        (["a.png"], {}, "A list is no image"),
        (GREY / 255, {}, "does not say which values"),
        (GREY.astype(np.int16), {}, "does not say which values"),
        (COLOUR.astype(np.uint16), {}, "does not say which values"),
        (GREY > 3, {}, "bool is no picture"),
        (np.zeros((2, 3, 4, 5)), {}, r"shape \[2, 3, 4, 5\]"),
        (np.zeros((0, 3), np.uint8), {}, "no pixels"),
        (GREY / 255, {"value_range": (1, 0)}, "value_range"),
        (GREY / 255, {"value_range": (0, np.nan)}, "value_range"),
        (GREY / 255, {"value_range": 1}, "value_range"),
        (GREY, {"frame": 1}, "has no frames"),
        (b"x", {"value_range": (0, 1)}, "value_range is of arrays"),
        (Pillow.fromarray(GREY), {"frame": 1}, "no frame 1"),
    ],
)
def test_what_is_no_image(source: Any, options: dict[str, Any], what: str) -> None:
    with pytest.raises(MedMoEError, match=what) as caught:
        as_image(source, **options)
    assert isinstance(caught.value, InputError)


def test_a_picture_stands_where_the_caller_left_it() -> None:
    file = io.BytesIO()
    first, *others = [Pillow.new("L", (32, 32), 40 * number) for number in range(4)]
    first.save(file, "TIFF", save_all=True, append_images=others)
    with Pillow.open(file) as picture:
        picture.seek(1)
        assert as_image(picture, frame=3).pixels.max() == 120
        assert picture.tell() == 1
        with pytest.raises(ImageError, match="no frame 4"):
            as_image(picture, frame=4)
        assert as_image(picture).pixels.max() == 40
