"""A few of the generated files and damages whose long runs have commands of their own."""

import shutil
from pathlib import Path

import dicom_damage
import dicom_differential
import pytest
from pydicom.data import get_testdata_files

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import load_image


@pytest.mark.skipif(
    not all(map(shutil.which, dicom_differential.TOOLS)), reason="needs DCMTK and GDCM's tools"
)
def test_generated_files_are_shown_as_dcmtk_shows_them() -> None:
    results, faults = dicom_differential.run(first=0, count=40)
    assert faults == []
    assert results["agrees"] >= 25


def test_a_cut_is_always_noticed_and_a_turned_bit_mostly() -> None:
    results = dicom_damage.run(200)
    other = ("within 2 grey levels", "differs here and there", "differs everywhere")
    assert dicom_damage.silent(results, "cut", *other) == 0
    assert dicom_damage.silent(results, "bit", other[-1]) <= dicom_damage.MOST_SILENT


REFUSED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "cut off or damaged",  # its size is overwritten
    "MR_truncated.dcm": "holds fewer pixels",
    "meta_missing_tsyntax.dcm": "has no pixels",
    "nested_priv_SQ.dcm": "has no pixels",
}


@pytest.mark.filterwarnings("ignore")
def test_every_test_file_of_pydicom_is_shown_or_refused_with_a_reason() -> None:
    for file in sorted({Path(str(file)) for file in get_testdata_files()}):
        if not file.is_file() or file.suffix in (".gz", ".json", ".txt", ".icc"):
            continue
        reason = refusal(file)
        if file.name in REFUSED:
            assert REFUSED[file.name] in reason, file.name
        elif reason:
            expected = ("without an image", "not an image that can be read", "DICOMDIR")
            assert any(words in reason for words in expected), file.name


def refusal(file: Path) -> str:
    try:
        load_image(file)
    except ImageError as error:
        return str(error)
    return ""
