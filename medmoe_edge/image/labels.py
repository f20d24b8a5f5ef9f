"""What a file says that it shows, in the models' words; and what to say where it shows another.

The one mapping from DICOM's Modality (PS3.3 C.7.3.1.1.1, with the retired values that old archives
still hold) and storage classes (PS3.4 annex B) to the modalities that the models know.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medmoe_edge.errors import Notice

if TYPE_CHECKING:  # whoever asks about a PNG need not import pydicom
    from medmoe_edge.image.dicom_tables import Header

MODALITIES = {
    "CT": "ct",
    **dict.fromkeys(("MR", "MA", "MS"), "mri"),
    **dict.fromkeys(("CR", "DX", "DR", "MG", "RG", "IO", "PX", "PANO"), "xray"),
    **dict.fromkeys(("XA", "RF", "DF", "DS", "CF", "BMD", "RTIMAGE"), "xray"),
    **dict.fromkeys(("US", "IVUS", "EC", "DD", "CD", "BDUS"), "ultrasound"),
    **dict.fromkeys(("SM", "GM", "DM"), "pathology"),
    **dict.fromkeys(("OP", "OPT", "OPTENF", "FA", "FS"), "fundus"),
}
# What no model here was trained on; anything else, such as OT, says nothing of what is shown.
UNKNOWN = {
    "PT": "positron emission tomography",
    "NM": "nuclear medicine",
    "ST": "single-photon emission tomography",
    "ES": "endoscopy",
    "IVOCT": "intravascular optical coherence tomography",
    "OCT": "optical coherence tomography",
    "XC": "photography",
    "DMS": "dermatoscopy",
    "TG": "thermography",
    "EPS": "electrophysiology",
    "ECG": "electrocardiography",
    "SEG": "a segmentation",
    "RTDOSE": "a radiation dose",
}
# Words in the names of storage classes, where Modality says nothing.
_CLASSES = (
    (r"\bCT\b", "ct"),
    (r"\bMR\b", "mri"),
    (r"Ultrasound", "ultrasound"),
    (r"X-Ray|Computed Radiography|Enhanced XA|Enhanced XRF|Breast|RT Image", "xray"),
    (r"Microscop", "pathology"),
    (r"Ophthalmic (Photography|Tomography)", "fundus"),
)
_NAMES = {"ct": "CT", "mri": "MRI", "xray": "X-ray"}
UNLIKE_LABEL = "unlike_label"


def modality_of(header: "Header") -> str | None:
    """What Modality (0008,0060) states, of what models know; None where it does not."""
    return MODALITIES.get(header.text("Modality"))


def labels_of(header: "Header") -> tuple[str, ...]:
    """All modalities that a DICOM header states, by Modality and by its storage class."""
    stated = (modality_of(header), _of_class(header))
    return tuple(dict.fromkeys(kind for kind in stated if kind))


def label_notices(header: "Header") -> tuple[Notice, ...]:
    """What is odd about a header's own statement of what it shows."""
    code = header.text("Modality")
    if code in UNKNOWN:
        what = f"The file says that it shows {UNKNOWN[code]}, which the models were not trained on."
        return (Notice("unknown_modality", what),)
    labels = labels_of(header)
    if len(labels) < 2:
        return ()
    what = "The file says that it is {}, and its storage class is for {}."
    return (Notice("contradictory_label", what.format(*map(named, labels))),)


def unlike_label(labels: Sequence[str], read_as: str | None) -> tuple[Notice, ...]:
    """What to say where the model reads an image as none of the modalities its file states."""
    if not labels or read_as is None or read_as in labels:
        return ()
    what = (
        f"The file says that it is {named(labels[0])}, and the model reads the image as "
        f"{named(read_as)}: look at the picture before you rely on the answer."
    )
    return (Notice(UNLIKE_LABEL, what),)


def named(modality: str) -> str:
    """A modality as people write it."""
    return _NAMES.get(modality, modality)


def _of_class(header: "Header") -> str | None:
    from pydicom.uid import UID

    name = UID(header.text("SOPClassUID")).name  # of unknown ones the UID, in which no word is
    return next((kind for words, kind in _CLASSES if re.search(words, name)), None)
