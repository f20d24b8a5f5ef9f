"""Images as Python code has them in hand: a path is one way among many.

Everything that holds what a file would hold is given the form of that file and read as the file is,
so that the same pixels give the same picture, to the bit: there is one reader, not two. Nothing is
imported to find out what something is: of a class whose library is not loaded there is no object.
"""

import io
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import PngImagePlugin, TiffImagePlugin

from medmoe_edge.errors import ImageError, InputError
from medmoe_edge.image.loading import decoding, load_image, with_flatness
from medmoe_edge.image.pixels import Image, as_pixels, check_size, show_range
from medmoe_edge.image.raster_display import ORIENTATION, WHITE_IS_ZERO, stated_ratio

NAME = "the image"  # how messages call what has no name
ACCEPTED = (
    "Give a path, bytes, a file opened for reading bytes, a PIL image, a NumPy array, a pydicom "
    "Dataset, a NIfTI image of nibabel, or a medmoe_edge Image."
)
AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # Pillow's modes that PNG holds as they are
IN_NO_FILE = {"HSV": "RGB", "La": "LA", "RGBa": "RGBA", "I;16B": "I", "I;16L": "I", "I;16N": "I"}
PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
RATIO = 10_000  # pixels per metre that a stated ratio of axes is written with
NIFTI_HEADERS = {348: 352, 540: 544}  # bytes of a header, and where the voxels then begin


