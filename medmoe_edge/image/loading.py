"""A medical image file in, one 8-bit RGB picture out; and that picture as the tower's input.

The kind of a file is read from its first bytes, never from its name. `raster`, `dicom` and `nifti`
do the reading, and only the file that needs a library pays for its import. Sizes are checked in the
header, before anything is decoded.
"""

import contextlib
import dataclasses
import io
import logging
import math
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
from medmoe_edge.errors import ImageError, MedMoEError, Notice, ResourceError
from medmoe_edge.image.formats import HEAD_BYTES, KINDS, is_dicom, is_raster, may_be_nifti, unknown

Pixels = npt.NDArray[np.uint8]
Window = tuple[float, float]

MAX_PIXELS = 100_000_000  # of one picture: 10,000 x 10,000
MAX_BYTES = 2**30  # of all frames of a file, decoded: 2,000 CT slices

# The paper pads to a square before it shrinks. Longer sides are reduced to this first, or a strip
# of 1 x 100,000,000 pixels would need a square of 10^16.
MAX_SQUARE = 8192
# Likewise, only the middle of a longer strip can reach the centre crop.
MAX_ASPECT = 16

SQUARE = 0.005  # pixels that are less out of square than this are shown as they are
MAX_STRETCH = 16.0  # what says more than this is taken for a mistake
BAND = 2**20  # values that are worked on at once
FLAT = 16  # in a picture of fewer grey levels next to nothing can be seen

_READING = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One picture, ready to look at.

    `pixels` [H, W, 3] is read-only; grey is repeated in the three channels. `window` is the
    (centre, width) that made the file's values visible, in the file's unit (HU for CT); None
    where the values were shown as they are. `spacing` is the distance between rows and between
    columns in mm. `frames` counts the frames, pages or slices of the file. `notices` say what
    should be known of the picture as it was read; they become warnings of every answer about it.
    `labels` are all the modalities that the file states.
    """

    pixels: Pixels
    modality: str | None = None
    window: Window | None = None
    spacing: tuple[float, float] | None = None
    frames: int = 1
    notices: tuple[Notice, ...] = ()
    labels: tuple[str, ...] = ()

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


def load_image(
    path: str | os.PathLike[str], *, frame: int | None = None, most_pixels: int = MAX_PIXELS
) -> Image:
    """Read one picture of a file, as a viewer shows it, in true proportions.

    Args:
        path: The file; its name says nothing about its kind.
        frame: From 0; without it the middle one is read.
        most_pixels: A larger picture is refused before it is decoded.

    Raises:
        ImageError: It cannot be shown: no such file, not an image, damaged, too large, no such
            frame.
        MissingDependencyError: An optional decoder is not installed.
        ResourceError: There is not enough memory.
    """
    path = Path(path)
    name = shown_name(path)
    with decoding(name):
        return _with_flatness(_read(path, name, frame, most_pixels))


def _read(path: Path, name: str, frame: int | None, most_pixels: int) -> Image:
    head = _head(path, name)
    if is_dicom(head):
        from medmoe_edge.image.dicom import read_dicom

        return read_dicom(path, frame, most_pixels)
    if may_be_nifti(head):
        from medmoe_edge.image.nifti import read_nifti

        return read_nifti(path, frame, most_pixels)
    if is_raster(head):
        from medmoe_edge.image.raster import read_raster

        return read_raster(path, frame, most_pixels)
    raise unknown(name, head)


def _with_flatness(image: Image) -> Image:
    """The image, with a notice if nothing can be seen in it."""
    if int(image.pixels.max()) - int(image.pixels.min()) >= FLAT:
        return image
    flat = Notice("no_contrast", "The picture has no contrast: little or nothing is seen in it.")
    return dataclasses.replace(image, notices=(*image.notices, flat))


def square_pixels(image: Image, ratio: float, most_pixels: int = MAX_PIXELS) -> Image:
    """The image in true proportions: the coarser axis is stretched until pixels are square.

    Args:
        image: As it is stored.
        ratio: The distance between its rows, divided by that between its columns.
        most_pixels: Where stretching would exceed this, the finer axis shrinks too.

    Returns:
        The same image where its pixels are square already; with a notice, where the ratio cannot
        be meant.
    """
    if abs(ratio - 1) < SQUARE:
        return image
    if not 1 / MAX_STRETCH <= ratio <= MAX_STRETCH:
        odd = Notice(
            "proportions",
            "The file says that its pixels are far from square; they are shown as square.",
        )
        return dataclasses.replace(image, notices=(*image.notices, odd))
    rows, columns = image.pixels.shape[:2]
    height, width = rows * max(1.0, ratio), columns * max(1.0, 1 / ratio)
    shrink = min(1.0, math.sqrt(most_pixels / (height * width)))
    size = max(1, int(width * shrink + 0.5)), max(1, int(height * shrink + 0.5))
    # a stretched pixel stays of one shade, as on a viewer that does not interpolate
    stretched = Pillow.fromarray(image.pixels).resize(size, Pillow.Resampling.BOX)
    pixels = np.array(stretched)
    pixels.setflags(write=False)
    spacing = None if image.spacing is None else (min(image.spacing) / shrink,) * 2
    return dataclasses.replace(image, pixels=pixels, spacing=spacing)


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


def png_of(pixels: Pixels) -> bytes:
    """Pixels [H, W, 3] as a PNG file: nothing but the picture is in it."""
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise _not_opened(name, error) from None  # perhaps gone meanwhile
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


def check_size(name: str, rows: int, columns: int, most_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture without pixels or with more than `most_pixels`."""
    if rows < 1 or columns < 1:
        raise ImageError(f"{name} has no pixels.", "Give an image with at least one pixel.")
    if rows * columns > most_pixels:
        raise too_large(name, most_pixels)


