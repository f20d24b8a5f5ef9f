"""What real devices write wrongly, kind by kind: the right picture, or a refusal that says why."""

import io
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from dicom_files import codes, compressed, fragmented, grey, made, saved
from PIL import Image as Pillow
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataelem import DataElement
from pydicom.encaps import encapsulate

from medmoe_edge.errors import ImageError
from medmoe_edge.image import codestreams
from medmoe_edge.image.loading import load_image

BYTES = np.arange(200, dtype=np.uint8).reshape(10, 20)
DEEP = np.arange(0, 4000, 20, dtype=np.uint16).reshape(10, 20)
SIGNED = DEEP.astype(np.int16) - 2000
WINDOW = {"WindowCenter": "2000", "WindowWidth": "4001"}
SHOWN = np.rint(np.clip((DEEP - 1999.5) / 4000 + 0.5, 0, 1) * 255)


def twelve(array: Any = DEEP, **attributes: Any) -> Dataset:
    return made(array, **{"BitsStored": 12, "HighBit": 11, **WINDOW, **attributes})


def table(descriptor: list[int], data: Any, vr: str = "OW", descriptor_vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", descriptor_vr, descriptor)
    item.add_new("LUTData", vr, data)
    return item


def shows(dataset: Dataset, folder: Path, expected: Any, within: float = 1) -> None:
    pixels = grey(saved(folder, dataset)).astype(float)
    assert np.abs(pixels - expected).max() <= within


# --- Attributes that are empty or odd ----------------------------------------

ODD: list[tuple[str, str, Any]] = [
    *((keyword, "DS", None) for keyword in ("RescaleSlope", "RescaleIntercept", "PixelSpacing")),
    *((keyword, "US", None) for keyword in ("PixelRepresentation", "HighBit", "NumberOfFrames")),
    *((keyword, "US", None) for keyword in ("PlanarConfiguration", "PixelPaddingValue")),
    *((keyword, "SQ", []) for keyword in ("VOILUTSequence", "ModalityLUTSequence")),
    *((keyword, "SQ", [Dataset()]) for keyword in ("VOILUTSequence", "ModalityLUTSequence")),
    *((keyword, "LO", "nothing") for keyword in ("VOILUTSequence", "ModalityLUTSequence")),
    ("VOILUTSequence", "SQ", [table([4, 0, 16], None), Dataset()]),
    ("VOILUTSequence", "SQ", [table([4], b"\0" * 8)]),
    ("PixelSpacing", "DS", ["0.5"]),
    ("PixelSpacing", "DS", ["0", "0"]),
    ("PixelSpacing", "LO", "wide"),
    ("PixelAspectRatio", "IS", ["0", "1"]),
    ("ImagerPixelSpacing", "DS", ["-1", "2"]),
    ("RescaleSlope", "LO", "one"),
    ("RescaleSlope", "DS", ["1", "2"]),
    ("RescaleSlope", "OB", b"1 "),
    ("NumberOfFrames", "IS", ["1", "2"]),
    ("NumberOfFrames", "IS", "0"),
    ("VOILUTFunction", "CS", "ODD"),
    ("VOILUTFunction", "CS", ["LINEAR", "SIGMOID"]),
    ("PresentationLUTShape", "CS", None),
    ("PhotometricInterpretation", "CS", "MONOCHROME2 "),
    ("SamplesPerPixel", "US", None),
    ("PixelRepresentation", "CS", "SIGNED"),
    ("Modality", "CS", ["CT", "PT"]),
    ("SharedFunctionalGroupsSequence", "SQ", [Dataset()]),
    ("PerFrameFunctionalGroupsSequence", "LO", "none"),
    ("WindowCenter", "DS", ["2000", "40", "1"]),
    ("SmallestImagePixelValue", "US", None),
    ("PixelPaddingValue", "UN", b"99"),  # 0x3939: not the number in these letters
]


@pytest.mark.parametrize(("keyword", "vr", "value"), ODD)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_an_odd_attribute_does_not_stop_the_picture(
    keyword: str, vr: str, value: Any, tmp_path: Path
) -> None:
    dataset = twelve()
    dataset[keyword] = DataElement(keyword, vr, value)
    shows(dataset, tmp_path, SHOWN)


@pytest.mark.parametrize("keyword", ["WindowCenter", "WindowWidth"])
@pytest.mark.parametrize("value", [None, "x"])
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_half_a_window_is_none(keyword: str, value: Any, tmp_path: Path) -> None:
    dataset = twelve(Modality="MR")
    dataset[keyword] = DataElement(keyword, "LO", value)
    assert "no_window" in codes(saved(tmp_path, dataset))


def test_a_second_window_stands_in_for_a_first_that_is_none(tmp_path: Path) -> None:
    dataset = twelve(WindowCenter=["5", "2000"], WindowWidth=["0", "4001"])
    shows(dataset, tmp_path, SHOWN)


@pytest.mark.parametrize(
    ("centre", "width", "told"),
    [(b"2000\\", b"4001\\", []), (b"2000\\x ", b"4001\\1 ", ["header"])],
)
def test_a_value_that_is_none_takes_no_other_with_it(
    centre: bytes, width: bytes, told: list[str], tmp_path: Path
) -> None:
    path = saved(tmp_path, twelve(WindowCenter="12345", WindowWidth="54321"))
    data = path.read_bytes()
    for old, new in ((b"12345 ", centre), (b"54321 ", width)):
        data = data.replace(b"DS\x06\0" + old, b"DS" + bytes([len(new) + len(new) % 2, 0]) + new)
        data = data.replace(new, new + b" " * (len(new) % 2))
    path.write_bytes(data)
    assert np.abs(grey(path).astype(float) - SHOWN).max() <= 1
    assert codes(path) == told


@pytest.mark.parametrize("keyword", ["RescaleSlope", "PixelSpacing", "WindowCenter"])
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_what_is_stated_and_is_no_number_is_told_of(keyword: str, tmp_path: Path) -> None:
    dataset = twelve(Modality="MR", RescaleIntercept="0")
    dataset[keyword] = DataElement(keyword, "LO", "2,5")
    assert "header" in codes(saved(tmp_path, dataset))


def test_a_number_of_too_few_bytes_is_told_of(tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    whole, odd = b"\x28\0\x01\x01US\2\0\x0c\0", b"\x28\0\x01\x01US\3\0\x0c\0\0"
    path.write_bytes(path.read_bytes().replace(whole, odd))
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == ["header"]


@pytest.mark.parametrize("half", [{"RescaleSlope": "2"}, {"RescaleIntercept": "-1024"}])
def test_half_a_rescale_is_told_of(half: dict[str, str], tmp_path: Path) -> None:
    assert codes(saved(tmp_path, twelve(**half))) == ["rescale"]


def of(**attributes: Any) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


BRIGHT = table([4096, 0, 16], b"\xff\xff" * 4096)


@pytest.mark.parametrize(
    ("outside", "group", "inside"),
    [
        ({"VOILUTSequence": [BRIGHT]}, "FrameVOILUTSequence", WINDOW),
        ({"VOILUTFunction": "SIGMOID"}, "FrameVOILUTSequence", WINDOW),
        (WINDOW, "FrameVOILUTSequence", {"WindowCenter": "7"}),
        (WINDOW, "FrameVOILUTSequence", {"VOILUTSequence": []}),
        (
            {"ModalityLUTSequence": [BRIGHT], **WINDOW},
            "PixelValueTransformationSequence",
            {"RescaleSlope": "1", "RescaleIntercept": "0"},
        ),
    ],
)
def test_a_frame_says_all_of_a_transformation_or_nothing(
    outside: dict[str, Any], group: str, inside: dict[str, Any], tmp_path: Path
) -> None:
    dataset = made(DEEP, BitsStored=12, HighBit=11, **outside)
    dataset.PerFrameFunctionalGroupsSequence = [of(**{group: [of(**inside)]})]
    shows(dataset, tmp_path, SHOWN)


@pytest.mark.parametrize(
    ("half", "centre"), [({"RescaleIntercept": "500"}, "2500"), ({"RescaleSlope": "1"}, "2000")]
)
def test_half_a_rescale_of_a_frame_is_not_made_whole_outside(
    half: dict[str, str], centre: str, tmp_path: Path
) -> None:
    outside = {"RescaleSlope": "2", "RescaleIntercept": "-1000"}
    dataset = twelve(**outside, WindowCenter=centre, WindowWidth="4001")
    groups = of(PixelValueTransformationSequence=[of(**half)])
    dataset.PerFrameFunctionalGroupsSequence = [groups]
    shows(dataset, tmp_path, SHOWN)
    told = codes(tmp_path / "a.dcm")
    assert told == ["rescale"] * ("RescaleIntercept" in half)  # a slope of 1 alone changes nothing


def test_what_a_viewer_may_do_and_is_not_done_is_told_of(tmp_path: Path) -> None:
    dataset = twelve(ShutterShape="CIRCULAR", RecommendedViewingMode="SUB")
    shows(dataset, tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["shutter", "subtraction"]


def test_a_slope_of_zero_is_told_of(tmp_path: Path) -> None:
    dataset = twelve(RescaleSlope="0", RescaleIntercept="7")
    shows(dataset, tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["rescale"]


# --- Lookup tables -----------------------------------------------------------

RAMP = np.arange(4096)


def words(values: Any) -> bytes:
    return np.asarray(values).astype("<u2").tobytes()


TABLES = [  # each with the greatest entry that it can hold
    (table([4096, 0, 12], words(RAMP)), 4095),
    (table([4096, 0, 16], words(RAMP)), 4095),  # more bits than the entries have
    (table([4096, 0, 8], words(RAMP)), 4095),  # fewer
    (table([4096, 0, 0], words(RAMP)), 4095),
    (table([0, 0, 12], words(RAMP)), 4095),  # 65,536 entries by the descriptor
    (table([1000, 0, 12], words(RAMP)), 4095),  # fewer than there are
    (table([4096, 0, 12], RAMP.tolist(), "US"), 4095),
    (table([4096, 0, 8], (RAMP >> 4).astype(np.uint8).tobytes()), 255),  # two to a word
    (table([4096, 0, 8], words(RAMP >> 4)), 255),  # one to a word
    (table([4096, 0, 8], words(RAMP >> 4 << 8)), 255),  # in its upper half
    (table([4096, 0, 16], (RAMP >> 4).astype(np.uint8).tobytes()), 255),
    (table([4095, 1, 12], words(RAMP[1:])), 4095),
]


@pytest.mark.parametrize("number", range(len(TABLES)))
@pytest.mark.parametrize("kind", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_is_taken_as_what_it_holds(kind: str, number: int, tmp_path: Path) -> None:
    item, greatest = TABLES[number]
    dataset = twelve(Modality="MR", **{kind: [item]})
    if kind == "ModalityLUTSequence":
        dataset.WindowCenter, dataset.WindowWidth = (greatest + 1) / 2, greatest + 1
    shows(dataset, tmp_path, np.rint(DEEP / 4095 * 255), within=1.1)


@pytest.mark.parametrize(("first", "vr"), [(-1024, "SS"), (64512, "US")])
def test_the_first_value_mapped_is_read_with_the_sign_that_meets_the_image(
    first: int, vr: str, tmp_path: Path
) -> None:
    item = table([4096, first, 12], words(RAMP), descriptor_vr=vr)
    dataset = twelve(RescaleSlope="1", RescaleIntercept="-1024", VOILUTSequence=[item])
    shows(dataset, tmp_path, np.rint(DEEP / 4095 * 255))


def test_big_endian_tables(tmp_path: Path) -> None:
    dataset = twelve(VOILUTSequence=[table([4096, 0, 12], RAMP.astype(">u2").tobytes())])
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    dataset.PixelData = DEEP.astype(">u2").tobytes()
    shows(dataset, tmp_path, np.rint(DEEP / 4095 * 255))


def test_a_palette_of_8_bits_in_words_of_16(tmp_path: Path) -> None:
    dataset = made(BYTES, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", words(np.arange(256)))
    shows(dataset, tmp_path, BYTES)


@pytest.mark.parametrize(
    ("greatest", "declared", "bits"),
    [
        (100, 8, 8),  # dark: less than half of white
        (25_500, 16, 16),
        (16_000, 16, 16),
        (16_383, 16, 14),  # the greatest of 14 bits: white
        (4000, 16, 12),  # far too few bits for a dark one
        (4000, 8, 12),
    ],
)
def test_a_dark_table_stays_dark_and_one_of_fewer_bits_is_told(
    greatest: int, declared: int, bits: int, tmp_path: Path
) -> None:
    entries = np.rint(np.linspace(0, greatest, 4096)).astype(int)
    expected = np.rint(entries[DEEP] * 255 / (2**bits - 1))
    dataset = twelve(VOILUTSequence=[table([4096, 0, declared], words(entries))])
    shows(dataset, tmp_path, expected)
    assert codes(tmp_path / "a.dcm") == ["lookup_table"] * (bits != declared)
    dataset = made(BYTES, PhotometricInterpretation="PALETTE COLOR")
    entries = np.rint(np.linspace(0, greatest, 200)).astype(int)
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [200, 0, declared])
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", words(entries))
    shows(dataset, tmp_path, np.rint(entries[BYTES] * 255 / (2**bits - 1)))
    assert codes(tmp_path / "a.dcm") == ["lookup_table"] * (bits != declared)


@pytest.mark.parametrize(("held", "told"), [(100, ["lookup_table"]), (4096, [])])
def test_a_table_that_ends_early_is_told_of(held: int, told: list[str], tmp_path: Path) -> None:
    dataset = twelve(VOILUTSequence=[table([0, 0, 16], words(RAMP[:held] * 16 + 63_999))])
    assert [code for code in codes(saved(tmp_path, dataset)) if code == "lookup_table"] == told


def test_a_palette_that_repeats_a_segment_of_8_bits(tmp_path: Path) -> None:
    values = np.arange(253, 259, dtype=np.uint16)[None]
    dataset = made(values, PhotometricInterpretation="PALETTE COLOR")
    # 7 255 times; at byte 257 a line to 249, which is the first of one segment there; 33, 90
    segments = bytes([0, 255, *[7] * 255, 1, 1, 249, 2, 1, 1, 1, 0, 0, 0, 2, 33, 90, 0])
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [259, 0, 8])
        dataset.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", segments)
    shows(dataset, tmp_path, [[7, 7, 249, 249, 33, 90]], within=0)


def test_colours_beside_grey_values_are_told_of(tmp_path: Path) -> None:
    dataset = twelve()
    for colour in ("Red", "Green", "Blue"):
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [96, 4000, 16])
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", words(np.arange(96)))
    shows(dataset, tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["palette"]


def test_a_presentation_table(tmp_path: Path) -> None:
    item = table([256, 0, 8], np.arange(255, -1, -1).astype(np.uint8).tobytes())
    shows(twelve(PresentationLUTSequence=[item]), tmp_path, 255 - SHOWN)


# --- Bits, sign and padding --------------------------------------------------


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("signed", [False, True])
def test_values_lie_where_the_high_bit_says(high: int, signed: bool, tmp_path: Path) -> None:
    values = SIGNED if signed else DEEP
    cells = (values.astype(np.int64) & 0xFFF) << (high - 11)
    cells |= 0xAAAA & ~(0xFFF << (high - 11))  # overlays
    dataset = twelve(cells.astype(np.uint16), HighBit=high, PixelRepresentation=int(signed))
    if signed:
        dataset.WindowCenter = "0"
    shows(dataset, tmp_path, SHOWN)


@pytest.mark.parametrize("high", [3, 16])
def test_a_high_bit_that_cannot_be_is_told_of(high: int, tmp_path: Path) -> None:
    shows(twelve(HighBit=high), tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["header"]


@pytest.mark.parametrize(("stored", "told"), [(400, []), (600, ["header"])])
def test_shared_colours(stored: int, told: list[str], tmp_path: Path) -> None:
    colours = np.full((10, 20, 3), 128, np.uint8)
    dataset = made(colours, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422")
    dataset.PixelData = dataset.PixelData[:stored]
    shows(dataset, tmp_path, 128)
    assert [code for code in codes(tmp_path / "a.dcm") if code != "no_contrast"] == told
    dataset.PixelData = dataset.PixelData[: stored - 50]  # neither all of them nor half
    with pytest.raises(ImageError, match="fewer pixels"):
        load_image(saved(tmp_path, dataset))


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("behind", [bytes(2), bytes(4), bytes(64), b"Jane" * 9])
def test_what_lies_behind_shared_colours_is_told_of(
    frames: int, behind: bytes, tmp_path: Path
) -> None:
    """Less than a row, or zeros."""
    colours = np.full((frames, 20, 20, 3), 128, np.uint8)
    dataset = made(colours[0], SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422")
    dataset.NumberOfFrames, dataset.PixelData = frames, bytes([128]) * 800 * frames + behind
    shows(dataset, tmp_path, 128)
    assert [code for code in codes(tmp_path / "a.dcm") if code != "no_contrast"] == ["unused_data"]


def test_frames_that_end_where_shared_colours_would_are_cut_off(tmp_path: Path) -> None:
    colours = np.full((20, 20, 3), 128, np.uint8)
    dataset = made(colours, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422")
    dataset.NumberOfFrames, dataset.PixelData = 3, bytes([128]) * 3200  # of 3,600
    with pytest.raises(ImageError, match="fewer pixels"):
        load_image(saved(tmp_path, dataset))


def test_what_is_no_number_counts_for_nothing(tmp_path: Path) -> None:
    values = np.linspace(-9, -1, 200, dtype=np.float32).reshape(10, 20)
    expected = np.rint(np.clip((values + 8.92) / 7.84, 0, 1) * 255)
    values = np.vstack([values, np.full((90, 20), np.nan, np.float32)])
    dataset = made(values, Modality="MR", BitsAllocated=32)
    dataset.FloatPixelData = dataset.PixelData
    del dataset.PixelData
    shows(dataset, tmp_path, np.vstack([expected, np.zeros((90, 20))]))


@pytest.mark.parametrize(
    ("attributes", "modality"),
    [({}, "CT"), ({"RescaleSlope": "1", "RescaleIntercept": "0"}, "CT"), ({}, "OT")],
)
def test_a_capture_of_8_bits_is_shown_as_it_is(
    attributes: dict[str, Any], modality: str, tmp_path: Path
) -> None:
    shows(made(BYTES, Modality=modality, **attributes), tmp_path, BYTES, within=0)


@pytest.mark.parametrize("value", [-2000, 63536])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_moves_no_window(value: int, photometric: str, tmp_path: Path) -> None:
    values = np.full((20, 20), -2000, np.int16)
    values[5:15, 5:15] = np.arange(100).reshape(10, 10)
    dataset = made(values, Modality="MR", PhotometricInterpretation=photometric)
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    pixels = grey(saved(tmp_path, dataset))
    assert not pixels[values == -2000].any()
    assert np.ptp(pixels[5:15, 5:15]) == 255
    assert load_image(tmp_path / "a.dcm").window == pytest.approx((49.5, 97.02))


def test_a_range_of_padding(tmp_path: Path) -> None:
    dataset = twelve(PixelPaddingValue=3000)
    dataset.add_new("PixelPaddingRangeLimit", "US", 3500)
    expected = np.where((DEEP >= 3000) & (DEEP <= 3500), 0, SHOWN)
    shows(dataset, tmp_path, expected)


def test_padding_of_everything_is_not_believed(tmp_path: Path) -> None:
    dataset = twelve(PixelPaddingValue=0)
    dataset.add_new("PixelPaddingRangeLimit", "US", 4095)
    shows(dataset, tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["padding"]


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "IDENTITY", False),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
    ],
)
def test_a_presentation_shape(
    photometric: str, shape: str | None, inverted: bool, tmp_path: Path
) -> None:
    dataset = twelve(PhotometricInterpretation=photometric)
    if shape:
        dataset.PresentationLUTShape = shape
    shows(dataset, tmp_path, 255 - SHOWN if inverted else SHOWN)


def test_raw_values_and_overlays_are_told_of(tmp_path: Path) -> None:
    dataset = twelve(PresentationIntentType="FOR PROCESSING")
    dataset.add_new((0x6000, 0x0010), "US", 10)
    assert codes(saved(tmp_path, dataset)) == ["for_processing", "overlay"]


def test_a_ct_without_a_window_is_soft_tissue_only_if_its_values_are_hounsfield(
    tmp_path: Path,
) -> None:
    dataset = made(DEEP, Modality="CT")
    assert load_image(saved(tmp_path, dataset)).window != (40, 400)
    dataset.RescaleIntercept, dataset.RescaleSlope = "-1024", "1"
    assert load_image(saved(tmp_path, dataset)).window == (40, 400)
    dataset = made(BYTES, Modality="CT", RescaleIntercept="-1024", RescaleSlope="1")
    assert grey(saved(tmp_path, dataset)).max() == 255, "8 bits that reach no soft tissue"


def test_one_of_many_tiles_is_told_of(tmp_path: Path) -> None:
    tiles = np.stack([BYTES] * 3)
    whole = {"TotalPixelMatrixRows": 10, "TotalPixelMatrixColumns": 20}
    assert codes(saved(tmp_path, made(BYTES, **whole))) == []
    whole["TotalPixelMatrixColumns"] = 60
    assert codes(saved(tmp_path, made(tiles, **whole))) == ["tile"]


def test_signed_colours_are_read_unsigned(tmp_path: Path) -> None:
    pixels = np.dstack([BYTES, BYTES[::-1], 255 - BYTES])
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    path = saved(tmp_path, made(pixels, PixelRepresentation=1, **colours))
    assert (load_image(path).pixels == pixels).all()
    assert codes(path) == ["header"]
    stream = bytes(imagecodecs.jpeg2k_encode(pixels.astype(np.int8), codecformat="J2K", mct=False))
    path = saved(tmp_path, compressed(made(pixels, **colours), uid.JPEG2000Lossless, [stream]))
    with pytest.raises(ImageError, match="signed"):
        load_image(path)


# --- Proportions -------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value", "shape"),
    [
        ("PixelSpacing", ["2", "1"], (20, 20)),
        ("PixelSpacing", ["1", "2"], (10, 40)),
        ("ImagerPixelSpacing", ["0.3", "0.1"], (30, 20)),
        ("NominalScannedPixelSpacing", ["2", "1"], (20, 20)),
        ("FramePixelDataPropertiesSequence", ["2", "1"], (20, 20)),
        ("PixelAspectRatio", ["2", "1"], (20, 20)),
        ("PixelAspectRatio", ["4", "3"], (13, 20)),
        ("PixelSpacing", ["1000", "1"], (10, 20)),
    ],
)
def test_true_proportions(
    attribute: str, value: list[str], shape: tuple[int, int], tmp_path: Path
) -> None:
    dataset = twelve(**{attribute: value}) if attribute[-8:] != "Sequence" else twelve()
    if attribute[-8:] == "Sequence":
        group = of(**{attribute: [of(ImagerPixelSpacing=value)]})
        dataset.SharedFunctionalGroupsSequence = [group]
    image = load_image(saved(tmp_path, dataset))
    assert image.pixels.shape == (*shape, 3)
    rows = np.arange(shape[0]) * 10 // shape[0]
    columns = np.arange(shape[1]) * 20 // shape[1]
    if shape[0] != 13:
        expected = SHOWN[rows][:, columns]
        assert np.abs(image.pixels[..., 0] - expected).max() <= 1


# --- The container -----------------------------------------------------------


def bare(dataset: Dataset, folder: Path, *, implicit: bool, little: bool) -> Path:
    """The data set without preamble and group 2."""
    path = folder / "bare"
    del dataset.file_meta
    dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little)
    return path


@pytest.mark.parametrize(("implicit", "little"), [(False, True), (False, False), (True, True)])
def test_neither_preamble_nor_group_2(implicit: bool, little: bool, tmp_path: Path) -> None:
    dataset = twelve()
    dataset.PixelData = DEEP.astype("<u2" if little else ">u2").tobytes()
    path = bare(dataset, tmp_path, implicit=implicit, little=little)
    assert np.abs(grey(path) - SHOWN).max() <= 1


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("implicit", "little"), [(False, True), (False, False), (True, True)])
def test_attributes_behind_the_pixels_count_where_nothing_else_says_the_same(
    native: bool, implicit: bool, little: bool, tmp_path: Path
) -> None:
    def written(dataset: Dataset) -> bytes:
        file = io.BytesIO()
        dcmwrite(file, dataset, implicit_vr=implicit, little_endian=little)
        return file.getvalue()

    dataset = twelve(WindowCenter="1000", WindowWidth=None)
    del dataset.file_meta, dataset.WindowWidth
    dataset.PixelData = DEEP.astype("<u2" if little else ">u2").tobytes()
    late = Dataset()
    late.Rows, late.WindowCenter, late.WindowWidth = 3, "7", "501"
    data = written(dataset)
    if not native:
        if implicit or not little:
            pytest.skip("compressed pixels are in explicit little endian")
        del dataset.PixelData
        pixels = fragmented([bytes(imagecodecs.jpegls_encode(DEEP))], [])
        data = written(dataset) + b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + pixels
    path = tmp_path / "late"
    path.write_bytes(data + written(late))
    expected = np.rint(np.clip((DEEP - 999.5) / 500 + 0.5, 0, 1) * 255)
    assert np.abs(grey(path) - expected).max() <= 1
    assert codes(path) == ["misplaced"]


@pytest.mark.parametrize(
    "behind", [b"    junk trailer    ", DEEP.tobytes()[:128], b"\x28\0\x50\x10" * 9]
)
def test_bytes_behind_the_pixels_that_are_no_attributes(behind: bytes, tmp_path: Path) -> None:
    path = bare(twelve(), tmp_path, implicit=True, little=True)
    path.write_bytes(path.read_bytes() + behind)
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == []


@pytest.mark.parametrize(
    "behind", [bytes(64), b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0abcd", b"\x28\0\x50"]
)
def test_padding_behind_the_pixels_is_nothing(behind: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    path.write_bytes(path.read_bytes() + behind)
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == []


@pytest.mark.parametrize("cut", [128, 132])
def test_group_2_without_a_preamble(cut: int, tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    path.write_bytes(path.read_bytes()[cut:])
    assert np.abs(grey(path) - SHOWN).max() <= 1


def test_what_the_data_set_is_decides_over_its_transfer_syntax(tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"))
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == ["transfer_syntax"]


@pytest.mark.parametrize(
    ("syntax", "order", "told"),
    [
        (b"1.3.46.670589.33.1.4.1", "<", ["transfer_syntax"]),  # private, of pixels as usual
        (b"1.2.840.10008.5.1.4.1.1.7", "<", ["transfer_syntax"]),  # no transfer syntax at all
        (b"1.2.840.113619.5.2", ">", []),  # GE's: pixels alone in big endian
    ],
)
def test_a_transfer_syntax_that_the_standard_does_not_know(
    syntax: bytes, order: str, told: list[str], tmp_path: Path
) -> None:
    dataset = twelve()
    dataset.PixelData = DEEP.astype(f"{order}u2").tobytes()
    path = saved(tmp_path, dataset)
    whole = path.read_bytes()
    at = 144 + int.from_bytes(whole[140:144], "little")
    if not told:
        path = bare(dataset, tmp_path, implicit=True, little=True)
        whole, at = path.read_bytes(), 0
    syntax += b"\0" * (len(syntax) % 2)
    group = b"\x02\0\x10\0UI" + bytes([len(syntax), 0]) + syntax
    path.write_bytes(bytes(128) + b"DICM" + group + whole[at:])
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == told


def test_plain_pixels_of_what_states_a_video_are_told_of(tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    plain, video = b"\x14\x001.2.840.10008.1.2.1\0", b"\x18\x001.2.840.10008.1.2.4.102\0"
    data = path.read_bytes().replace(plain, video)
    path.write_bytes(data[:140] + bytes([data[140] + 4]) + data[141:])
    assert np.abs(grey(path) - SHOWN).max() <= 1
    assert codes(path) == ["transfer_syntax"]


def test_frames_of_their_own_that_are_not_compressed(tmp_path: Path) -> None:
    dataset = twelve(np.stack([DEEP, DEEP[::-1]]))
    syntax = uid.UID(
        "1.2.840.10008.1.2.1.98"
    )  # Encapsulated Uncompressed Explicit VR Little Endian
    compressed(dataset, syntax, [DEEP.tobytes(), DEEP[::-1].tobytes()])
    assert np.abs(grey(saved(tmp_path, dataset), frame=1) - SHOWN[::-1]).max() <= 1


def test_deflated_with_a_zlib_header_or_not_at_all(tmp_path: Path) -> None:
    dataset = twelve()
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    path = saved(tmp_path, dataset)
    whole = path.read_bytes()
    at = 132 + 12 + int.from_bytes(whole[140:144], "little")
    inside = zlib.decompress(whole[at:], -zlib.MAX_WBITS)
    for data in (zlib.compress(inside), inside):
        path.write_bytes(whole[:at] + data)
        assert np.abs(grey(path) - SHOWN).max() <= 1


def test_a_cut_off_file_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path, twelve())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ImageError, match="holds fewer pixels than its header states"):
        load_image(path)


def test_files_without_pixels_are_called_by_their_names(tmp_path: Path) -> None:
    dataset = twelve(SOPClassUID=uid.BasicTextSRStorage)
    del dataset.PixelData
    with pytest.raises(ImageError, match=r"without an image \(Basic Text SR Storage\)"):
        load_image(saved(tmp_path, dataset))


# --- Codestreams and fragments -----------------------------------------------


def jpeg(array: Any, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(array, level=100, **options))


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (16, 8), (16, 12), (16, 16)])
def test_a_codestream_of_8_bits_is_of_8_bits(
    allocated: int, stored: int, signed: int, tmp_path: Path
) -> None:
    dataset = made(BYTES, BitsAllocated=allocated, BitsStored=stored, HighBit=stored - 1)
    dataset.PixelRepresentation = signed if stored > 8 else 0
    shows(compressed(dataset, uid.JPEGBaseline8Bit, [jpeg(BYTES)]), tmp_path, BYTES, within=3)


@pytest.mark.parametrize(("stored", "least"), [(12, -2048), (14, 0), (16, 0)])
def test_a_codestream_of_fewer_bits_has_none_for_the_sign(
    stored: int, least: int, tmp_path: Path
) -> None:
    data = imagecodecs.jpeg2k_encode(
        DEEP, level=0, reversible=True, codecformat="J2K", bitspersample=12
    )
    header = {"BitsStored": stored, "HighBit": stored - 1, "PixelRepresentation": 1}
    dataset = made(DEEP, **header, WindowCenter=str(2048 + least), WindowWidth="4096")
    values = np.where((DEEP >= 2048) & (least < 0), DEEP.astype(int) - 4096, DEEP)
    expected = np.rint(np.clip((values - (2047.5 + least)) / 4095 + 0.5, 0, 1) * 255)
    shows(compressed(dataset, uid.JPEG2000Lossless, [bytes(data)]), tmp_path, expected)


def test_a_signed_codestream_is_told_of_where_the_file_states_no_sign(tmp_path: Path) -> None:
    data = imagecodecs.jpeg2k_encode(SIGNED, level=0, reversible=True, codecformat="J2K")
    dataset = made(DEEP, WindowCenter="0", WindowWidth="4001")
    shows(compressed(dataset, uid.JPEG2000Lossless, [bytes(data)]), tmp_path, SHOWN)
    assert codes(tmp_path / "a.dcm") == ["header"]


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2"])
@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_colours_are_what_the_codestream_says(
    photometric: str, subsampling: str, tmp_path: Path
) -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:, :8] = 200, 30, 60
    data = jpeg(colour, subsampling=subsampling)  # JFIF, that is YCbCr
    samples = 1 if photometric == "MONOCHROME2" else 3
    dataset = made(
        colour[..., 0] if samples == 1 else colour,
        SamplesPerPixel=samples,
        PhotometricInterpretation=photometric,
    )
    pixels = load_image(saved(tmp_path, compressed(dataset, uid.JPEGBaseline8Bit, [data]))).pixels
    assert np.abs(pixels.astype(int) - colour).mean() < 4
    assert (codes(tmp_path / "a.dcm") == ["header"]) == (samples == 1)


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("table_of", ["none", "frames", "fragments", "nonsense"])
@pytest.mark.parametrize("frames", [1, 3])
def test_fragments(pieces: int, table_of: str, frames: int, tmp_path: Path) -> None:
    arrays = [np.roll(BYTES, frame, axis=0) for frame in range(frames)]
    fragments, starts, every, at = [], [], [], 0
    for array in arrays:
        data = jpeg(array)
        step = (len(data) // pieces + 1) // 2 * 2
        starts.append(at)
        for i in range(pieces):
            part = data[i * step : (i + 1) * step if i < pieces - 1 else None]
            every.append(at)
            at += 8 + len(part) + len(part) % 2
            fragments.append(part)
    offsets = {"none": [], "frames": starts, "fragments": every, "nonsense": [5, 1, 9]}[table_of]
    dataset = made(np.stack(arrays) if frames > 1 else BYTES)
    compressed(dataset, uid.JPEGBaseline8Bit, [b"\0\0"])
    dataset.PixelData = fragmented(fragments, offsets)
    path = saved(tmp_path, dataset)
    for frame, array in enumerate(arrays):
        assert np.abs(grey(path, frame=frame).astype(int) - array).max() <= 3


def test_fewer_pictures_than_frames_are_refused_and_more_are_told_of(tmp_path: Path) -> None:
    dataset = compressed(made(BYTES), uid.JPEGBaseline8Bit, [jpeg(BYTES)] * 3)
    dataset.NumberOfFrames = 4
    with pytest.raises(ImageError, match="states 4 frames and holds 3"):
        load_image(saved(tmp_path, dataset))
    dataset.NumberOfFrames = 2
    assert codes(saved(tmp_path, dataset)) == ["frames"]


@pytest.mark.parametrize("marked", [True, False])
def test_encapsulated_pixels_of_a_stated_length(marked: bool, tmp_path: Path) -> None:
    dataset = made(BYTES)
    dataset.PixelData = encapsulate([jpeg(BYTES)]) + b"\xfe\xff\xdd\xe0\0\0\0\0" * marked
    path = saved(tmp_path, dataset)  # as if it were not compressed
    assert np.abs(grey(path).astype(int) - BYTES).max() <= 3


NOISE = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
SMOOTH = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
STREAMS = {
    "baseline": (uid.JPEGBaseline8Bit, jpeg(SMOOTH)),
    "colour": (uid.JPEGBaseline8Bit, jpeg(np.stack([SMOOTH] * 3, -1), subsampling="420")),
    "extended": (uid.JPEGExtended12Bit, jpeg(NOISE, bitspersample=12)),
    "lossless": (
        uid.JPEGLosslessSV1,
        bytes(imagecodecs.jpeg8_encode(NOISE, lossless=True, bitspersample=12)),
    ),
    "jpeg-ls": (uid.JPEGLSLossless, bytes(imagecodecs.jpegls_encode(NOISE))),
    "jpeg 2000": (
        uid.JPEG2000Lossless,
        bytes(imagecodecs.jpeg2k_encode(NOISE, codecformat="J2K", reversible=True)),
    ),
    "htj2k": (uid.HTJ2KLossless, bytes(imagecodecs.htj2k_encode(NOISE, reversible=True))),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_codestream_that_is_cut_off_is_refused(
    kind: str, share: float, end: bytes, tmp_path: Path
) -> None:
    syntax, data = STREAMS[kind]
    colour = kind == "colour"
    array = {"extended": NOISE, "lossless": NOISE}.get(kind, SMOOTH if "base" in kind else NOISE)
    dataset = made(np.stack([SMOOTH] * 3, -1), SamplesPerPixel=3) if colour else made(array)
    if array is NOISE and not colour:
        dataset.BitsStored, dataset.HighBit = 12, 11
    compressed(dataset, syntax, [data])
    load_image(saved(tmp_path, dataset))
    cut = data[: int(len(data) * share) // 2 * 2] + end
    with pytest.raises(ImageError, match="cut off or damaged"):
        load_image(saved(tmp_path, compressed(dataset, syntax, [cut])))


def test_restart_intervals_are_counted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(SMOOTH).save(buffer, "JPEG", quality=95, restart_marker_blocks=2)
    data = buffer.getvalue()
    stream = codestreams.read_codestream(data, "it")
    assert len(stream.entropy[0]) == 32
    start, end = stream.entropy[0][7]
    without = data[: start - 2] + data[end:]
    with pytest.raises(ImageError, match="cut off or damaged"):
        codestreams.read_codestream(without, "it")


def test_a_codestream_that_unfolds_to_no_picture(tmp_path: Path) -> None:
    data = imagecodecs.jpegls_encode(np.zeros((5000, 5000), np.uint8))
    dataset = made(BYTES, Rows=5000, Columns=5000)
    with pytest.raises(ImageError, match="unfold to 25,000,000 pixels"):
        load_image(saved(tmp_path, compressed(dataset, uid.JPEGLSLossless, [bytes(data)])))


# --- One frame of many -------------------------------------------------------


def test_one_frame_of_a_large_file_is_read_alone(tmp_path: Path) -> None:
    """Of 3 GB stated, in a file with holes, only one frame is read."""
    dataset = twelve(DEEP)
    path = saved(tmp_path, dataset)
    frames = 8_000_000
    head, pixels = path.read_bytes()[: -DEEP.nbytes], DEEP.nbytes
    dataset.NumberOfFrames = frames
    head = saved(tmp_path, dataset).read_bytes()[: -DEEP.nbytes]
    with path.open("wb") as file:
        file.write(head[:-4] + (frames * pixels % 2**32).to_bytes(4, "little"))
        file.truncate(len(head) + frames * pixels)
        file.seek(len(head) + 5_000_000 * pixels)
        file.write(DEEP.tobytes())
    assert frames * pixels > 2**31
    assert np.abs(grey(path, frame=5_000_000) - SHOWN).max() <= 1


def test_a_picture_without_the_marker_of_its_end_is_told_of(tmp_path: Path) -> None:
    data = jpeg(SMOOTH)
    path = saved(tmp_path, compressed(made(SMOOTH), uid.JPEGBaseline8Bit, [data[:-2]]))
    assert np.abs(grey(path).astype(int) - SMOOTH).max() <= 3
    assert codes(path) == ["may_be_damaged"]


def test_jpeg_2000_without_the_marker_of_its_end(tmp_path: Path) -> None:
    _, data = STREAMS["jpeg 2000"]
    dataset = made(NOISE, BitsStored=12, HighBit=11, **WINDOW)
    whole = grey(saved(tmp_path, compressed(dataset, uid.JPEG2000Lossless, [data])))
    without = compressed(dataset, uid.JPEG2000Lossless, [data[:-2]])
    np.testing.assert_array_equal(grey(saved(tmp_path, without)), whole)


def test_a_progressive_picture_is_whole_only_with_its_last_scan(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(SMOOTH).save(buffer, "JPEG", quality=95, progressive=True)
    data = buffer.getvalue()
    scans = codestreams.read_codestream(data, "it").entropy
    assert len(scans) > 2
    for scan in scans[:-1]:
        with pytest.raises(ImageError, match="cut off or damaged"):
            codestreams.read_codestream(data[: scan[-1][1]] + b"\xff\xd9", "it")


@pytest.mark.parametrize("kind", ["jpeg 2000", "lossless"])
def test_values_out_of_their_range_are_damage(kind: str, tmp_path: Path) -> None:
    """A codestream of 12 bits whose header is made to say that it has 11."""
    syntax, data = STREAMS[kind]
    head = b"\xff\x51" if kind == "jpeg 2000" else b"\xff\xc3"
    at = data.index(head) + (40 if kind == "jpeg 2000" else 4)
    assert data[at] in (11, 12, 15)
    narrow = data[:at] + bytes([data[at] - (5 if data[at] == 15 else 1)]) + data[at + 1 :]
    dataset = compressed(made(NOISE, BitsStored=12, HighBit=11), syntax, [narrow])
    path = saved(tmp_path, dataset)
    if kind == "lossless":
        with pytest.raises(ImageError, match="cut off or damaged"):
            load_image(path)
    else:
        assert "may_be_damaged" in codes(path)
