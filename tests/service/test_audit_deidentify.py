"""De-identification: no word of the patient's is left, and the picture is as it was."""

import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from command_line import Run, two_lines
from dicom_files import compressed, fragmented, made, saved
from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from PIL import Image as Pillow
from pydicom import DataElement, Dataset, config, dcmread
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from medmoe_edge.bedside.audit.deidentify import deidentify
from medmoe_edge.errors import ImageError, ResourceError
from medmoe_edge.image.loading import load_image

VALUES = np.arange(64, dtype=np.uint8).reshape(8, 8)
SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19700203",
    "PatientAddress": "Elm Street 5",
    "AccessionNumber": "ACC-99",
    "ReferringPhysicianName": "House^Gregory",
    "InstitutionName": "Mercy Hospital",
    "StudyDate": "20240506",
    "StudyTime": "070809",
    "StudyInstanceUID": "1.2.826.77",
    "SeriesInstanceUID": "1.2.826.88",
    "SOPInstanceUID": "1.2.826.99",
    "DeviceSerialNumber": "SN-1234",
    "StudyDescription": "Chest of Jane",
    "ImageComments": "she coughs",
    "OperatorsName": "Op^Erator",
}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """An image with a patient in every corner."""
    nested, deeper = Dataset(), Dataset()
    deeper.PatientName, deeper.ReferencedSOPInstanceUID = "Doe^Jane", "1.2.826.99"
    nested.ReferencedSOPInstanceUID = "1.2.826.99"
    nested.PatientID = "MRN-4711"
    nested.PurposeOfReferenceCodeSequence = Sequence([deeper])
    dataset = made(VALUES, **SECRETS)
    dataset.Modality = "CR"
    dataset.ReferencedImageSequence = Sequence([nested])
    dataset.SourceImageSequence = Sequence([nested])
    dataset.private_block(0x0011, "Maker", create=True).add_new(1, "LO", "Jane in private")
    return saved(tmp_path, dataset, "scan.dcm")


