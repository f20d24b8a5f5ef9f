"""DICOM: what the standard says is shown, from pydicom's own files and from ones made here."""

import io
import logging
import re
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hostile import check_damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image import dicom as image_dicom
from medmoe_edge.image.loading import load_image

VALUES = np.arange(-600, 600, dtype=np.int16).reshape(30, 40)
NAME, IDENTITY = "Doe^Jane", "MRN-4711"


def real(name: str) -> Path:
    """One of pydicom's test files, from the installed packages."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"needs {name} of pydicom-data")
    return Path(str(path))


def made(array: npt.NDArray[Any], **attributes: Any) -> Dataset:
    """A small uncompressed image of `array` [H, W] or [F, H, W]; `attributes` add or replace."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = NAME, IDENTITY
    *frames, dataset.Rows, dataset.Columns = array.shape
    if frames:
        dataset.NumberOfFrames = frames[0]
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = array.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset["PixelData"].VR = "OW"
    return dataset


def saved(folder: Path, dataset: Dataset, name: str = "a.dcm") -> Path:
    dcmwrite(folder / name, dataset, enforce_file_format=True)
    return folder / name


def grey(path: Path, **options: Any) -> npt.NDArray[np.uint8]:
    pixels = load_image(path, **options).pixels
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def linear(x: float, centre: float, width: float) -> float:
    """PS3.3 C.11.2.1.2.1, as the standard writes it."""
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0
    if x > centre - 0.5 + (width - 1) / 2:
        return 255
    return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255


def linear_exact(x: float, centre: float, width: float) -> float:
    return min(max((x - centre) / width + 0.5, 0), 1) * 255


def sigmoid(x: float, centre: float, width: float) -> float:
    return 255 / (1 + float(np.exp(-4 * (x - centre) / width)))


@pytest.mark.parametrize(
    ("function", "formula"),
    [("", linear), ("LINEAR", linear), ("LINEAR_EXACT", linear_exact), ("SIGMOID", sigmoid)],
)
def test_rescale_and_window(function: str, formula: Any, tmp_path: Path) -> None:
    dataset = made(
        VALUES,
        RescaleSlope="2",
        RescaleIntercept="-24",
        WindowCenter=["100", "0"],
        WindowWidth=["350", "20"],
    )
    if function:
        dataset.VOILUTFunction = function
    path = saved(tmp_path, dataset)
    expected = [formula(2 * x - 24, 100, 350) for x in VALUES.ravel().tolist()]
    assert np.abs(grey(path).ravel() - np.asarray(expected)).max() <= 0.5001
    assert load_image(path).window == (100, 350)


def test_monochrome1_is_turned_over(tmp_path: Path) -> None:
    window = {"WindowCenter": "0", "WindowWidth": "900"}
    plain = grey(saved(tmp_path, made(VALUES, **window)))
    turned = made(VALUES, PhotometricInterpretation="MONOCHROME1", **window)
    np.testing.assert_array_equal(grey(saved(tmp_path, turned)), 255 - plain)


@pytest.mark.parametrize("width", [None, "0", "-5", ""])
def test_a_ct_without_a_window_shows_soft_tissue(width: str | None, tmp_path: Path) -> None:
    dataset = made(VALUES, Modality="CT")
    if width is not None:
        dataset.WindowCenter, dataset.WindowWidth = "7", width
    path = saved(tmp_path, dataset)
    pixels = grey(path)
    assert load_image(path).window == (40, 400)
    assert not pixels[VALUES < -160].any()
    assert (pixels[VALUES >= 240] == 255).all()
    assert pixels[VALUES == 40].tolist() == [128]


def test_other_deep_values_without_a_window_show_percentiles(tmp_path: Path) -> None:
    path = saved(tmp_path, made(VALUES, Modality="MR"))
    low, high = np.percentile(VALUES, [1, 99])
    expected = np.clip((VALUES - low) / (high - low), 0, 1) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5001
    assert load_image(path).window == pytest.approx(((low + high) / 2, high - low))


def test_8_bit_values_without_a_window_are_shown_as_they_are(tmp_path: Path) -> None:
    values = np.arange(50, 90, dtype=np.uint8).reshape(4, 10)
    path = saved(tmp_path, made(values, Modality="US"))
    np.testing.assert_array_equal(grey(path), values)
    assert load_image(path).window is None


