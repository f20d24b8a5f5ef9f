"""De-identification: no word of the patient's is left, and the picture is as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, two_lines
from dicom_files import made, saved
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence

from medmoe_edge.bedside.audit.deidentify import deidentify
from medmoe_edge.errors import ImageError

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


@pytest.mark.parametrize("content", [b"", b"no DICOM", b"\0" * 128 + b"DICM"])
def test_what_is_no_dicom_file_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.dcm").write_bytes(content)
    result = run("audit", "deidentify", "scan.dcm", "-o", "out.dcm")
    assert result.exit_code == 2
    assert all(two_lines(result))
    assert not (tmp_path / "out.dcm").exists()
    assert json.dumps(result.stderr).count("Traceback") == 0
