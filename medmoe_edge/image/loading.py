"""A medical image file in, one 8-bit RGB picture out; and that picture as the tower's input.

The kind of a file is read from its first bytes, never from its name. `image_raster`, `image_dicom`
and `image_nifti` do the reading, and only the file that needs a library pays for its import. Sizes
are checked in the header, before anything is decoded.
"""

import contextlib
import dataclasses
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from medmoe_edge.config import VisionConfig
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.errors import ImageError, MedMoEError, ResourceError

Pixels = npt.NDArray[np.uint8]
Window = tuple[float, float]

MAX_PIXELS = 100_000_000  # of one picture: 10,000 x 10,000
MAX_BYTES = 2**30  # of all frames of a file, decoded: 2,000 CT slices

# The paper pads to a square before it shrinks. Longer sides are reduced to this first, or a strip
# of 1 x 100,000,000 pixels would need a square of 10^16.
MAX_SQUARE = 8192
# Likewise, only the middle of a longer strip can reach the centre crop.
MAX_ASPECT = 16

SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NIFTI_SIGNATURES = {344: (b"n+1\0", b"ni1\0"), 4: (b"n+2\0", b"ni2\0")}  # by offset
GZIP_SIGNATURE = b"\x1f\x8b"
KINDS = "a PNG, JPEG, TIFF, DICOM or NIfTI file"

_READING = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One picture, ready to look at.

    `pixels` [H, W, 3] is read-only; grey is repeated in the three channels. `window` is the
    (centre, width) that made the file's values visible, in the file's unit (HU for CT); None
    where the values were shown as they are. `spacing` is the distance between rows and between
    columns in mm. `frames` counts the frames, pages or slices of the file.
    """

    pixels: Pixels
    modality: str | None = None
    window: Window | None = None
    spacing: tuple[float, float] | None = None
    frames: int = 1

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Self:
        """A picture from uint8 values, grey [H, W] or RGB [H, W, 3]; they are copied."""
        shown = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
        if not shown or array.dtype != np.uint8:
            raise ImageError(
                f"An array of {array.dtype} values in the shape {list(array.shape)} is no picture.",
                "Give uint8 values in the shape [H, W] or [H, W, 3].",
            )
        check_size("The array", *array.shape[:2])
        return cls(as_pixels(array))


def load_image(path: str | os.PathLike[str], *, frame: int | None = None) -> Image:
    """Read one picture of a file; `frame` counts from 0, and without it the middle one is read.

    Raises `ImageError` for whatever cannot be shown: no such file, not an image, damaged, too
    large, no such frame; `MissingDependencyError` where an optional decoder is not installed.
    """
    path = Path(path)
    name = shown_name(path)
    with decoding(name):
        head = _head(path, name)
        if head[128:132] == b"DICM" or (head[:2] == b"\x08\0" and head[3:4] == b"\0"):
            from medmoe_edge.image.dicom import read_dicom

            return read_dicom(path, frame)
        if head.startswith(GZIP_SIGNATURE) or is_nifti(head):
            from medmoe_edge.image.nifti import read_nifti

            return read_nifti(path, frame)
        if head.startswith((*SIGNATURES.values(), *TIFF_SIGNATURES)):
            from medmoe_edge.image.raster import read_raster

            return read_raster(path, frame)
    raise ImageError(f"{name} is not an image that can be read.", f"Give {KINDS}.")


def preprocess(image: Image, vision: VisionConfig | SwinConfig) -> npt.NDArray[np.float32]:
    """The tower's input [1, 3, S, S]: the square that `seen_picture` gives, normalised."""
    values = seen_picture(image, vision).pixels.astype(np.float32)  # [S, S, 3]
    mean, std = (np.asarray(v, np.float32) for v in (vision.pixel_mean, vision.pixel_std))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1)[None])


def seen_picture(image: Image, vision: VisionConfig | SwinConfig) -> Image:
    """What the tower sees of a picture: a square of side S = `vision.image_size`.

    Med-MoE trains and answers on `pad_to_square`: the picture in the middle of a square of the
    mean colour (truncated to integers, as LLaVA's `expand2square` does). Its evaluation scales
    the shortest edge to S and crops the centre, which is CLIP's own preprocessing. Such a square
    is itself seen as it is.
    """
    picture = Pillow.fromarray(image.pixels)
    side = vision.image_size
    if vision.pad_to_square:
        colour = tuple(int(mean) for mean in vision.pixel_mean)
        picture = _pad_to_square(picture, colour).resize((side, side), Pillow.Resampling.BICUBIC)
    else:
        picture = _centre_crop(picture, side)
    return Image(np.asarray(picture))


