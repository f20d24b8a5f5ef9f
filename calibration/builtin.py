"""Calibration pictures that lie in installed packages, for use anywhere and offline."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from medmoe_edge.calibration.samples import Field, Sample, ask_about
from medmoe_edge.errors import DataError, MissingDependencyError

# By the module that holds them: of which package, and in which of its folders.
PACKAGES = {
    "pydicom": ("pydicom", "data/test_files"),
    "data_store": ("pydicom-data", "data"),
    "skimage": ("scikit-image", "data"),
}

# Module, file, modality, frame and field: real pictures of patients, chosen by eye. Most lie there
# in several encodings, of which one is taken, and none that needs more than the base install to be
# decoded. Phantoms, test patterns and the 16 x 16 pixels of pydicom's DICOMDIR are left out.
# The slide is one picture: like a pathologist, we look at it field by field.
PICTURES: tuple[tuple[str, str, str, int | None, Field | None], ...] = (
    ("pydicom", "CT_small.dcm", "ct", None, None),  # spine
    ("pydicom", "J2K_pixelrep_mismatch.dcm", "ct", None, None),  # skull base
    ("data_store", "693_UNCR.dcm", "ct", None, None),  # brain
    ("data_store", "explicit_VR-UN.dcm", "ct", None, None),  # abdomen
    ("pydicom", "MR_small.dcm", "mri", None, None),  # shoulder
    ("data_store", "MR2_UNCI.dcm", "mri", None, None),  # shoulder
    ("data_store", "MR-SIEMENS-DICOM-WithOverlays.dcm", "mri", None, None),  # abdomen
    ("data_store", "emri_small.dcm", "mri", 0, None),  # head, three slices of ten
    ("data_store", "emri_small.dcm", "mri", 4, None),
    ("data_store", "emri_small.dcm", "mri", 9, None),
    ("data_store", "RG1_UNCI.dcm", "xray", None, None),  # chest
    ("data_store", "RG3_UNCI.dcm", "xray", None, None),  # lower leg
    ("skimage", "ihc.png", "pathology", None, (0, 0, 256, 256)),  # colon, immunohistochemistry
    ("skimage", "ihc.png", "pathology", None, (256, 0, 512, 256)),
    ("skimage", "ihc.png", "pathology", None, (0, 256, 256, 512)),
    ("skimage", "ihc.png", "pathology", None, (256, 256, 512, 512)),
)


def builtin_samples() -> Iterator[Sample]:
    """The bedside questions about every built-in picture; nothing is imported or downloaded.

    Raises `MissingDependencyError` where a package is not installed.
    """
    for number, (module, file, modality, frame, field) in enumerate(PICTURES, start=1):
        path = _folder(module) / file
        if not path.is_file():
            raise DataError(
                f"The package {PACKAGES[module][0]!r} lacks its file {file!r}.",
                "Install it again, or calibrate on images of your own.",
            )
        yield from ask_about(f"{number}-{file}", path, modality, frame=frame, field=field)


def _folder(module: str) -> Path:
    package, folder = PACKAGES[module]
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(package, "export")
    return Path(found.submodule_search_locations[0], folder)
