"""Pictures for browsers, which read neither DICOM nor NIfTI: as the model is shown them, and their
values, so that the page can lay another window over them.
"""

import asyncio
import base64
import io
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Form
from PIL import Image as Pillow
from pydantic import BaseModel

from medmoe_edge.bedside.serve.routes import REFUSALS, ImageForm
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.image.loading import Image, Window, finite, pick_frame
from medmoe_edge.image.worker import NAME, Bounds, GreyValues, read_apart_with_values

LARGEST = 2048  # pixels of the longer side, more than a bedside screen has


class Codes(BaseModel):
    """Grey values `[height, width]` in the file's unit (HU for CT): `offset + scale * code`.

    `data` is base64 of the codes, 16 bits each, the low byte first. `inverted`: the lowest value is
    shown white.
    """

    data: str
    offset: float
    scale: float
    window: Window
    inverted: bool


class Warned(BaseModel):
    """A `medmoe_edge.errors.Notice`."""

    code: str
    message: str


class Picture(BaseModel):
    """One frame. `png` is base64 of what the model is shown, in the file's own window.

    `size` are the columns and rows of the file; picture and codes may have fewer, `width` and
    `height`. `codes` are None where there is colour. `warnings` are what should be known of the
    picture as it was read; answers about it repeat them.
    """

    size: tuple[int, int]
    width: int
    height: int
    frame: int
    frames: int
    modality: str | None
    png: str
    codes: Codes | None
    warnings: list[Warned]


def picture_routes(limits: Limits) -> APIRouter:
    """`/v1/picture`."""
    router = APIRouter(prefix="/v1", responses=REFUSALS)

    @router.post("/picture")
    async def picture(
        form: Annotated[ImageForm, Form(media_type="multipart/form-data")],
    ) -> Picture:
        """Decode an image for display; nothing of it is kept."""
        data = await form.image.read()
        await form.image.close()
        # not on the models' thread: one can look while another's question is answered
        return await asyncio.to_thread(picture_of, data, form.frame, limits.bounds)

    return router


def picture_of(data: bytes, frame: int | None, bounds: Bounds) -> Picture:
    """The picture in an uploaded file; the errors of `medmoe_edge.image.worker.read_apart`."""
    image, values = read_apart_with_values(data, frame, bounds)
    height, width = image.pixels.shape[:2]
    index = pick_frame(NAME, frame, image.frames)
    grey = _is_grey(image)
    shown = _reduced(Pillow.fromarray(image.pixels[..., 0] if grey else image.pixels))
    return Picture(
        size=(width, height),
        width=shown.width,
        height=shown.height,
        frame=index,
        frames=image.frames,
        modality=image.modality,
        png=_png(shown),
        codes=_codes(image, values, shown) if grey else None,
        warnings=[Warned(code=each.code, message=each.message) for each in image.notices],
    )


def _is_grey(image: Image) -> bool:
    red, green, blue = (image.pixels[..., channel] for channel in range(3))
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _codes(image: Image, found: GreyValues | None, shown: Pillow.Image) -> Codes:
    centre, width = image.window or (127.5, 255.0)
    if found is None:  # of other files only what their window shows
        values, inverted = centre - width / 2 + np.asarray(shown) * (width / 255), False
    else:
        inverted = found.inverted
        # in the proportions of the picture, which the stored values may lack
        values = finite(np.asarray(_resized(Pillow.fromarray(found.values), shown.size)))
    low, high = float(values.min()), float(values.max())
    if found is not None and image.window is None:
        centre, width = (low + high) / 2, high - low
    whole = high - low < 2**16 and bool((values == np.rint(values)).all())
    scale = 1.0 if whole else (high - low) / (2**16 - 1) or 1.0
    codes = np.rint(np.clip((values - low) / scale, 0, 2**16 - 1)).astype("<u2")
    encoded = base64.b64encode(codes.tobytes()).decode()
    window = centre, width if width > 0 else 1.0
    return Codes(data=encoded, offset=low, scale=scale, window=window, inverted=inverted)


def _reduced(picture: Pillow.Image) -> Pillow.Image:
    scale = LARGEST / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return _resized(picture, (width, height))


def _resized(picture: Pillow.Image, size: tuple[int, int]) -> Pillow.Image:
    return picture if picture.size == size else picture.resize(size, Pillow.Resampling.BOX)


def _png(picture: Pillow.Image) -> str:
    file = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1}  # it goes to the next room, and at once
    picture.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()