def too_large(name: str, most_pixels: int = MAX_PIXELS) -> ImageError:
    """The error for a picture of more than `most_pixels`."""
    return ImageError(
        f"{name} has more than the limit of {most_pixels:,} pixels.", "Shrink it or crop it first."
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
    if values.ndim == 3:
        pixels = values.copy(order="C")
    else:
        pixels = np.empty((*values.shape, 3), np.uint8)
        for channel in range(3):  # three times as fast as to repeat each value
            pixels[..., channel] = values
    pixels.setflags(write=False)
    return pixels


def finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The values as float64, NaN as 0 and everything within reach of further arithmetic."""
    return np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), -1e30, 1e30)


def show_percentiles(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], Window]:
    """Values without a display range of their own: 1st to 99th percentile from black to white.

    NaN is black and counts for nothing, as infinite values do, which are black or white.
    """
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    known = values
    if values.dtype.kind == "f":
        sound = np.isfinite(values)
        known = values if sound.all() else values[sound]
    if not known.size:
        known = np.zeros(1)
    low, high = _percentiles(known, (1, 99))
    if low == high:  # a few bright dots on black
        low, high = float(known.min()), float(known.max())
    return show_range(values, low, high), ((low + high) / 2, high - low)


def show_range(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Values `[H, W]` from `low`, shown black, to `high`, shown white; NaN is black."""
    shown = np.empty(values.shape, np.uint8)
    band = max(1, BAND // max(1, values.shape[1]))  # a picture in float64 takes eight times more
    for top in range(0, values.shape[0], band):
        part = values[top : top + band].astype(np.float64)
        part = np.clip((part - low) / ((high - low) or 1.0), 0, 1)
        shown[top : top + band] = np.rint(np.nan_to_num(part, copy=False) * 255)
    return shown


def _percentiles(values: npt.NDArray[Any], wanted: tuple[float, ...]) -> list[float]:
    """As `np.percentile` interpolates them, which takes a float64 copy and overflows in int8."""
    places = [(values.size - 1) * percent / 100 for percent in wanted]
    near = [(math.floor(place), math.ceil(place)) for place in places]
    ordered = np.partition(values.ravel(), sorted({index for pair in near for index in pair}))
    found = []
    for place, (below, above) in zip(places, near, strict=True):
        first, last = (min(max(float(ordered[k]), -1e300), 1e300) for k in (below, above))
        found.append(first + (last - first) * (place - below))
    return found


def check_file(path: Path, name: str) -> None:
    """Raise `ImageError` for what is no file, or none that may be read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder.", "Give an image file.")
        if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
            raise ImageError(f"{name} is not a regular file.", "Give an image file.")
        path.open("rb").close()
    except OSError as error:
        raise _not_opened(name, error) from None


def _not_opened(name: str, error: OSError) -> ImageError:
    return ImageError(
        f"{name} cannot be opened: {(error.strerror or 'unknown reason').lower()}.",
        "Check the path and its permissions.",
    )


def _head(path: Path, name: str) -> bytes:
    check_file(path, name)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ImageError(f"{name} is empty.", f"Give {KINDS}.")
    return head