def seen_square(image: Image, vision: VisionConfig | SwinConfig) -> tuple[float, float, float]:
    """The square of the picture that `preprocess` shows the tower: its left, top and side.

    In pixels of the picture; padding reaches beyond it, and a crop stays within.
    """
    height, width = image.pixels.shape[:2]
    side = max(width, height) if vision.pad_to_square else min(width, height)
    # whole pixels as there, but for pictures that it reduces first, which are off by less than one
    return float(-((side - width) // 2)), float(-((side - height) // 2)), float(side)


def _pad_to_square(picture: Pillow.Image, colour: tuple[int, ...]) -> Pillow.Image:
    longest = max(picture.size)
    if longest > MAX_SQUARE:
        width, height = (max(1, n * MAX_SQUARE // longest) for n in picture.size)
        picture = picture.resize((width, height), Pillow.Resampling.BOX)
    side = max(picture.size)
    square = Pillow.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _centre_crop(picture: Pillow.Image, side: int) -> Pillow.Image:
    limit = MAX_ASPECT * min(picture.size)
    if max(picture.size) > limit:
        picture = _crop(picture, min(picture.width, limit), min(picture.height, limit))
    shortest = min(picture.size)
    width, height = (side * n // shortest for n in picture.size)
    return _crop(picture.resize((width, height), Pillow.Resampling.BICUBIC), side, side)


def _crop(picture: Pillow.Image, width: int, height: int) -> Pillow.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def shown_name(path: Path) -> str:
    """How messages name a file: the last part of its path, quoted, control characters escaped."""
    return repr(path.name or str(path))


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Around code that reads untrusted bytes: no warnings, and only our own errors.

    The libraries raise nearly anything on damaged input (struct.error, KeyError, RecursionError,
    zlib.error ...), hence the broad except. Their texts are dropped: they may quote the file.
    Silence holds for the whole process, so one thread reads at a time.
    """
    with _READING, _silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except MedMoEError:
            raise
        except MemoryError:
            raise ResourceError(
                f"There is not enough memory to read {name}.", "Close other programs, or shrink it."
            ) from None
        except Exception as error:
            raise ImageError(
                f"{name} is damaged, incomplete or of an unsupported variant "
                f"({type(error).__name__}).",
                "Copy or export the file again, or save the picture as PNG.",
            ) from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(library) for library in ("pydicom", "nibabel.global")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def check_size(name: str, rows: int, columns: int) -> None:
    """Refuse a picture without pixels or with more than `MAX_PIXELS`."""
    if rows < 1 or columns < 1:
        raise ImageError(f"{name} has no pixels.", "Give an image with at least one pixel.")
    if rows * columns > MAX_PIXELS:
        raise too_large(name)


def too_large(name: str) -> ImageError:
    """The error for a picture of more than `MAX_PIXELS`."""
    return ImageError(
        f"{name} has more than the limit of {MAX_PIXELS:,} pixels.", "Shrink it or crop it first."
    )


def pick_frame(name: str, frame: int | None, count: int) -> int:
    """The index of the wanted frame, or of the middle one."""
    if frame is None:
        return (count - 1) // 2
    if not 0 <= frame < count:
        raise ImageError(
            f"{name} has {count} frame{'s' * (count != 1)}; there is no frame {frame}.",
            f"Choose a frame from 0 to {count - 1}.",
        )
    return frame


def as_pixels(values: npt.NDArray[np.uint8]) -> Pixels:
    """Grey [H, W] or RGB [H, W, 3] as a read-only [H, W, 3] of its own."""
    grey = values.ndim == 2
    pixels = np.repeat(values[..., None], 3, axis=2) if grey else values.copy(order="C")
    pixels.setflags(write=False)
    return pixels


def finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The values as float64, NaN as 0 and everything within reach of further arithmetic."""
    return np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), -1e30, 1e30)


def show_percentiles(values: npt.NDArray[Any]) -> tuple[Pixels, Window]:
    """Values without a display range of their own: 1st to 99th percentile from black to white."""
    values = finite(values)
    low, high = (float(v) for v in np.percentile(values, [1, 99]))
    if low == high:  # a few bright dots on black
        low, high = float(values.min()), float(values.max())
    shown = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    return np.rint(shown * 255).astype(np.uint8), ((low + high) / 2, high - low)


def is_nifti(head: bytes) -> bool:
    """Whether a file's first 348 bytes are a NIfTI header."""
    return any(head[at : at + 4] in magics for at, magics in NIFTI_SIGNATURES.items())


def _head(path: Path, name: str) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder.", "Give an image file.")
        if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
            raise ImageError(f"{name} is not a regular file.", "Give an image file.")
        with path.open("rb") as file:
            head = file.read(348)
    except OSError as error:
        raise ImageError(
            f"{name} cannot be opened: {(error.strerror or 'unknown reason').lower()}.",
            "Check the path and its permissions.",
        ) from None
    if not head:
        raise ImageError(f"{name} is empty.", f"Give {KINDS}.")
    return head
