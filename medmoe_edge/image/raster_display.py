"""What a viewer shows of a decoded raster picture: 0..255, RGB.

More than 8 bits: the 1st to 99th percentile. Colours: to sRGB by the embedded profile, else by
PNG's gAMA. What is transparent: over black, unless nothing would be left to see.
"""

import dataclasses
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import GifImagePlugin, PngImagePlugin, TiffImagePlugin
from PIL import Image as Pillow

from medmoe_edge.errors import Notice
from medmoe_edge.image.pixels import Pixels, Window, as_pixels, show_percentiles

# EXIF's and TIFF's tags
ORIENTATION, X_RESOLUTION, Y_RESOLUTION = 274, 282, 283
WHITE_IS_ZERO = 0  # a photometric interpretation
SRGB_GAMMA = 1 / 2.2  # PNG's gAMA of what looks right without any correction
VISIBLE = 32  # of 255: what is darker everywhere cannot be seen on black
BAND = 2**24  # pixels that are worked on at once


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture `[H, W, 3]`, read-only; the window that made it visible; what should be known."""

    pixels: Pixels
    window: Window | None = None
    notices: tuple[Notice, ...] = ()


def show(picture: Pillow.Image) -> Shown:
    """A loaded, upright picture as a viewer shows it; its memory is given back."""
    if picture.mode.startswith(("I", "F")) or _is_signed(picture):
        return _show_deep(picture)
    if "transparency" in picture.info and picture.mode in ("1", "L", "RGB"):
        # One shade or colour is marked as transparent. It is a part of the picture all the same:
        # on black, the white of a bone would become a hole.
        del picture.info["transparency"]
    if not picture.has_transparency_data:
        return Shown(_rgb(_managed(picture)))
    kind = "LA" if picture.mode in ("LA", "La") else "RGBA"
    whole = picture if picture.mode == kind else picture.convert(kind)
    alpha, opaque = whole.getchannel("A"), whole.convert(kind[:-1])
    picture.im = whole.im = None  # type: ignore[assignment]
    # a profile is of the colours as they are stored, not of what shows through them
    shown, notices = _flattened(_managed(opaque), alpha)
    return Shown(_rgb(shown), None, notices)


def stated_ratio(picture: Pillow.Image) -> float:
    """The distance between rows, divided by that between columns, as the file states it; else 1.

    As it lies in the file, before it is turned upright. JPEG: JFIF's densities, else EXIF's; PNG:
    pHYs; TIFF: its resolutions; BMP: pixels per metre; GIF: the aspect ratio in its head. After it
    EXIF can be read, which is nothing where it is damaged: no viewer minds.
    """
    exif, info = _exif(picture), picture.info
    stated: tuple[Any, Any]
    if isinstance(picture, GifImagePlugin.GifImageFile):
        byte = _gif_aspect(picture)
        return 64 / (byte + 15) if byte else 1.0
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        stated = picture.tag_v2.get(X_RESOLUTION), picture.tag_v2.get(Y_RESOLUTION)
    elif "jfif_density" in info:
        stated = info["jfif_density"]
    elif "aspect" in info or "dpi" in info:
        stated = info.get("aspect") or info["dpi"]
    else:
        stated = exif.get(X_RESOLUTION), exif.get(Y_RESOLUTION)
    try:
        across, down = (float(value) for value in stated)
        return across / down if across > 0 and down > 0 else 1.0
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 1.0


def _exif(picture: Pillow.Image) -> Pillow.Exif:
    if isinstance(picture, PngImagePlugin.PngImageFile):
        picture.load()  # EXIF may stand behind the pixels, whose damage counts
    try:
        return picture.getexif()
    except Exception:  # of a directory, whatever its bytes lead to
        picture.info.pop("exif", None)
        return picture.getexif()


def _gif_aspect(picture: GifImagePlugin.GifImageFile) -> int:
    file = picture.fp
    assert file is not None
    before = file.tell()
    file.seek(12)
    (byte,) = file.read(1)
    file.seek(before)
    return int(byte)


def _is_signed(picture: Pillow.Image) -> bool:
    # Pillow takes the signed bytes of a TIFF for unsigned ones.
    return (
        isinstance(picture, TiffImagePlugin.TiffImageFile)
        and picture.mode == "L"
        and picture.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    )


def _show_deep(picture: Pillow.Image) -> Shown:
    values = _values(picture)
    inverted = False
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        tags = picture.tag_v2
        # Pillow turns 8-bit TIFFs of this photometric interpretation over, but not deeper ones.
        inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        sample = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
        if values.dtype == np.int32 and sample == 1 and tags.get(258, (1,))[0] == 32:
            values = values.view(np.uint32)  # Pillow has no mode for these
        elif values.dtype == np.uint8:
            values = values.view(np.int8)
    picture.im = None  # type: ignore[assignment]
    pixels, window = show_percentiles(values)
    return Shown(as_pixels(255 - pixels if inverted else pixels), window)


def _flattened(
    picture: Pillow.Image, alpha: Pillow.Image
) -> tuple[Pillow.Image, tuple[Notice, ...]]:
    """The picture over black, the background of a viewing station, or over white if it must be.

    With what should be known of it.
    """
    lowest, highest = alpha.getextrema()
    if lowest == 255:
        return picture, ()
    if highest == 0:
        ignored = Notice(
            "transparency_ignored",
            "The file says that all of the picture is transparent; it is shown as if it were not.",
        )
        return picture, (ignored,)
    shown = Pillow.new(picture.mode, picture.size, "black")
    shown.paste(picture, mask=alpha)
    if int(np.asarray(shown).max()) >= VISIBLE:
        return shown, ()
    shown.paste("white", (0, 0, *picture.size))
    shown.paste(picture, mask=alpha)
    white = Notice(
        "transparency_white",
        "The picture is dark on a transparent background; it is shown on white, to be seen.",
    )
    return shown, (white,)


def _managed(picture: Pillow.Image) -> Pillow.Image:
    """In sRGB, by the picture's own profile or gamma, which is what a viewer shows."""
    if picture.mode in ("P", "PA", "1"):
        picture = picture.convert("RGB" if picture.mode != "1" else "L")
    profile, gamma = picture.info.get("icc_profile"), picture.info.get("gamma")
    if profile:
        return _by_profile(picture, profile)
    if picture.mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        return ImageCms.applyTransform(picture, transform) or picture
    if gamma and "srgb" not in picture.info and picture.mode in ("L", "RGB"):
        exponent = SRGB_GAMMA / gamma
        if 0.1 < exponent < 10 and abs(exponent - 1) > 0.05:
            curve = [round(255 * (value / 255) ** exponent) for value in range(256)]
            return picture.point(curve * len(picture.getbands()))
    return picture