def test_values_beyond_arithmetic_do_no_harm(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, 1e308]])
    dataset = made(values)
    dataset.DoubleFloatPixelData = dataset.PixelData
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit
    path = tmp_path / "a.dcm"
    dcmwrite(path, dataset, enforce_file_format=True)
    assert grey(path)[0, 1] == 255


@pytest.mark.parametrize("kind", ["ModalityLUTSequence", "VOILUTSequence"])
def test_lookup_tables(kind: str, tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 10, 16]
    table.LUTData = [65535, 0, 257 * 9, 257 * 100]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    if kind == "ModalityLUTSequence":
        table.ModalityLUTType = "US"
    values = np.array([[3, 10, 11], [12, 13, 99]], np.uint16)
    window = {"WindowCenter": "32768", "WindowWidth": "65536"}
    extra = window if kind == "ModalityLUTSequence" else {}
    pixels = grey(saved(tmp_path, made(values, **{kind: [table]}, **extra)))
    np.testing.assert_array_equal(pixels, [[255, 255, 0], [9, 100, 100]])


@pytest.mark.parametrize("segmented", [False, True])
def test_palette(segmented: bool, tmp_path: Path) -> None:
    dataset = made(
        np.array([[0, 5, 6], [7, 8, 200]], np.uint8), PhotometricInterpretation="PALETTE COLOR"
    )
    for colour, scale in {"Red": 257, "Green": 128, "Blue": 1}.items():
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [4, 5, 16])
        dataset[f"{colour}PaletteColorLookupTableDescriptor"].VR = "US"
        # Discrete: 2 entries; linear: 2 more, up to 200
        table = [0, 2, 0, 100 * scale, 1, 2, 200 * scale] if segmented else [0, 100, 150, 200]
        words = np.array(table if segmented else np.multiply(table, scale), np.uint16)
        name = f"{'Segmented' * segmented}{colour}PaletteColorLookupTableData"
        setattr(dataset, name, words.tobytes())
    pixels = load_image(saved(tmp_path, dataset)).pixels
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 100], [150, 200, 200]])
    assert np.abs(pixels[..., 1] - [[0, 0, 50], [75, 100, 100]]).max() <= 0.5
    assert pixels[..., 2].max() == 1  # 16-bit entries are shown by their upper half, rounded


