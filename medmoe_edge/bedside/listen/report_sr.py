"""A result as DICOM structured reports: Comprehensive 3D SR after TID 1500, and Basic Text SR.

The measurement report (PS3.16, TID 1500) holds an image library (TID 1600) and one group (TID 1501)
with the question, the answer as a qualitative evaluation in words, its confidence as a measurement
(under one code where it is calibrated, under another where it is the model's own probability), the
algorithm (TID 4019: name, version, hash of the bundle) and the image.
Where the question asks for a finding that has a code, a qualitative evaluation is named after the
finding, and its value is whether it is there; the finding stands nowhere else, so that nobody takes
one that is absent for found. Both documents are complete, preliminary and unverified, and say that
they come from no medical device.

Secondary Captures: the picture as the model saw it, and a result as a map over the picture.

The map is over the picture as it was read, in its own pixels: warm is where the words of question
and answer fit best.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sc import SCImage
from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    Comprehensive3DSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    NumContentItem,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.config import Code
from medmoe_edge.bedside.listen.evidence import (
    CERTAINTY,
    CHARACTERS,
    ISSUER,
    MAKER,
    SCHEME,
    Evidence,
    Result,
    device_uid,
    made_uid,
    series_uid,
)
from medmoe_edge.bedside.listen.header import SHARED, element_of, is_allowed, text_of
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.features import Location
from medmoe_edge.contrastive.heatmap import heat_picture
from medmoe_edge.contrastive.text import key_phrase
from medmoe_edge.image.pixels import Image, Pixels

QUESTION = CodedConcept("question", SCHEME, "Question")
SEEN = CodedConcept("seen", SCHEME, "Picture as the model saw it")
WARNING = CodedConcept("warning", SCHEME, "Warning")
SLICES = CodedConcept("slices", SCHEME, "Slices of the series that were asked")
SOME = 20  # of many numbers
WITHDRAWN = (
    "Withdrawn: an image that these AI results are about was sent again under the same UID, in the "
    "name of another patient or as something else that is not asked the same."
)
CONTAINS = RelationshipTypeValues.CONTAINS
ACQUIRED = RelationshipTypeValues.HAS_ACQ_CONTEXT
MODALITIES = [getattr(codes.cid29, name) for name in codes.cid29.dir()]


@dataclass(frozen=True)
class Standing:
    """How a document stands to others: its Instance Number, and those that it takes the place of.

    Attributes:
        number: Instance Number in its series.
        earlier: The reports that it replaces, as an object was sent again.
    """

    number: int = 1
    earlier: tuple[Dataset, ...] = ()


ALONE = Standing()


def comprehensive_3d_sr(result: Result, standing: Standing = ALONE) -> Dataset:
    """The answer as a measurement report, for machines; `standing` is how it stands to others."""
    answer, confidence = result.answer, result.confidence
    named = CodedConcept(confidence.value, confidence.scheme, confidence.meaning)
    algorithm = AlgorithmIdentification(
        name=answer.model["name"],
        version=__version__,
        parameters=[f"sha256={answer.model['sha256']}", f"fidelity={answer.model['verification']}"],
    )
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=result.uid("tracking"), identifier="Question answered"
        ),
        algorithm_id=algorithm,
        measurements=[Measurement(named, answer.confidence, codes.UCUM.NoUnits)],
        **_coded(result),
        source_images=[
            *(
                SourceImageForMeasurementGroup(each.header.SOPClassUID, each.uid, each.frames)
                for each in result.sources
            ),
            *(
                SourceImageForMeasurementGroup(shown.SOPClassUID, shown.SOPInstanceUID)
                for shown in result.pictures
            ),
        ],
    )
    group[0].ContentSequence.extend(_said(result))
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=_observer(result, answer.model["name"])
        ),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[group],
    )
    report[0].ContentSequence.insert(-1, _library(result))  # before the measurements
    options = _document(result, "comprehensive-3d-sr", standing)
    return _true_to(result, Comprehensive3DSR(content=report, **options))


def basic_text_sr(result: Result, standing: Standing = ALONE) -> Dataset:
    """The answer as text, for people and for viewers that show no more.

    `result` and `standing` are as of `comprehensive_3d_sr`.

    It is made as an Enhanced SR, of which Basic Text SR is the part that is used here (PS3.3
    A.35.1.3: TEXT, CODE, UIDREF, IMAGE and CONTAINER, related by CONTAINS and HAS OBS CONTEXT).
    """
    root = ContainerContentItem(name=codes.LN.DiagnosticImagingReport, template_id="2000")
    model = result.answer.model
    algorithm = f"{model['name']}, {MAKER} {__version__}, sha256={model['sha256']}"
    section = ContainerContentItem(name=codes.DCM.Findings, relationship_type=CONTAINS)
    section.ContentSequence = ContentSequence(_said(result))
    images = [
        *(
            _image(codes.DCM.SourceOfMeasurement, each.header, each.frames)
            for each in result.sources
        ),
        *(_image(SEEN, picture) for picture in result.pictures),
    ]
    root.ContentSequence = ContentSequence([*_observer(result, algorithm), section, *images])
    document = EnhancedSR(content=root, **_document(result, "basic-text-sr", standing))
    document.SOPClassUID = document.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    return _true_to(result, document)


def withdrawal(reports: Sequence[Dataset]) -> Dataset:
    """A key object that rejects reports, in their own study (IHE Imaging Object Change Management).

    They were made here, of one study and patient, about an object that has since come in the name
    of another patient or as something else.
    """
    first, uids = reports[0], [str(each.SOPInstanceUID) for each in reports]
    allowed = [_allowed(each) for each in reports]
    document = KeyObjectSelectionDocument(
        evidence=allowed,
        content=KeyObjectSelection(
            document_title=codes.DCM.RejectedForPatientSafetyReasons,
            referenced_objects=allowed,
            description=WITHDRAWN,
        ),
        series_instance_uid=made_uid(str(first.SeriesInstanceUID), "series", "withdrawal"),
        series_number=9003,
        sop_instance_uid=made_uid(*uids, "withdrawal"),
        instance_number=1,
        manufacturer=MAKER,
    )
    document.SeriesDescription = "AI results withdrawn"
    for keyword in (*SHARED, ISSUER):
        if keyword in first:
            document.add(first[keyword])
    document.SpecificCharacterSet = CHARACTERS
    return document


def _allowed(report: Dataset) -> Dataset:
    """A report as highdicom takes it: without what its object has against the standard."""
    found = copy.deepcopy(report)
    for keyword in SHARED:
        if not is_allowed(keyword, text_of(report, keyword).value):
            found.add(element_of(keyword, ""))
    return found


def _true_to(result: Result, document: Dataset) -> Dataset:
    """The document with class, patient and study of the objects as the objects have them."""
    classes = {each.uid: each.header.SOPClassUID for each in result.sources}
    for study in document.CurrentRequestedProcedureEvidenceSequence:
        for series in study.ReferencedSeriesSequence:
            for instance in series.ReferencedSOPSequence:
                uid = str(instance.ReferencedSOPInstanceUID)
                if uid in classes:
                    instance.ReferencedSOPClassUID = classes[uid]
    result.evidence.take_over(document)
    return document


def _said(result: Result) -> list[TextContentItem]:
    """Question, warnings, answer and the notice.

    The answer is a qualitative evaluation (TID 1501) in words.
    """
    answer = result.answer
    is_part = result.of > 1 or any(each.of_frames > 1 for each in result.sources)
    return [
        TextContentItem(QUESTION, answer.question, CONTAINS),
        *(
            TextContentItem(WARNING, f"{notice.message} ({notice.code})", CONTAINS)
            for notice in answer.warnings
        ),
        TextContentItem(codes.DCM.Finding, answer.shown, CONTAINS),
        *([TextContentItem(SLICES, slices_of(result), CONTAINS)] if is_part else []),
        TextContentItem(codes.DCM.Comment, answer.notice, CONTAINS),
    ]


def _coded(result: Result) -> dict[str, Any]:
    """The finding, whether it is there and how certainly: evaluations and site of the group."""
    found = result.coded
    if found is None:
        return {}
    values = [
        QualitativeEvaluation(
            concept(found.finding.code, *found.finding.same), concept(found.presence)
        )
    ]
    if found.certainty is not None:
        values.append(QualitativeEvaluation(concept(CERTAINTY), concept(found.certainty)))
    site = found.finding.site
    return {
        "qualitative_evaluations": values,
        "finding_sites": None if site is None else [FindingSite(concept(site))],
    }


def concept(code: Code, *same: Code) -> CodedConcept:
    """A configured code, with equivalent ones of other schemes (PS3.3, 8.8)."""
    found = CodedConcept(code.value, code.scheme, code.meaning)
    if same:
        found.EquivalentCodeSequence = [concept(each) for each in same]
    return found


def _library(result: Result) -> ContainerContentItem:
    """The images that were asked (TID 1600), in groups of a modality."""
    library = ContainerContentItem(codes.DCM.ImageLibrary, relationship_type=CONTAINS)
    library.ContentSequence = ContentSequence()
    for modality in dict.fromkeys(each.modality for each in result.sources):
        group = ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=CONTAINS)
        group.ContentSequence = ContentSequence(
            [
                *(
                    CodeContentItem(codes.DCM.Modality, code, ACQUIRED)
                    for code in MODALITIES
                    if code.value == modality
                ),
                *(_entry(each) for each in result.sources if each.modality == modality),
            ]
        )
        library.ContentSequence.append(group)
    return library


def _entry(source: Evidence) -> ImageContentItem:
    """An image with its size (TID 1601 and 1602)."""
    pixels = CodedConcept("{pixels}", "UCUM", "Pixels")
    entry = _image(codes.SCT.Source, source.header)
    sizes = (codes.DCM.PixelDataRows, "Rows"), (codes.DCM.PixelDataColumns, "Columns")
    entry.ContentSequence = ContentSequence(
        [
            NumContentItem(name, float(source.header[keyword].value), pixels, None, ACQUIRED)
            for name, keyword in sizes
        ]
    )
    return entry


def _image(
    name: CodedConcept, image: Dataset, frames: Sequence[int] | None = None
) -> ImageContentItem:
    return ImageContentItem(
        name=name,
        referenced_sop_class_uid=image.SOPClassUID,
        referenced_sop_instance_uid=image.SOPInstanceUID,
        referenced_frame_numbers=frames,
        relationship_type=CONTAINS,
    )


def slices_of(result: Result) -> str:
    """Of which slices of the series a result tells, by Instance Numbers, and of which frames."""

    def listed(numbers: Sequence[object]) -> str:
        return ", ".join(map(str, numbers[:SOME])) + (", ..." if len(numbers) > SOME else "")

    numbers = [
        f"{each.number or 'without'}"
        + (f" frame {listed(each.frames)} of {each.of_frames}" if each.frames else "")
        for each in result.sources
    ]
    return f"{len(numbers)} of {result.of} (number {listed(numbers)})"


def _observer(result: Result, model_name: str) -> ObserverContext:
    attributes = DeviceObserverIdentifyingAttributes(
        uid=device_uid(result.answer), name=MAKER, model_name=model_name
    )
    return ObserverContext(codes.DCM.Device, attributes)


def _document(result: Result, kind: str, standing: Standing) -> dict[str, Any]:
    """What all reports have in their header."""
    images = [copy.deepcopy(each.header) for each in result.sources]
    images.sort(key=lambda image: image.SOPInstanceUID != result.evidence.uid)  # the first counts
    for image in images:
        image.SOPClassUID = SecondaryCaptureImageStorage  # highdicom knows no private or old ones
    return {
        "evidence": [*images, *result.pictures],
        "previous_versions": standing.earlier or None,
        "series_instance_uid": result.series_uid(kind),
        "series_number": 9000,
        "series_description": "AI, unverified: not a medical device",
        "sop_instance_uid": result.uid(kind),
        "instance_number": standing.number,
        "manufacturer": MAKER,
        "manufacturer_model_name": result.answer.model["name"][:64],
        "software_versions": __version__,
        "is_complete": True,
        "is_final": False,
        "is_verified": False,
        "specific_character_set": CHARACTERS,
        "coding_schemes": [
            CodingSchemeIdentificationItem(
                designator=SCHEME, name=MAKER, responsible_organization=MAKER
            )
        ],
    }


LONGEST = 1024  # characters of a text of this kind (ST)


class Locator(Protocol):
    """What can point at a phrase in a picture, such as `modality_engine.ModalityEngine`."""

    def locate(self, image: Image, phrase: str) -> Location:
        """Raises `MedMoEError` for what it cannot use."""
        ...


def seen_capture(evidence: Evidence, pixels: Pixels) -> Dataset:
    """The Secondary Capture of exactly what the model saw of an object, `[S, S, 3]`."""
    content = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    uid = made_uid(
        *(evidence.key, evidence.sha256, str(evidence.frame), content, __version__, "picture")
    )
    picture = _capture(evidence, pixels, "picture", uid)
    picture.SeriesNumber = 9002
    picture.SeriesDescription = "What the AI saw: not a medical device"
    picture.ImageComments = NOTICE
    picture.DerivationDescription = (
        "Exactly what the model saw, at its resolution: not for reading."
    )
    return picture


def heat_map(result: Result, image: Image, locator: Locator, standing: Standing = ALONE) -> Dataset:
    """The Secondary Capture for a result; raises what `locator` does.

    Phrase, scale of colours and notices are in its pixels: viewers show nothing else.
    """
    phrase = key_phrase(result.answer.question, result.answer.text)
    shown = np.asarray(heat_picture(image.pixels, locator.locate(image, phrase)))
    picture = _capture(result.evidence, shown, "heat-map", result.uid("heat-map"))
    picture.InstanceNumber = standing.number
    picture.SeriesNumber = 9001
    picture.SeriesDescription = "AI heat map, unverified: not a medical device"
    warnings = (f"Warning: {notice.message}" for notice in result.answer.warnings)
    picture.ImageComments = " ".join((*warnings, result.answer.notice))
    picture.DerivationDescription = f"Warm where these words fit best: {phrase}"[:LONGEST]
    return picture


def _capture(evidence: Evidence, pixels: Pixels, kind: str, uid: str) -> Dataset:
    """A picture made of an object."""
    picture = SCImage.from_ref_dataset(
        evidence.header,
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        series_instance_uid=series_uid(evidence, kind),
        series_number=9000,
        sop_instance_uid=uid,
        instance_number=1,
        manufacturer=MAKER,
        software_versions=__version__,
        specific_character_set=CHARACTERS,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    picture["PatientOrientation"].value = None  # the same as of the image; its reader knows
    picture.Laterality = ""  # what is paired may be on either side
    if burned_in := evidence.header.get("BurnedInAnnotation"):
        picture.BurnedInAnnotation = burned_in
    source = Dataset()
    source.ReferencedSOPClassUID = evidence.header.SOPClassUID
    source.ReferencedSOPInstanceUID = evidence.uid
    picture.SourceImageSequence = [source]
    evidence.take_over(picture)
    return picture