class Readable(Protocol):
    """A file that gives bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Pillow.Image | Image | Any
)
"""What `as_image` takes; the last stands for arrays, pydicom datasets and NIfTI images."""


def as_image(
    source: ImageLike, *, frame: int | None = None, value_range: tuple[float, float] | None = None
) -> Image:
    """Any image as the picture that is looked at.

    Args:
        source: A path; the bytes of a file, or a file that gives them; a PIL image; a NumPy array
            `[H, W]` (grey) or `[H, W, 3]` (RGB); a pydicom `Dataset`; a NIfTI image of nibabel; an
            `Image`, which is returned as it is.
        frame: Of a file, a dataset or a volume: which frame or slice, from 0; None is the middle
            one. Of a PIL image None is the one it stands at.
        value_range: Of an array, the values shown black and white. uint8 needs none (0 to 255); of
            uint16 the 1st and 99th percentile are the default, as of a 16-bit PNG; all others need
            it, for their values do not say what they mean.

    Returns:
        The picture.

    Raises:
        ImageError: It cannot be read, or is no picture.
        InputError: It is nothing of these, or the options do not fit it.
    """
    if value_range is not None and not _is_array(source):
        raise InputError(
            "value_range is of arrays: files and images say themselves what their values mean.",
            "Leave value_range out, or give an array.",
        )
    if frame is not None and not isinstance(frame, int | np.integer):
        raise InputError(f"frame is {frame!r}.", "Give a whole number, from 0.")
    if isinstance(source, Image):
        return source
    if isinstance(source, str | os.PathLike):
        return load_image(source, frame=frame)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), frame)
    if isinstance(source, Pillow.Image):
        return _from_bytes(_file_of(lambda: _encoded(source, frame)), None)
    if _is_of("pydicom", "Dataset", source):
        return _from_bytes(_file_of(lambda: _dicom(source)), frame)
    if hasattr(source, "dataobj") and hasattr(source, "header"):
        return _from_bytes(_file_of(lambda: _nifti(source)), frame)
    if _is_array(source):
        if frame is not None:
            raise InputError("An array is one picture and has no frames.", "Give array[frame].")
        return _from_array(np.asarray(source), value_range)
    if hasattr(source, "read"):
        return _from_bytes(_read(source), frame)
    raise InputError(f"A {type(source).__name__} is no image.", ACCEPTED)


def _is_of(library: str, name: str, value: object) -> bool:
    known = getattr(sys.modules.get(library), name, None)
    return known is not None and isinstance(value, known)


def _is_array(value: object) -> bool:
    """Whether it gives an array and is no image that only can: PIL's and nibabel's can too."""
    return (
        hasattr(value, "__array__")
        and not isinstance(value, Pillow.Image)
        and not hasattr(value, "dataobj")
    )


def _read(file: Any) -> bytes:
    content = file.read()
    if not isinstance(content, bytes):
        raise InputError("The file gives text, not bytes.", 'Open it with mode "rb".')
    return content


def _from_bytes(content: bytes, frame: int | None) -> Image:
    """As of a file, in a folder that nobody else may enter, for as long as it is read."""
    if not content:
        raise ImageError(f"{NAME.capitalize()} is empty.", ACCEPTED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        path.write_bytes(content)
        return load_image(path, frame=frame)


def _file_of(encode: Callable[[], bytes]) -> bytes:
    """What a library writes; whatever it raises is said in our words."""
    with decoding(repr(NAME)):
        return encode()


def _encoded(picture: Pillow.Image, frame: int | None) -> bytes:
    """A PIL image as a lossless file, with all that decides how it is shown."""
    if frame is not None:
        count = getattr(picture, "n_frames", 1)
        if not 0 <= frame < count:
            raise ImageError(f"The image has {count} frames; there is no frame {frame}.", ACCEPTED)
        at = picture.tell()
        try:
            picture.seek(frame)
            return _encoded(picture, None)
        finally:
            picture.seek(at)  # the picture is the caller's, who may be stepping through it
    check_size(repr(NAME), picture.height, picture.width)
    tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
    if picture.mode in IN_NO_FILE:
        picture = picture.convert(IN_NO_FILE[picture.mode])
    ratio = stated_ratio(picture)
    picture.load()  # which turns a TIFF upright
    exif, turned = Pillow.Exif(), picture.getexif().get(ORIENTATION)
    if turned in range(2, 9):  # no other tag goes with it: they may be odd
        exif[ORIENTATION] = turned
    if picture.mode[0] in "IF" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        exif[PHOTOMETRIC] = WHITE_IS_ZERO  # Pillow turns over only those of 8 bits
    options: dict[str, Any] = {"icc_profile": picture.info.get("icc_profile"), "exif": exif}
    if ratio != 1:
        options["dpi"] = (RATIO * ratio, RATIO)
    file = io.BytesIO()
    if picture.mode in AS_PNG and PHOTOMETRIC not in exif:
        picture.save(file, "PNG", pnginfo=_colour_chunks(picture), compress_level=1, **options)
    else:
        picture.save(file, "TIFF", **options)
    return file.getvalue()


def _colour_chunks(picture: Pillow.Image) -> PngImagePlugin.PngInfo:
    """What a PNG says of its colours beside its profile: gAMA and sRGB (PNG, 3rd edition, 11.3)."""
    chunks = PngImagePlugin.PngInfo()
    if "srgb" in picture.info:
        chunks.add(b"sRGB", bytes([int(picture.info["srgb"])]))
    if "gamma" in picture.info:
        chunks.add(b"gAMA", struct.pack(">I", round(picture.info["gamma"] * 100_000)))
    return chunks


def _dicom(dataset: Any) -> bytes:
    """A dataset as a file; one that was made in memory is written in explicit VR."""
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    if not any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat")):
        raise ImageError(
            "The dataset holds no image.", "Read it whole: dcmread without stop_before_pixels."
        )
    meta = getattr(dataset, "file_meta", None)
    file = io.BytesIO()
    if meta is not None and "TransferSyntaxUID" in meta:
        dcmwrite(file, dataset)
        return file.getvalue()
    made = FileMetaDataset()
    made.TransferSyntaxUID = ExplicitVRLittleEndian
    copied = type(dataset)(dataset)
    copied.file_meta = made
    dcmwrite(file, copied)
    return file.getvalue()


def _nifti(image: Any) -> bytes:
    """A NIfTI image as a file: its header, and its voxels as they are stored, never scaled anew."""
    header = image.header.copy()
    size = len(header.binaryblock)
    if size not in NIFTI_HEADERS:
        raise ImageError(
            f"A {type(image).__name__} is no NIfTI image.", "Convert it: nibabel.Nifti1Image."
        )
    stored, slope, intercept = image.dataobj, 1.0, 0.0
    if hasattr(stored, "get_unscaled"):
        slope, intercept = float(stored.slope), float(stored.inter)
        stored = stored.get_unscaled()
    voxels = np.asarray(stored)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"] = NIFTI_HEADERS[size]
    header["magic"] = b"n+1" if size == 348 else header["magic"]
    padding = bytes(NIFTI_HEADERS[size] - size)
    ordered = voxels.astype(voxels.dtype.newbyteorder(header.endianness))
    return bytes(header.binaryblock + padding + ordered.tobytes("F"))


def _from_array(array: npt.NDArray[Any], value_range: tuple[float, float] | None) -> Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"An array of shape {list(array.shape)} is no picture.",
            "Give [H, W] for grey or [H, W, 3] for RGB; of a volume one slice.",
        )
    check_size("The array", *array.shape[:2])
    if array.dtype.kind not in "iuf":
        raise ImageError(
            f"An array of {array.dtype} is no picture.", "Give integers or floating point numbers."
        )
    if value_range is not None:
        return _in_range(array, value_range)
    if array.dtype == np.uint8:
        return with_flatness(Image.from_array(array))
    if array.dtype == np.uint16 and array.ndim == 2:
        picture = Pillow.fromarray(array.astype(np.uint16))
        return _from_bytes(_file_of(lambda: _encoded(picture, None)), None)
    raise ImageError(
        f"An array of {array.dtype} does not say which values are black and white.",
        "State it: value_range=(0.0, 1.0), or convert it to uint8.",
    )


def _in_range(array: npt.NDArray[Any], value_range: tuple[float, float]) -> Image:
    try:
        low, high = (float(value) for value in value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high or not np.isfinite((low, high)).all():
        raise InputError(
            f"The value_range {value_range!r} is none.", "Give (black, white), black the smaller."
        )
    if array.ndim == 3:
        channels = [show_range(array[..., channel], low, high) for channel in range(3)]
        pixels = as_pixels(np.stack(channels, axis=-1))
    else:
        pixels = as_pixels(show_range(array, low, high))
    return with_flatness(Image(pixels, window=((low + high) / 2, high - low)))