def test_nothing_of_the_patient_is_left(scan: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.dcm"
    deidentify(scan, target)
    data = target.read_bytes()
    for secret in (*SECRETS.values(), "Jane", "Maker", "coughs"):
        assert secret.encode() not in data, secret
    found = dcmread(target)
    assert (found.pixel_array == VALUES).all()
    assert found.Modality == "CR"
    assert found.PatientIdentityRemoved == "YES"
    assert found.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert found.file_meta.MediaStorageSOPInstanceUID == found.SOPInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == found.SOPInstanceUID


def test_text_in_the_picture_is_refused_unless_allowed(scan: Path, tmp_path: Path) -> None:
    dataset = dcmread(scan)
    dataset.BurnedInAnnotation = "YES"
    scan = saved(tmp_path, dataset, "burned.dcm")
    with pytest.raises(ImageError, match="Burned In Annotation"):
        deidentify(scan, tmp_path / "out.dcm")
    assert not (tmp_path / "out.dcm").exists()
    deidentify(scan, tmp_path / "out.dcm", allow_burned_in=True)
    assert (tmp_path / "out.dcm").exists()


def test_the_verb_deidentifies(run: Run, scan: Path, tmp_path: Path) -> None:
    result = run("audit", "deidentify", str(scan), "-o", "out.dcm")
    assert (result.exit_code, (tmp_path / "out.dcm").exists()) == (0, True)
    result = run("audit", "deidentify", str(scan), "-o", "out.dcm")
    assert result.exit_code == 2
    assert two_lines(result)[0] == "out.dcm exists already."
    assert run("audit", "deidentify", str(scan), "-o", "out.dcm", "--force").exit_code == 0


def test_a_picture_of_another_kind_is_called_so(run: Run, tmp_path: Path) -> None:
    Pillow.new("L", (8, 8)).save(tmp_path / "a.png")
    result = run("audit", "deidentify", "a.png", "-o", "out.dcm")
    assert (result.exit_code, two_lines(result)[0]) == (2, "'a.png' is no DICOM file.")


def test_a_secret_is_not_empty_or_missing(run: Run, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for name, what in (("empty", "is empty"), ("gone", "does not exist")):
        result = run("audit", "deidentify", str(scan), "-o", "out.dcm", "--secret", name)
        assert result.exit_code == 2
        assert what in two_lines(result)[0]
        assert not (tmp_path / "out.dcm").exists()


@pytest.mark.parametrize("content", [b"", b"no DICOM", b"\0" * 128 + b"DICM"])
def test_what_is_no_dicom_file_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.dcm").write_bytes(content)
    result = run("audit", "deidentify", "scan.dcm", "-o", "out.dcm")
    assert result.exit_code == 2
    assert all(two_lines(result))
    assert not (tmp_path / "out.dcm").exists()
    assert json.dumps(result.stderr).count("Traceback") == 0


# ---- PS3.15, table E.1-1, item by item

TOKEN = "TOK3N"
TEXTS = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT", "UR", "AS")
OLD_UID = "1.2.826.0.4711.999"
VALUES_BY_VR: dict[str, Any] = {
    **dict.fromkeys(TEXTS, TOKEN),
    **dict.fromkeys(("OB", "UN"), TOKEN.encode() + b"\0"),
    **dict.fromkeys(("US", "SS", "UL", "SL", "FD", "FL"), 4711),
    **dict.fromkeys(("DS", "IS"), "47110815"),
    "DA": "20240506",
    "DT": "20240506070809",
    "TM": "070809.4711",
    "UI": OLD_UID,
}
TRACES = [TOKEN.encode(), OLD_UID.encode(), b"20240506", b"070809.4711", b"47110815"]
TABLE = dicom_anonymization_database_selector("dicomfields_2026c")


STAYING = {tag for name in ("D_TAGS", "X_Z_U_STAR_TAGS") for tag in TABLE[name]}


def _item(tag: tuple[int, int], depth: int) -> Dataset:
    """In sequences that stay, all again."""
    if depth < 1 and tag in STAYING:
        return filled(Dataset(), depth + 1)
    item = Dataset()
    item.PatientID, item.ReferencedSOPInstanceUID = TOKEN, OLD_UID
    return item


def filled(dataset: Dataset, depth: int = 0) -> Dataset:
    """Every attribute of the table in a dataset, and all of them again in its sequences."""
    for tag in TABLE["ALL_TAGS"]:
        if len(tag) == 2 and tag[0] > 2:  # those of commands and of the file's beginning apart
            vr = dictionary_VR(tag) if dictionary_has_tag(tag) else "LO"
            if vr == "SQ":
                value: Any = [_item(tag, depth)]
            else:
                value = VALUES_BY_VR[vr]
            dataset.add(DataElement(tag, vr, value, validation_mode=config.IGNORE))
    for group in (0x5000, 0x6002):
        dataset.add_new((group, 0x0022), "LO", TOKEN)
        dataset.add_new((group, 0x3000), "OW", TOKEN.encode() + b"\0")
        dataset.add_new((group, 0x4000), "LT", TOKEN)
    dataset.private_block(0x0009, TOKEN, create=True).add_new(1, "LO", TOKEN)
    dataset.add_new((0x0018, 0x9ABC), "LO", TOKEN)  # in no dictionary
    return dataset


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_attribute_of_the_profile_is_dealt_with_as_it_says(tmp_path: Path) -> None:
    dataset = filled(made(VALUES, Modality="CR", SOPInstanceUID=OLD_UID))
    # A sequence that the table leaves: what is in it is dealt with as at the top.
    dataset.AnatomicRegionSequence = [filled(Dataset(), 1)]
    target = tmp_path / "out.dcm"
    assert deidentify(saved(tmp_path, dataset, "scan.dcm"), target)
    data = target.read_bytes()
    assert [trace for trace in TRACES if trace in data] == []
    found = dcmread(target)
    for part in (found, found.AnatomicRegionSequence[0]):
        for tag in TABLE["X_TAGS"]:
            assert len(tag) > 2 or tag not in part, tag
        for tag in TABLE["Z_TAGS"]:
            assert part[tag].is_empty, tag
        for tag in TABLE["D_TAGS"]:
            sequence = dictionary_VR(tag) == "SQ"
            assert sequence or not part[tag].is_empty, tag
        for tag in TABLE["U_TAGS"]:
            assert tag[0] <= 2 or str(part[tag].value) == found.SOPInstanceUID, tag
    assert UID(found.SOPInstanceUID).is_valid
    assert found.LongitudinalTemporalInformationModified == "REMOVED"
    assert not any(e.tag.is_private or 0x5000 <= e.tag.group < 0x6100 for e in found)


def test_the_files_of_a_study_stay_together(tmp_path: Path, run: Run) -> None:
    """Also where a command is run for each."""
    (tmp_path / "secret").write_bytes(os.urandom(32))
    uids: dict[bool, list[tuple[str, ...]]] = {True: [], False: []}
    for number in (1, 2):
        dataset = made(VALUES, StudyInstanceUID="1.2.826.1", SOPInstanceUID=f"1.2.826.2.{number}")
        dataset.FrameOfReferenceUID = "1.2.840.10008.1.4.1.1"  # of the standard: Talairach's brain
        source = saved(tmp_path, dataset, f"{number}.dcm")
        for secret in uids:
            options = ["--secret", "secret"] if secret else []
            done = run("audit", "deidentify", str(source), "-o", "out.dcm", "--force", *options)
            assert done.exit_code == 0
            found = dcmread(tmp_path / "out.dcm")
            assert found.FrameOfReferenceUID == "1.2.840.10008.1.4.1.1"
            uids[secret].append((found.StudyInstanceUID, found.SOPInstanceUID))
    for pairs in uids.values():
        assert pairs[0][0] == pairs[1][0]
        assert pairs[0][1] != pairs[1][1]
    assert not {uid for pair in uids[True] for uid in pair} & {
        uid for pair in uids[False] for uid in pair
    }


@pytest.mark.parametrize(
    "values",
    [
        {"SOPClassUID": UltrasoundImageStorage, "Modality": "US"},
        {"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"ConversionType": "WSD"},
        {"BurnedInAnnotation": "YES"},
    ],
)
def test_pictures_that_may_show_text_are_never_called_free_of_their_patient(
    tmp_path: Path, values: dict[str, object], run: Run
) -> None:
    source = saved(tmp_path, made(VALUES, **values), "scan.dcm")
    refused = run("audit", "deidentify", str(source), "-o", "out.dcm")
    assert refused.exit_code == 2
    assert "text" in two_lines(refused)[0]
    assert not (tmp_path / "out.dcm").exists()
    allowed = run("audit", "deidentify", str(source), "-o", "out.dcm", "--allow-burned-in")
    assert allowed.exit_code == 0
    assert "does not claim" in allowed.stderr
    found = dcmread(tmp_path / "out.dcm")
    assert found.PatientIdentityRemoved == "NO"
    assert "DeidentificationMethodCodeSequence" not in found
    assert found.get("BurnedInAnnotation") == values.get("BurnedInAnnotation")
    assert "not looked at" in str(found.DeidentificationMethod)


def test_what_says_that_it_shows_no_text_is_taken_at_its_word(tmp_path: Path) -> None:
    dataset = made(VALUES, Modality="US", BurnedInAnnotation="NO")
    assert deidentify(saved(tmp_path, dataset, "scan.dcm"), tmp_path / "out.dcm")
    assert dcmread(tmp_path / "out.dcm").PatientIdentityRemoved == "YES"


def test_claims_of_an_earlier_hand_do_not_stay(tmp_path: Path) -> None:
    dataset = made(VALUES, Modality="CT", DeidentificationMethod="By hand")
    kept = Dataset()
    kept.CodeValue, kept.CodingSchemeDesignator = "113101", "DCM"
    kept.CodeMeaning = "Clean Pixel Data Option"
    dataset.DeidentificationMethodCodeSequence = [kept]
    deidentify(saved(tmp_path, dataset, "scan.dcm"), tmp_path / "out.dcm")
    found = dcmread(tmp_path / "out.dcm")
    assert [item.CodeValue for item in found.DeidentificationMethodCodeSequence] == ["113100"]
    assert "By hand" not in str(found.DeidentificationMethod)


@pytest.mark.parametrize("big", [False, True])
def test_overlays_in_unused_bits_and_bytes_behind_the_pixels_go(tmp_path: Path, big: bool) -> None:
    values = np.arange(-32, 32, dtype=np.int16).reshape(8, 8) * 60
    dataset = made(values, Modality="CT", BitsStored=12, HighBit=11)
    overlaid = values.view(np.uint16) & 0x0FFF | np.uint16(0x5000)
    dataset.PixelData = overlaid.astype(">u2" if big else "<u2").tobytes() + b"Doe^Jane"
    dataset.add_new((0x6000, 0x0100), "US", 16)
    dataset.add_new((0x6000, 0x0102), "US", 12)
    if big:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    source = tmp_path / "scan.dcm"
    dataset.save_as(source, enforce_file_format=True)
    deidentify(source, tmp_path / "out.dcm")
    found = dcmread(tmp_path / "out.dcm")
    stored = np.frombuffer(found.PixelData, ">i2" if big else "<i2")
    assert (stored == values.ravel()).all()
    assert not any(element.tag.group == 0x6000 for element in found)


def test_comments_beside_compressed_pictures_go(tmp_path: Path) -> None:
    file = io.BytesIO()
    exif = Pillow.Exif()
    exif[0x010E] = "Doe^Jane"
    picture = Pillow.fromarray(VALUES).resize((16, 16))
    picture.save(file, "JPEG", comment=b"Doe^Jane", exif=exif)
    dataset = made(np.zeros((16, 16), np.uint8), Modality="CR")
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([file.getvalue()])
    deidentify(saved(tmp_path, dataset, "scan.dcm"), tmp_path / "out.dcm")
    data = (tmp_path / "out.dcm").read_bytes()
    assert b"Jane" in file.getvalue()
    assert b"Jane" not in data
    (frame,) = generate_frames(dcmread(io.BytesIO(data)).PixelData, number_of_frames=1)
    shown = Pillow.open(io.BytesIO(frame))
    assert (np.asarray(shown) == np.asarray(Pillow.open(file))).all()


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("table", ["none", "fragments", "nonsense"])
def test_fragments_are_put_together_as_the_reader_does(
    frames: int, table: str, tmp_path: Path
) -> None:
    """JPEG 2000 has no marker that pydicom knows the end of a frame by."""
    fragments, every, at = [], [], 0
    for frame in range(frames):
        data = bytes(imagecodecs.jpeg2k_encode(np.roll(VALUES, frame), level=0, reversible=True))
        start = data.index(b"\xff\x4f\xff\x51")
        cut = data.index(b"\xff\x90")  # between the main header and the tile
        named = data[start:cut] + b"\xff\x64\0\x0a\0\1MRN-11" + data[cut:]
        for part in (named[:60], named[60:]):
            fragments.append(part)
            every.append(at)
            at += 8 + len(part) + len(part) % 2
    values = np.stack([np.roll(VALUES, frame) for frame in range(frames)])
    dataset = made(values if frames > 1 else VALUES, **SECRETS)
    compressed(dataset, JPEG2000Lossless, [b"\0\0"])
    offsets = {"none": [], "fragments": every, "nonsense": [9, 1, 4][:frames]}[table]
    dataset.PixelData = fragmented(fragments, offsets)[:-8]  # the end is written by pydicom
    source, target = saved(tmp_path, dataset), tmp_path / "out.dcm"
    deidentify(source, target)
    assert b"MRN-11" not in target.read_bytes()
    for frame in range(frames):
        pixels = load_image(target, frame=frame).pixels[..., 0]
        np.testing.assert_array_equal(pixels, np.roll(VALUES, frame))


def test_colours_that_are_said_to_be_shared_and_are_not(tmp_path: Path) -> None:
    colours = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    named = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "BitsStored": None}
    source, target = saved(tmp_path, made(colours, **SECRETS, **named)), tmp_path / "out.dcm"
    deidentify(source, target)
    np.testing.assert_array_equal(load_image(target).pixels, load_image(source).pixels)


@pytest.mark.parametrize(
    "syntax", [b"1.3.46.670589.33.1.4.1\0\0", b"1.2.840.113619.5.2\0\0\0\0\0\0"]
)
def test_a_private_transfer_syntax_is_refused_by_name(syntax: bytes, tmp_path: Path) -> None:
    source = saved(tmp_path, made(VALUES, **SECRETS))
    plain = b"\x14\x001.2.840.10008.1.2.1\0"
    data = source.read_bytes().replace(plain, bytes([len(syntax), 0]) + syntax)
    source.write_bytes(data[:140] + bytes([data[140] + len(syntax) - 20]) + data[141:])
    with pytest.raises(ImageError, match=r"transfer syntax of 'a\.dcm' is private") as caught:
        deidentify(source, tmp_path / "out.dcm")
    assert "Explicit VR Little Endian" in caught.value.remedy
    assert not (tmp_path / "out.dcm").exists()


def test_what_would_show_another_picture_is_not_written(tmp_path: Path) -> None:
    """Here a shape behind the pixels, which pydicom takes and we do not: one stands before them."""
    source = saved(tmp_path, made(VALUES, PresentationLUTShape="IDENTITY", **SECRETS))
    behind = b"\x50\x20\x20\0CS\x08\0INVERSE "
    source.write_bytes(source.read_bytes() + behind)
    with pytest.raises(ImageError, match="another picture"):
        deidentify(source, tmp_path / "out.dcm")
    assert not (tmp_path / "out.dcm").exists()


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "693_J2KR.dcm"])
def test_a_compressed_picture_stays_as_it_is(tmp_path: Path, name: str) -> None:
    source = Path(str(get_testdata_file(name)))
    deidentify(source, tmp_path / "out.dcm", allow_burned_in=True)
    assert (load_image(tmp_path / "out.dcm").pixels == load_image(source).pixels).all()
    assert b"Kakadu" not in (tmp_path / "out.dcm").read_bytes()


