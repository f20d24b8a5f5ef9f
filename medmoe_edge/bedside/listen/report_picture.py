"""Secondary Captures: the picture as the model saw it, and a result as a map over the picture.

The map is over the picture as it was read, in its own pixels: warm is where the words of question
and answer fit best.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from PIL import Image as Pillow
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.evidence import CHARACTERS, Evidence, Result, made_uid, series_uid
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.text import key_phrase
from medmoe_edge.image.loading import Image, Pixels

MAX_SIDE = 1024  # pixels
LONGEST = 1024  # characters of a text of this kind (ST)
SHARE = 0.5  # of the hottest colour over the picture


class Located(Protocol):
    """Where a phrase is, over the picture as shown."""

    @property
    def heat(self) -> npt.NDArray[np.float32]:
        """`[H, W]`, -1 to 1."""
        ...


class Locator(Protocol):
    """What can point at a phrase in a picture, such as `modality_engine.ModalityEngine`."""

    def locate(self, image: Image, phrase: str) -> Located:
        """Raises `MedMoEError` for what it cannot use."""
        ...


def seen_capture(evidence: Evidence, pixels: Pixels) -> Dataset:
    """The Secondary Capture of exactly what the model saw of an object, `[S, S, 3]`."""
    picture = _capture(evidence, pixels, "picture", made_uid(evidence.key, "picture"))
    picture.SeriesNumber = 9002
    picture.SeriesDescription = "What the AI saw: not a medical device"
    picture.ImageComments = NOTICE
    picture.DerivationDescription = (
        "Exactly what the model saw, at its resolution: not for reading."
    )
    return picture


def heat_map(result: Result, image: Image, locator: Locator) -> Dataset:
    """The Secondary Capture for a result; raises what `locator` does."""
    phrase = key_phrase(result.answer.question, result.answer.text)
    heat = locator.locate(image, phrase).heat
    shown = blended(image.pixels, heat)
    picture = _capture(result.evidence, shown, "heat-map", result.uid("heat-map"))
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
        manufacturer="medmoe-edge",
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


def blended(pixels: Pixels, heat: npt.NDArray[np.float32]) -> Pixels:
    """The picture `[H, W, 3]` with the heat `[h, w]` over it, at most `MAX_SIDE` wide and high."""
    picture = Pillow.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    low, high = float(heat.min()), float(heat.max())
    share = ((heat - low) / ((high - low) or 1.0)).astype(np.float32)
    share = np.asarray(Pillow.fromarray(share).resize(picture.size))[..., None]  # [H, W, 1]
    warm = np.array([255, 64, 0], np.float32)
    mixed = np.asarray(picture, np.float32) * (1 - SHARE * share) + warm * (SHARE * share)
    return mixed.round().astype(np.uint8)
