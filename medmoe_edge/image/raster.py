"""PNG, JPEG and TIFF: one page, upright, in RGB."""

import contextlib
import ctypes
import functools
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, TiffImagePlugin, _imaging

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import (
    Image,
    as_pixels,
    check_size,
    pick_frame,
    show_percentiles,
    shown_name,
    too_large,
)

MAX_PAGES = 10_000


def read_raster(path: Path, frame: int | None) -> Image:
    """Read one page; the errors of `image.loading.load_image`, and whatever Pillow raises."""
    name = shown_name(path)
    _silence_libtiff()
    with _open(path, name) as picture:
        frames = _pages(picture, name) if isinstance(picture, TiffImagePlugin.TiffImageFile) else 1
        picture.seek(pick_frame(name, frame, frames))
        check_size(name, picture.height, picture.width)
        inverted = _is_white_zero(picture)
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):  # more than 8 bits a pixel
            pixels, window = show_percentiles(np.asarray(upright))
            pixels = as_pixels(255 - pixels if inverted else pixels)
            return Image(pixels, window=window, frames=frames)
        return Image(as_pixels(np.asarray(_flatten(upright))), frames=frames)


def _open(path: Path, name: str) -> Pillow.Image:
    try:
        return Pillow.open(path, formats=("PNG", "JPEG", "TIFF"))
    except Pillow.DecompressionBombError:  # Pillow's own limit is higher
        raise too_large(name) from None


@functools.cache
def _silence_libtiff() -> None:
    """Keep the C library's own complaints off the screen: it writes them to file descriptor 2.

    To turn that away for a moment would swallow what other threads write meanwhile.
    """
    library = ctypes.CDLL(_imaging.__file__)  # which finds what Pillow itself was linked with
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):  # linked in, so that its names are not shown
            getattr(library, handler)(None)


def _pages(picture: TiffImagePlugin.TiffImageFile, name: str) -> int:
    # Not n_frames, which takes hours on a hostile chain of a million pages.
    for count in range(MAX_PAGES + 1):
        try:
            picture.seek(count)
        except EOFError:
            return count
    raise ImageError(f"{name} has more than {MAX_PAGES:,} pages.", "Split it.")


def _is_white_zero(picture: Pillow.Image) -> bool:
    # Pillow turns 8-bit TIFFs of this photometric interpretation over, but not 16-bit ones.
    return (
        isinstance(picture, TiffImagePlugin.TiffImageFile)
        and picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    )


def _flatten(picture: Pillow.Image) -> Pillow.Image:
    """RGB over black, the background of a viewing station."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", layers.size, "black"), layers).convert("RGB")