def test_documents_are_refused(tmp_path: Path) -> None:
    dataset = made(VALUES, EncapsulatedDocument=b"%PDF of Jane")
    del dataset.PixelData
    with pytest.raises(ImageError, match="holds no image"):
        deidentify(saved(tmp_path, dataset, "scan.dcm"), tmp_path / "out.dcm")


def test_nothing_of_the_files_beginning_is_left(scan: Path, tmp_path: Path) -> None:
    data = scan.read_bytes()
    dataset = dcmread(io.BytesIO(data))
    dataset.preamble = b"Doe^Jane".ljust(128, b"\0")
    dataset.file_meta.SourceApplicationEntityTitle = "DOE_JANE"
    dataset.file_meta.PrivateInformationCreatorUID = UID("1.2.826.0.4711.7")
    dataset.file_meta.PrivateInformation = b"Doe^Jane"
    deidentify(saved(tmp_path, dataset, "scan.dcm"), tmp_path / "out.dcm")
    assert b"JANE" not in (tmp_path / "out.dcm").read_bytes().upper()


def test_a_missing_file_is_called_missing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, what in (("gone.dcm", "does not exist"), ("folder", "is a folder")):
        result = run("audit", "deidentify", name, "-o", "out.dcm")
        assert result.exit_code == 2
        assert what in two_lines(result)[0]
        assert name in two_lines(result)[0]


