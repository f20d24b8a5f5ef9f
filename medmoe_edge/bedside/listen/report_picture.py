"""A result as a Secondary Capture: the picture as it was read, and over it where the model looks.

Warm is where the words of question and answer fit best, in the picture's own pixels.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from PIL import Image as Pillow
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.evidence import CHARACTERS, Result
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


def heat_map(result: Result, image: Image, locator: Locator) -> Dataset:
    """The Secondary Capture for a result; raises what `locator` does."""
    phrase = key_phrase(result.answer.question, result.answer.text)
    heat = locator.locate(image, phrase).heat
    picture = SCImage.from_ref_dataset(
        result.evidence.header,
        pixel_array=blended(image.pixels, heat),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        series_instance_uid=result.series_uid("heat-map"),
        series_number=9001,
        series_description="AI heat map, unverified: not a medical device",
        sop_instance_uid=result.uid("heat-map"),
        instance_number=1,
        manufacturer="medmoe-edge",
        software_versions=__version__,
        specific_character_set=CHARACTERS,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    picture.ImageComments = result.answer.notice
    picture.DerivationDescription = f"Warm where these words fit best: {phrase}"[:LONGEST]
    picture["PatientOrientation"].value = None  # the same as of the image; its reader knows
    picture.Laterality = ""  # what is paired may be on either side
    source = Dataset()
    source.ReferencedSOPClassUID = result.evidence.header.SOPClassUID
    source.ReferencedSOPInstanceUID = result.evidence.uid
    picture.SourceImageSequence = [source]
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
