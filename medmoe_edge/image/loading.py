"""A medical image file in, one 8-bit RGB picture out; and that picture as the tower's input.

The kind of a file is read from its first bytes, never from its name. `raster`, `dicom` and `nifti`
do the reading, and only the file that needs a library pays for its import. Sizes are checked in the
header, before anything is decoded.
"""

import contextlib
import dataclasses
import io
import logging
import os
import stat
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from medmoe_edge.config import VisionConfig
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.errors import (
    ImageError,
    InputError,
    MedMoEError,
    Notice,
    ResourceError,
    of_machine,
    unreadable,
)
from medmoe_edge.image.pixels import (
    FLAT,
    HEAD_BYTES,
    KINDS,
    MAX_ASPECT,
    MAX_PIXELS,
    MAX_SQUARE,
    Image,
    Pixels,
    is_dicom,
    is_raster,
    may_be_nifti,
    shown_name,
    unknown,
)

NOISY = ("pydicom", "nibabel.global", "PIL.TiffImagePlugin")
_READING = threading.Lock()


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
        return with_flatness(_read(path, name, frame, most_pixels))


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


def with_flatness(image: Image) -> Image:
    """The image, with a notice if nothing can be seen in it."""
    if int(image.pixels.max()) - int(image.pixels.min()) >= FLAT:
        return image
    flat = Notice("no_contrast", "The picture has no contrast: little or nothing is seen in it.")
    return dataclasses.replace(image, notices=(*image.notices, flat))


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


class Decoded:
    """Pictures as a model sees them, each decoded once: in a file that goes with the object.

    What is seen is a square of `vision.image_size`; a thousand of the largest published size take
    340 MB, on disk and not in memory.
    """

    def __init__(self, vision: VisionConfig) -> None:
        self.vision = vision
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        weakref.finalize(self, self._file.close)
        self._places: dict[object, int] = {}

    def load(self, key: object, read: Callable[[], Image]) -> Image:
        """The square that is seen of a picture, which `read` gives the first time it is asked."""
        side = self.vision.image_size
        size = 3 * side * side
        place = self._places.get(key)
        if place is None:
            seen = seen_picture(read(), self.vision)
            place = len(self._places) * size
            with contextlib.suppress(OSError):  # a full disk: it is decoded again then
                self._file.seek(place)
                self._file.write(np.ascontiguousarray(seen.pixels).tobytes())
                self._file.flush()
                self._places[key] = place
            return seen
        self._file.seek(place)
        return Image(np.frombuffer(self._file.read(size), np.uint8).reshape(side, side, 3))


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


def dicom_origin(path: Path) -> tuple[bool, str | None, str | None]:
    """What a DICOM file states of its image and its patient; see `dicom.read_origin`.

    Raises `ImageError` for a file that cannot be read as DICOM.
    """
    from medmoe_edge.image.dicom import read_origin

    with decoding(shown_name(path)):
        return read_origin(path)


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
            raise ImageError(*unreadable(name, error)) from None  # perhaps gone meanwhile
        except Exception as error:
            if found := of_machine(name, error):
                raise found from None
            raise ImageError(
                f"{name} is damaged, incomplete or of an unsupported variant "
                f"({type(error).__name__}).",
                "Copy or export the file again, or save the picture as PNG.",
            ) from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(library) for library in NOISY]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


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
        raise (of_machine(name, error) or ImageError(*unreadable(name, error))) from None


def _head(path: Path, name: str) -> bytes:
    check_file(path, name)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ImageError(f"{name} is empty.", f"Give {KINDS}.")
    return head


def files_below(root: Path, without: Path) -> tuple[list[str], list[str]]:
    """All files below `root` in order, and what folders cannot be read, as paths below it.

    Hidden ones and the folder `without` are left out. Raises `InputError` where there is no root.
    """
    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r}.", "Give a folder of images.")
    files: list[str] = []
    unread: list[str] = []

    def skip(error: OSError) -> None:
        below = os.path.relpath(error.filename, root)
        if trouble := of_machine(below, error):
            raise trouble from error
        if below == os.curdir:  # all that was known of it would count as gone
            raise error
        unread.append(below)

    for parent, folders, names in os.walk(root, onerror=skip):
        folders[:] = [
            name for name in folders if not name.startswith(".") and Path(parent, name) != without
        ]
        below = os.path.relpath(parent, root)
        files += [
            os.path.normpath(os.path.join(below, name))
            for name in names
            if not name.startswith(".")
        ]
    return sorted(files), unread