def test_a_file_does_not_take_its_own_place(run: Run, scan: Path) -> None:
    before = scan.read_bytes()
    result = run("audit", "deidentify", str(scan), "-o", str(scan), "--force")
    assert result.exit_code == 2
    assert scan.read_bytes() == before


def test_the_standards_own_rules_find_nothing_new(tmp_path: Path) -> None:
    checker = shutil.which("dciodvfy")
    if checker is None:
        pytest.skip("needs dciodvfy (Debian: dicom3tools)")
    source = Path(str(get_testdata_file("CT_small.dcm")))
    assert deidentify(source, tmp_path / "out.dcm")
    errors = []
    for path in (source, tmp_path / "out.dcm"):
        done = subprocess.run([checker, str(path)], capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines()
        errors.append({line for line in lines if line.startswith("Error")})
    assert errors[1] <= errors[0]


def test_an_output_that_cannot_be_written_is_not_the_fault_of_the_image(
    run: Run, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = "o" * 246 + ".dcm"  # for what is written beside it first
    result = run("audit", "deidentify", str(scan), "-o", too_long)
    assert result.exit_code == 5
    assert f"{too_long} cannot be written (File name too long)." in two_lines(result)[0]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"out\.dcm cannot be written \(No space left"):
        deidentify(scan, tmp_path / "out.dcm")
    assert [path.name for path in tmp_path.iterdir()] == ["scan.dcm"]