def test_a_palette_that_unfolds_without_end(tmp_path: Path) -> None:
    dataset = made(np.array([[0, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [0, 0, 16])
        dataset[f"{colour}PaletteColorLookupTableDescriptor"].VR = "US"
        words = np.array([0, 1, 7] + [1, 65535, 7] * 9000, np.uint16)
        setattr(dataset, f"Segmented{colour}PaletteColorLookupTableData", words.tobytes())
    with pytest.raises(ImageError, match="unsupported colour table"):
        load_image(saved(tmp_path, dataset))


BARS = {  # the colour bars, in files of every photometric interpretation and compression
    "SC_rgb_16bit.dcm": 0,
    "SC_rgb_32bit.dcm": 0,
    "SC_rgb_expb_16bit.dcm": 0,
    "SC_rgb_2frame.dcm": 0,
    "SC_rgb_rle.dcm": 0,
    "SC_rgb_rle_32bit.dcm": 0,
    "SC_rgb_jpeg_gdcm.dcm": 0,
    "SC_rgb_gdcm_KY.dcm": 2,
    "SC_rgb_dcmtk_+eb+cr.dcm": 2,
    "SC_rgb_jpeg_dcmtk.dcm": 3,
    "SC_rgb_jls_lossy_line.dcm": 5,
    "SC_ybr_full_uncompressed.dcm": 2,
    "SC_ybr_full_422_uncompressed.dcm": 2,
}


@pytest.mark.parametrize("name", BARS)
def test_colour_bars(name: str) -> None:
    path = real("SC_rgb.dcm")
    expected = dcmread(path).pixel_array
    np.testing.assert_array_equal(load_image(path).pixels, expected)
    difference = np.abs(load_image(real(name), frame=0).pixels.astype(int) - expected)
    assert np.median(difference) <= BARS[name]
    assert np.percentile(difference, 95) <= 3 * BARS[name]  # subsampling blurs the edges


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_implicit.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ],
)
def test_lossless_transfer_syntaxes_agree(name: str) -> None:
    expected = load_image(real("MR_small.dcm"))
    image = load_image(real(name))
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert image.modality == expected.modality == "mri"
    assert image.spacing == expected.spacing == (0.3125, 0.3125)
    assert image.window == (600, 1600)


@pytest.mark.parametrize(
    ("name", "shape", "modality"),
    [
        ("examples_jpeg2k.dcm", (480, 640), "ultrasound"),  # YBR_RCT
        ("examples_ybr_color.dcm", (240, 320), "ultrasound"),  # YBR_FULL_422, JPEG, 30 frames
        ("examples_palette.dcm", (350, 800), "ultrasound"),
        ("gdcm-US-ALOKA-16.dcm", (480, 640), "ultrasound"),  # a segmented palette
        ("OT-PAL-8-face.dcm", (480, 640), None),  # no preamble, no file meta information
        ("JPGExtended.dcm", (1024, 256), None),  # 12-bit JPEG
        ("image_dfl.dcm", (512, 512), None),  # deflated
        ("liver_1frame.dcm", (512, 512), None),  # one bit a pixel
        ("RG3_J2KI.dcm", (1760, 1760), "xray"),
        ("CT_small.dcm", (128, 128), "ct"),
    ],
)
def test_real_files(name: str, shape: tuple[int, int], modality: str | None) -> None:
    image = load_image(real(name))
    assert image.pixels.shape == (*shape, 3)
    assert image.modality == modality
    assert image.pixels.std() > 10
    np.testing.assert_array_equal(load_image(real(name)).pixels, image.pixels)


@pytest.mark.parametrize(
    ("code", "modality"),
    [
        *(("CT", "ct"), ("MR", "mri"), ("US", "ultrasound"), ("OP", "fundus")),
        *((code, "xray") for code in ("CR", "DX", "DR", "RG", "XA", "MG")),
        *((code, "pathology") for code in ("SM", "GM")),
        *((code, None) for code in ("NM", "PT", "OT", "", None)),
    ],
)
def test_modality(code: str | None, modality: str | None, tmp_path: Path) -> None:
    assert load_image(saved(tmp_path, made(VALUES, Modality=code))).modality == modality


@pytest.mark.parametrize(
    ("attributes", "spacing"),
    [
        ({"PixelSpacing": ["0.5", "0.25"]}, (0.5, 0.25)),
        ({"ImagerPixelSpacing": ["0.5", "0.25"]}, (0.5, 0.25)),
        ({"PixelSpacing": ["0", "0"]}, None),
        ({"PixelSpacing": "0.5"}, None),
        ({}, None),
    ],
)
def test_spacing(attributes: dict[str, Any], spacing: Any, tmp_path: Path) -> None:
    assert load_image(saved(tmp_path, made(VALUES, **attributes))).spacing == spacing


def test_frames() -> None:
    path = real("emri_small.dcm")
    stored = dcmread(path).pixel_array
    for frame in (0, 4, 9):
        image = load_image(path, frame=frame)
        assert image.frames == 10
        low, high = np.percentile(stored[frame], [1, 99])
        expected = np.clip((stored[frame] - low) / (high - low), 0, 1) * 255
        assert np.abs(image.pixels[..., 0] - expected).max() <= 0.5001
    np.testing.assert_array_equal(load_image(path).pixels, load_image(path, frame=4).pixels)
    for frame in (10, -1):
        with pytest.raises(ImageError, match=f"has 10 frames; there is no frame {frame}"):
            load_image(path, frame=frame)


def test_each_frame_has_its_own_window(tmp_path: Path) -> None:
    windows = []
    for centre in (0, 100):
        window, rescale, group = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 200
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, centre
        group.FrameVOILUTSequence = [window]
        group.PixelValueTransformationSequence = [rescale]
        windows.append(group)
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing = [2, 3]
    shared.PixelMeasuresSequence = [measures]
    dataset = made(
        VALUES,
        Rows=15,
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=windows,
    )
    path = saved(tmp_path, dataset)
    for frame, centre in enumerate((0, 100)):
        image = load_image(path, frame=frame)
        assert (image.window, image.spacing) == ((centre, 200), (2, 3))
        stored = VALUES[15 * frame : 15 * frame + 15].ravel().tolist()
        expected = [linear(x + centre, centre, 200) for x in stored]
        assert np.abs(image.pixels[..., 0].ravel() - np.asarray(expected)).max() <= 0.5001


def without(dataset: Dataset, *names: str) -> Dataset:
    for name in names:
        delattr(dataset, name)
    return dataset


def jpeg2000(dataset: Dataset, array: npt.NDArray[Any]) -> Dataset:
    buffer = io.BytesIO()
    Pillow.fromarray(array).save(buffer, "JPEG2000", no_jp2=True)
    dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    dataset.PixelData = encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR = "OB"
    return dataset


BYTES = np.arange(200, dtype=np.uint8).reshape(10, 20)
BAD = {
    "no pixels": (without(made(BYTES), "PixelData"), "without an image"),
    "no rows": (made(BYTES, Rows=0), "has no pixels"),
    "no size": (without(made(BYTES), "Rows", "Columns"), "has no pixels"),
    "a bomb": (made(BYTES, Rows=30_000, Columns=30_000), "limit of 100,000,000 pixels"),
    "frames without end": (made(BYTES, NumberOfFrames=10**8), "more than the limit"),
    "one frame of two": (made(BYTES, NumberOfFrames=2), "damaged"),
    "less than its size": (made(BYTES, Rows=11), "damaged"),
    "strange colours": (made(BYTES, PhotometricInterpretation="CMYK"), "colours of an unsupported"),
    "another size inside": (jpeg2000(made(BYTES), np.zeros((40, 40), "u1")), "of another size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path) -> None:
    dataset, message = BAD[name]
    with pytest.raises(ImageError, match=message) as caught:
        load_image(saved(tmp_path, dataset))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_hostile_rle_frame_does_not_panic(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """pylibjpeg-rle answers overlapping segments with a Rust panic, which is no `Exception`."""
    data = bytearray(real("MR_small_RLE.dcm").read_bytes())
    header = data.index(b"\2\0\0\0\x40\0\0\0")  # two segments, the first at byte 64
    data[header + 8] = 0
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        load_image(path)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_compression(tmp_path: Path) -> None:
    dataset = jpeg2000(made(BYTES), BYTES)
    dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    with pytest.raises(ImageError, match="compressed in an unsupported way"):
        load_image(saved(tmp_path, dataset))


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("all plugins are missing dependencies")

    monkeypatch.setattr(image_dicom, "get_decoder", lambda _: SimpleNamespace(available_plugins=()))
    monkeypatch.setattr(image_dicom, "pixel_array", fail)
    with pytest.raises(MissingDependencyError, match=re.escape("'medmoe-edge[images]'")):
        load_image(saved(tmp_path, jpeg2000(made(BYTES), BYTES)))


def test_a_deflated_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(BYTES)
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    path = saved(tmp_path, dataset)
    np.testing.assert_array_equal(grey(path), BYTES)
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    plain = path.read_bytes()[:132]
    plain += path.read_bytes()[132 : path.read_bytes().index(b"1.2.840.10008.1.2.1.99") + 22]
    bomb = deflater.compress(bytes(10**6)) + deflater.flush()
    path.write_bytes(plain + bomb)
    monkeypatch.setattr(image_dicom, "MAX_BYTES", 10**5)
    with pytest.raises(ImageError, match="inflates to more than 100,000 bytes"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_size_of_a_compressed_picture(kind: str, mode: str) -> None:
    buffer = io.BytesIO()
    Pillow.new(mode, (37, 21)).save(buffer, kind)
    assert image_dicom.jpeg_size(buffer.getvalue()) == (21, 37, len(mode))
    assert image_dicom.jpeg_size(b"no picture") is None


def test_messages_keep_the_patient_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    data = saved(tmp_path, made(VALUES, NumberOfFrames=1, WindowCenter="1", WindowWidth="2"))
    whole = data.read_bytes()
    said = ""
    for old, new in {
        b"CS": b"DS",  # the photometric interpretation as a number
        b"IS": b"US",
        b"PN": b"SQ",
        b"OW": b"PN",
    }.items():
        data.write_bytes(whole.replace(old, new))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                load_image(data)
            except ImageError as error:
                said += str(error)
    assert "damaged" in said
    assert "Doe" not in said
    assert "4711" not in said
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


SEEDS = [
    "MR_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_rle_2frame.dcm",
    "SC_rgb_small_odd.dcm",
    "image_dfl.dcm",
]
EDITS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(name=st.sampled_from(SEEDS), edits=EDITS, cut=st.none() | st.integers(133, 3000))
def test_hostile_files(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    edits: list[tuple[int, int]],
    cut: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.dcm"
    check_damaged(path, real(name).read_bytes(), edits, cut)
