"""Small DICOM files, made here."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from medmoe_edge.image.loading import load_image

NAME, IDENTITY = "Doe^Jane", "MRN-4711"


def made(array: npt.NDArray[Any], **attributes: Any) -> Dataset:
    """A small uncompressed image of `array` [H, W], [F, H, W] or, of 3 colours, [H, W, 3].

    `attributes` add or replace.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = NAME, IDENTITY
    colours = attributes.get("SamplesPerPixel", 1) == 3
    *frames, dataset.Rows, dataset.Columns = array.shape[:-1] if colours else array.shape
    if frames:
        dataset.NumberOfFrames = frames[0]
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset["PixelData"].VR = "OW"
    return dataset


def compressed(dataset: Dataset, syntax: uid.UID, codestreams: list[bytes]) -> Dataset:
    """The data set with these as its pixels, one a frame."""
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate(codestreams)
    dataset["PixelData"].VR = "OB"
    return dataset


def fragmented(fragments: list[bytes], table: list[int]) -> bytes:
    """Encapsulated pixels: the table of offsets, the fragments, and the end."""
    items = [np.array(table, "<u4").tobytes()]
    items += [fragment + b"\0" * (len(fragment) % 2) for fragment in fragments]
    whole = b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in items)
    return whole + b"\xfe\xff\xdd\xe0\0\0\0\0"


def saved(folder: Path, dataset: Dataset, name: str = "a.dcm") -> Path:
    dcmwrite(folder / name, dataset, enforce_file_format=True)
    return folder / name


def grey(path: Path, **options: Any) -> npt.NDArray[np.uint8]:
    pixels = load_image(path, **options).pixels
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def codes(path: Path) -> list[str]:
    """The codes of what should be known of a picture."""
    return [notice.code for notice in load_image(path).notices]


def ct(*values: int, **attributes: Any) -> bytes:
    """A CT of 4 x 4 pixels, one file; its frames are of one value each, shown from -100 to 100."""
    pixels = np.broadcast_to(np.array(values, np.int16)[:, None, None], (len(values), 4, 4))
    supine = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    stated = {"Modality": "CT", "WindowCenter": 0, "WindowWidth": 200, **supine, **attributes}
    dataset = made(pixels if len(values) > 1 else pixels[0], **stated)
    file = io.BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()