def _by_profile(picture: Pillow.Image, data: bytes) -> Pillow.Image:
    """To sRGB by an ICC profile; as it is where the profile is broken or of other colours."""
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        of = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip())
        if of != picture.mode or "sRGB" in ImageCms.getProfileDescription(profile):
            return picture
        srgb = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
        transform = ImageCms.buildTransform(profile, srgb, of, "RGB", intent)
        shown = ImageCms.applyTransform(picture, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    assert shown is not None  # it is not done in place
    return shown.convert("L") if of == "L" else shown


def _rgb(picture: Pillow.Image) -> Pixels:
    if picture.mode == "L":
        return as_pixels(_values(picture))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    pixels = _values(picture)
    pixels.setflags(write=False)
    return pixels


def _values(picture: Pillow.Image) -> npt.NDArray[Any]:
    """The values of a picture; of a large one band by band, or Pillow would hold them thrice."""
    if picture.width * picture.height <= BAND:
        return np.asarray(picture)
    first = np.asarray(picture.crop((0, 0, picture.width, 1)))
    values = np.empty((picture.height, *first.shape[1:]), first.dtype)
    step = max(1, BAND // picture.width)
    for top in range(0, picture.height, step):
        bottom = min(top + step, picture.height)
        values[top:bottom] = np.asarray(picture.crop((0, top, picture.width, bottom)))
    return values
