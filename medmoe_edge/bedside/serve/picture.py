"""Pictures for browsers, which read neither DICOM nor NIfTI: as the model is shown them, and their
values, so that the page can lay another window over them.
"""

import asyncio
import base64
import io
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Form
from PIL import Image as Pillow
from pydantic import BaseModel
from pydicom.pixels.processing import apply_modality_lut

from medmoe_edge.bedside.serve.routes import REFUSALS, ImageForm
from medmoe_edge.bedside.serve.settings import Limits
from medmoe_edge.bedside.serve.work import path_to, read_upload
from medmoe_edge.image.dicom import decode_frame, open_dataset, unfold_frame
from medmoe_edge.image.dicom_display import GREY
from medmoe_edge.image.loading import Image, Window, decoding, finite, pick_frame, too_large

LARGEST = 2048  # pixels of the longer side, more than a bedside screen has
NAME = "The image"
Values = npt.NDArray[np.float32]


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


class Picture(BaseModel):
    """One frame. `png` is base64 of what the model is shown, in the file's own window.

    `size` are the columns and rows of the file; picture and codes may have fewer, `width` and
    `height`. `codes` are None where there is colour.
    """

    size: tuple[int, int]
    width: int
    height: int
    frame: int
    frames: int
    modality: str | None
    png: str
    codes: Codes | None


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
        return await asyncio.to_thread(picture_of, data, form.frame, limits.pixels)

    return router


def picture_of(data: bytes, frame: int | None, most_pixels: int) -> Picture:
    """The picture in an uploaded file; the errors of `medmoe_edge.image.loading.load_image`."""
    image = read_upload(data, frame)
    height, width = image.pixels.shape[:2]
    if height * width > most_pixels:
        raise too_large(NAME)
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
        codes=_codes(data, image, index, shown) if grey else None,
    )


def _is_grey(image: Image) -> bool:
    red, green, blue = (image.pixels[..., channel] for channel in range(3))
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _codes(data: bytes, image: Image, index: int, shown: Pillow.Image) -> Codes:
    centre, width = image.window or (127.5, 255.0)
    found = _dicom_values(data, index) if data[128:132] == b"DICM" else None
    if found is None:  # of other files only what their window shows
        values, inverted = centre - width / 2 + np.asarray(shown) * (width / 255), False
    else:
        original, inverted = found
        values = finite(np.asarray(_reduced(Pillow.fromarray(original))))
    low, high = float(values.min()), float(values.max())
    if found is not None and image.window is None:
        centre, width = (low + high) / 2, high - low
    whole = high - low < 2**16 and bool((values == np.rint(values)).all())
    scale = 1.0 if whole else (high - low) / (2**16 - 1) or 1.0
    codes = np.rint(np.clip((values - low) / scale, 0, 2**16 - 1)).astype("<u2")
    encoded = base64.b64encode(codes.tobytes()).decode()
    window = centre, width if width > 0 else 1.0
    return Codes(data=encoded, offset=low, scale=scale, window=window, inverted=inverted)


def _dicom_values(data: bytes, index: int) -> tuple[Values, bool] | None:
    """Rescaled values of a frame that `load_image` has accepted, and whether they are inverted."""
    with path_to(data) as path, decoding(NAME):
        dataset = open_dataset(path, NAME)
        if dataset.PhotometricInterpretation not in GREY:
            return None
        frames = int(dataset.get("NumberOfFrames") or 1)
        stored = decode_frame(dataset, NAME, index, frames)
        unfold_frame(dataset, index)
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        return finite(apply_modality_lut(stored, dataset)).astype(np.float32), inverted


def _reduced(picture: Pillow.Image) -> Pillow.Image:
    scale = LARGEST / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Pillow.Resampling.BOX)


def _png(picture: Pillow.Image) -> str:
    file = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1}  # it goes to the next room, and at once
    picture.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()
