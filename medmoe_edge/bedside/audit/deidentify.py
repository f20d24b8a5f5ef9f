"""A DICOM file without its patient: the Basic Profile of PS3.15, annex E.

The rules of table E.1-1 are those of the library dicom-anonymizer, which keeps them by edition of
the standard. It applies them to the top of a dataset only; here they also reach into sequences.
UIDs become random ones, the same for the same within one process. Pixels are not looked at, hence
the refusal of those that are said to show text.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dicomanonymizer import simpledicomanonymizer as rules
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes

from medmoe_edge.atomic import atomic_file
from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import decoding

EDITION = "dicomfields_2026c"


def deidentify(source: Path, target: Path, *, allow_burned_in: bool = False) -> None:
    """Write `source` without what identifies a patient to `target`, whole or not at all.

    Raises `ImageError` for what is no DICOM file, for pixels marked as showing text (PS3.3 C.7.6.1,
    Burned In Annotation), unless allowed, and for what the rules cannot be applied to.
    """
    with decoding("The input"):
        dataset = dcmread(source)
        if not allow_burned_in:
            refuse_burned_in(dataset)
        _clean(dataset)
        with atomic_file(target) as file:
            dcmwrite(file, dataset, enforce_file_format=True)


def refuse_burned_in(dataset: Dataset) -> None:
    """Raise `ImageError` for pixels that are marked as showing who the patient is."""
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise ImageError(
            "The picture is marked as showing text (Burned In Annotation), often a patient's name.",
            "Cover it first, or allow it knowingly.",
        )


def _clean(dataset: Dataset) -> None:
    for part in _with_items(dataset):
        rules.anonymize_dataset(part, base_rules_gen=_actions)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta, dataset.preamble = meta, None
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "PS3.15 Basic Profile, medmoe-edge with dicom-anonymizer"
    item = Dataset()
    basic = codes.DCM.BasicApplicationConfidentialityProfile
    item.CodeValue, item.CodingSchemeDesignator = basic.value, basic.scheme_designator
    item.CodeMeaning = basic.meaning
    dataset.DeidentificationMethodCodeSequence = [item]


def _with_items(dataset: Dataset) -> Iterator[Dataset]:
    """The dataset, cleaned before its items are looked for, then those at any depth."""
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _with_items(item)


@functools.cache
def _actions() -> dict[tuple[int, ...], Callable[..., Any]]:
    """Of each tag. Sequences of references (X/Z/U*) stay: their items' UIDs are replaced (U)."""
    actions = rules.initialize_actions(EDITION)
    references = rules.delete_or_empty_or_replace_UID
    return {tag: rules.keep if do is references else do for tag, do in actions.items()}
